"""What a bench came to, as a terminal shows it and as CI systems read it.

JUnit XML, GitHub annotations and Markdown are for CI systems.
"""

import platform
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from rich.markup import escape
from rich.table import Table

from hardware.gate.bench import CORES_BUSY
from hardware.gate.outcome import Checked, Outcome, Row, sentence
from hardware.gate.sequential_test import Comparison, Verdict

LEVELS = {Verdict.PASS: "notice", Verdict.INCONCLUSIVE: "warning", Verdict.REGRESSION: "error"}
STYLES = {
    Verdict.PASS: "green",
    Verdict.REGRESSION: "bold red",
    Verdict.INCONCLUSIVE: "yellow",
}
SUITE = "espalier bench"
# The complement of the production Char of XML 1.0, sec. 2.2.
NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def state_line(seconds: float, found: Sequence[Sequence[Comparison]]) -> str:
    """Return the state of a bench in one line."""
    said = [
        f"{c.limit.metric} {100 * (c.ratio.estimate - 1):+.1f} % {c.verdict.value}"
        for each in found
        for c in each
    ]
    return escape(f"{seconds:.0f} s  " + "  ".join(said or ["measuring"]))


def views(outcome: Outcome) -> Iterator[Table | str]:
    """Yield what was measured, then what it comes to, and what to do where it is not sure."""
    yield _figures(outcome)
    for row in outcome.rows:
        for check in row.checks:
            said = escape(f"{row.subject.path}: {sentence(check, outcome.confidence_pct)}")
            yield f"[{STYLES[check.verdict]}]{check.verdict.value}:[/] {said}"
    cut = "" if outcome.is_complete else ", interrupted"
    yield f"{outcome.mode}, {outcome.seconds:.1f} s{cut}"
    if outcome.foreign_cores > CORES_BUSY:
        yield (
            f"Others kept {outcome.foreign_cores:.1f} cores busy meanwhile: expect wider intervals."
        )
    if outcome.verdict is Verdict.INCONCLUSIVE and outcome.is_complete:
        yield "Not sure within the budget: give a larger --budget, or quiet the machine."


def _figures(outcome: Outcome) -> Table:
    """Return the table of all engines."""
    table = Table("engine", "p50 ms", "p90 ms", "p99 ms", "load ms", "first ms", "samples")
    extra = [row for row in outcome.rows if row.figures.images_per_s or row.figures.peak_bytes]
    if extra:
        table.add_column("images/s")
        table.add_column("peak MiB")
    if outcome.baseline is not None:
        table.add_row(*_cells(outcome.baseline, "baseline: ", bool(extra)))
    for row in outcome.rows:
        table.add_row(*_cells(row, "", bool(extra)))
    return table


def _cells(row: Row, role: str, with_extra: bool) -> list[str]:
    figures = row.figures
    cells = [
        escape(f"{role}{row.subject.path}"),
        *(f"{value:.3f}" for value in (figures.p50_ms, figures.p90_ms, figures.p99_ms)),
        *(f"{value:.1f}" for value in (figures.load_ms, figures.first_ms)),
        str(figures.samples),
    ]
    if with_extra:
        rate, peak = figures.images_per_s, figures.peak_bytes
        cells.append("" if rate is None else f"{rate:.1f} ({figures.concurrency} at a time)")
        cells.append("" if peak is None else f"{peak / 2**20:.1f}")
    return cells


def junit(outcome: Outcome) -> str:
    """Return JUnit XML: a regression is a failure, an inconclusive check is skipped.

    Reference:
        The JUnit schema of the Apache Ant project as published by windyroad (JUnit.xsd), which
        Jenkins, GitLab and Azure read: order of elements and required attributes are its.
    """
    cases = []
    for row in outcome.rows:
        for check in row.checks:
            case = _case(row.subject.path, f"{check.metric} within {check.limit_pct:g} %", outcome)
            text = sentence(check, outcome.confidence_pct)
            if check.verdict is Verdict.REGRESSION:
                said = {"message": f"slower: {text}", "type": "regression"}
                ElementTree.SubElement(case, "failure", said).text = text
            elif check.verdict is Verdict.INCONCLUSIVE:
                ElementTree.SubElement(case, "skipped", {"message": f"not sure: {text}"})
            cases.append(case)
        if not row.checks:
            cases.append(_case(row.subject.path, "measured", outcome))
    return _suite(cases, outcome.started, outcome.seconds, _markdown_lines(outcome))


def junit_refused(engines: Sequence[Path], reason: str, started: str) -> str:
    """Return JUnit XML of a bench that could not compare: every engine is an error."""
    cases = []
    for engine in engines:
        case = ElementTree.Element(
            "testcase", {"classname": str(engine), "name": "comparable", "time": "0.000"}
        )
        said = {"message": reason, "type": "not comparable"}
        ElementTree.SubElement(case, "error", said).text = reason
        cases.append(case)
    return _suite(cases, started, 0.0, [reason])


def _case(engine: str, name: str, outcome: Outcome) -> ElementTree.Element:
    time_s = outcome.seconds / max(sum(max(len(row.checks), 1) for row in outcome.rows), 1)
    return ElementTree.Element(
        "testcase", {"classname": engine, "name": name, "time": f"{time_s:.3f}"}
    )


def _suite(
    cases: Sequence[ElementTree.Element], started: str, seconds: float, lines: Sequence[str]
) -> str:
    counts = {
        f"{word}s" if word != "skipped" else word: str(sum(c.find(word) is not None for c in cases))
        for word in ("failure", "error", "skipped")
    }
    root = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(
        root,
        "testsuite",
        {
            "name": SUITE,
            "package": "espalier",
            "id": "0",
            "timestamp": started[:19],  # the schema allows no zone
            "hostname": platform.node() or "localhost",
            "tests": str(len(cases)),
            **counts,
            "time": f"{seconds:.3f}",
        },
    )
    ElementTree.SubElement(suite, "properties")
    suite.extend(cases)
    ElementTree.SubElement(suite, "system-out").text = "\n".join(lines)
    ElementTree.SubElement(suite, "system-err")
    ElementTree.indent(root)
    for element in root.iter():
        element.text = element.text and _printable(element.text)
        element.attrib.update({key: _printable(value) for key, value in element.attrib.items()})
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _printable(text: str) -> str:
    """Replace what XML has no way to write: control characters (colours of a vendor's message)."""
    return NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)


def annotations(outcome: Outcome) -> tuple[str, ...]:
    """Return one GitHub workflow command per check.

    Reference:
        GitHub documentation, "Workflow commands for GitHub Actions"; the escaping is that of
        actions/toolkit, packages/core/src/command.ts.
    """
    return tuple(
        annotation(
            LEVELS[check.verdict],
            f"{SUITE}: {check.verdict.value}",
            row.subject.path,
            sentence(check, outcome.confidence_pct),
        )
        for row in outcome.rows
        for check in row.checks
    )


def annotation(level: str, title: str, file: str, message: str) -> str:
    """Return one workflow command; what would end a property or the line is escaped."""
    return f"::{level} file={_property(file)},title={_property(title)}::{_data(message)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def markdown(outcome: Outcome) -> str:
    """Return a section for a pull request or a job's summary."""
    return "\n".join(_markdown_lines(outcome)) + "\n"


def _markdown_lines(outcome: Outcome) -> list[str]:
    verdict = outcome.verdict.value if outcome.verdict else "measured"
    cut = "" if outcome.is_complete else ", interrupted"
    lines = [
        f"### {SUITE}: {verdict}",
        "",
        f"{outcome.mode}, {outcome.seconds:.0f} s{cut}, {_cell(outcome.device)}, others used "
        f"{outcome.foreign_cores:.1f} cores meanwhile",
        "",
        "| engine | p50 ms | p90 ms | p99 ms | load ms | images/s | peak MiB | check | verdict |",
        "|---|---:|---:|---:|---:|---:|---:|---|---|",
    ]
    for row in outcome.rows:
        checks = row.checks or (None,)
        lines += [_markdown_row(row, check, outcome.confidence_pct) for check in checks]
    if outcome.baseline is not None:
        lines.append(_markdown_row(outcome.baseline, None, outcome.confidence_pct, "baseline: "))
    return lines


def _markdown_row(row: Row, check: Checked | None, confidence_pct: float, role: str = "") -> str:
    figures = row.figures
    rate, peak = figures.images_per_s, figures.peak_bytes
    said = sentence(check, confidence_pct) if check else ""
    cells = (
        f"{role}{_cell(row.subject.path)}",
        f"{figures.p50_ms:.3f}",
        f"{figures.p90_ms:.3f}",
        f"{figures.p99_ms:.3f}",
        f"{figures.load_ms:.1f}",
        "" if rate is None else f"{rate:.1f} ({figures.concurrency} at a time)",
        "" if peak is None else f"{peak / 2**20:.1f}",
        said,
        check.verdict.value if check else "",
    )
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

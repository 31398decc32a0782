"""What CI systems are told, checked against what their schemas ask for."""

import re
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest
import xmlschema
from hypothesis import given
from hypothesis import strategies as st

from hardware.gate.outcome import Checked, Figures, Outcome, Row
from hardware.gate.reports import annotation, annotations, junit, junit_refused, markdown
from hardware.gate.sequential_test import Verdict
from hardware.gate.session import Subject

# The schema of Ant's JUnit reports, github.com/windyroad/JUnit-Schema, Apache-2.0, unchanged.
SCHEMA = Path(__file__).parent / "junit.xsd"
# Levels and properties of annotations in GitHub's "Workflow commands for GitHub Actions".
LEVELS = {"notice", "warning", "error"}
PROPERTIES = {"title", "file", "col", "endColumn", "line", "endLine"}


def outcome(*verdicts: Verdict, path: str = "models/net.onnx") -> Outcome:
    subject = Subject(
        path=path, sha256="0", runtime="ort", version="1", precision="fp32", threads=1, inputs=()
    )
    figures = Figures(
        p50_ms=2.0, p90_ms=2.5, p99_ms=3.0, p50_low_ms=1.9, p50_high_ms=2.1, load_ms=20.0,
        first_ms=4.0, samples=100, loads=10,
    )  # fmt: skip
    checks = tuple(
        Checked(
            metric="p50", limit_pct=2, verdict=verdict, slower_pct=5, low_pct=4, high_pct=6,
            detectable_pct=3, units=20,
        )
        for verdict in verdicts
    )  # fmt: skip
    return Outcome(
        mode="paired", started="2026-01-02T03:04:05+00:00", seconds=8, device="Bench | 1",
        fingerprint="f", confidence_pct=99, foreign_cores=0, is_complete=True,
        verdict=verdicts[0] if verdicts else None, baseline=None,
        rows=(Row(subject=subject, figures=figures, checks=checks),),
    )  # fmt: skip


@cache
def schema() -> xmlschema.XMLSchema:
    return xmlschema.XMLSchema(SCHEMA)


def validated(text: str) -> ElementTree.Element:
    """Hold a document to the schema, and its counts to what it holds; return its suite."""
    schema().validate(text)
    [suite] = ElementTree.fromstring(text.encode())
    cases = suite.findall("testcase")
    for count, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        assert int(suite.attrib[count]) == sum(case.find(tag) is not None for case in cases)
    assert int(suite.attrib["tests"]) == len(cases)
    return suite


def read_command(line: str) -> tuple[str, dict[str, str], str]:
    """Read an annotation as GitHub's runner does.

    Reference:
        actions/runner, src/Runner.Common/ActionCommand.cs, `TryParseV2`: the command ends at the
        next "::", properties are split at commas and at their first "=", then unescaped.
    """
    assert line.startswith("::") and not {"\r", "\n"} & set(line)
    command, data = line[2:].split("::", 1)
    level, _, properties = command.partition(" ")
    pairs = (part.split("=", 1) for part in properties.split(",") if part)
    return (
        level,
        {key: unescaped(value, {"%3A": ":", "%2C": ","}) for key, value in pairs},
        (unescaped(data, {})),
    )


def unescaped(text: str, more: dict[str, str]) -> str:
    for code, character in {"%0D": "\r", "%0A": "\n", **more, "%25": "%"}.items():
        text = text.replace(code, character)
    return text


def test_junit_fits_its_schema_and_only_a_regression_fails():
    suite = validated(junit(outcome(Verdict.REGRESSION, Verdict.PASS, Verdict.INCONCLUSIVE)))

    first, second, third = suite.findall("testcase")
    assert "p50 +5.0 %" in first.find("failure").attrib["message"]
    assert len(second) == 0
    assert third.find("skipped") is not None


def test_junit_of_a_bench_without_a_baseline_has_a_case():
    [case] = validated(junit(outcome())).findall("testcase")

    assert case.attrib["name"] == "measured"


@given(st.text(), st.text())
def test_no_name_and_no_reason_breaks_the_xml(name, reason):
    failed = validated(junit(outcome(Verdict.REGRESSION, path=name)))
    refused = validated(junit_refused([name], reason, "2026-01-02T03:04:05+00:00"))

    assert len(failed.findall("testcase/failure")) == len(refused.findall("testcase/error")) == 1


def test_junit_of_what_is_not_comparable_is_an_error():
    suite = validated(junit_refused(["a.onnx"], "another <device> & more", "2026-01-02T03:04:05Z"))

    assert suite.find("testcase/error").attrib["message"] == "another <device> & more"


@pytest.mark.parametrize(
    ("verdict", "level"),
    [
        (Verdict.PASS, "notice"),
        (Verdict.INCONCLUSIVE, "warning"),
        (Verdict.REGRESSION, "error"),
    ],
)
def test_annotations_are_one_command_per_check(verdict, level):
    [line] = annotations(outcome(verdict))

    found, properties, message = read_command(line)
    assert found == level and level in LEVELS
    assert properties == {"file": "models/net.onnx", "title": f"espalier bench: {verdict.value}"}
    assert properties.keys() <= PROPERTIES
    assert "p50 +5.0 % (between" in message


def test_what_would_end_an_annotation_is_escaped_as_documented():
    line = annotation("error", "a: b, 50%", "odd,\nname.onnx", "100%\r\nsecond: line, whole")

    assert line == (
        "::error file=odd%2C%0Aname.onnx,title=a%3A b%2C 50%25::100%25%0D%0Asecond: line, whole"
    )


@given(st.text(), st.text(), st.text())
def test_the_runner_reads_every_annotation_back(title, file, message):
    found = read_command(annotation("warning", title, file, message))

    assert found == ("warning", {"file": file, "title": title}, message)


def test_markdown_is_a_table_that_no_name_breaks():
    text = markdown(outcome(Verdict.REGRESSION, path="a|b.onnx"))

    assert text.startswith("### espalier bench: regression\n")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {10}
    assert r"a\|b.onnx" in text and r"Bench \| 1" in text

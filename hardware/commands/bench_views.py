"""What `espalier bench` shows: its state while it runs, and its outcome, as rich prints it."""

from collections.abc import Iterator, Sequence

from rich.markup import escape
from rich.table import Table

from hardware.gate.bench import CORES_BUSY
from hardware.gate.outcome import Outcome, Row, sentence
from hardware.gate.sequential_test import Comparison, Verdict

STYLES = {
    Verdict.PASS: "green",
    Verdict.REGRESSION: "bold red",
    Verdict.INCONCLUSIVE: "yellow",
}


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

"""The commands that need no torch: what a device runs. The only file here that prints."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hardware import formats
from hardware.benching import CORES_BUSY, SESSION_DRIFT, Glimpse, Rules
from hardware.charting import page as history_page
from hardware.comparing import Limit, Verdict, parse_share
from hardware.device import conditions, this_device
from hardware.errors import BusyError, DeviceMismatchError, HardwareError, RuntimeMissingError
from hardware.gating import Request, gate, history_path, parse_seconds
from hardware.histories import read_history
from hardware.outcomes import Outcome, Row, sentence
from hardware.runtimes import RUNTIMES, get_runtime
from hardware.runtimes.base import EngineSettings
from hardware.sampling import Schedule
from hardware.storing import write_whole

app = typer.Typer(no_args_is_help=True, add_completion=False)
out = Console()
err = Console(stderr=True)
Parsed = TypeVar("Parsed")

DEFAULT_LIMITS = ["p50:2%"]
# A gate that is not sure must not pass for one that is.
EXIT_CODES = {None: 0, Verdict.PASS: 0, Verdict.REGRESSION: 1, Verdict.INCONCLUSIVE: 3}
UNDECIDED = 3
INTERRUPTED = 130


@app.command()
def devices() -> None:
    """Show this machine and the runtimes that can build and time engines on it."""
    device = this_device()
    facts = Table(
        title=f"{device.name} ({device.fingerprint[:12]})", show_header=False, title_justify="left"
    )
    facts.add_row("processor", device.processor)
    facts.add_row("cores", str(device.cores))
    facts.add_row("memory", f"{device.memory_bytes / 2**30:.1f} GiB")
    facts.add_row("features", " ".join(device.features) or "none known")
    for name, value in conditions().items():
        facts.add_row(name, value)
    out.print(facts)
    table = Table("runtime", "version", "runs on", "can be used")
    for name in sorted(RUNTIMES):
        try:
            runtime = get_runtime(name)
        except RuntimeMissingError as error:
            table.add_row(name, "", "", f"no: {error}")
        else:
            table.add_row(name, runtime.version(), runtime.device(), "yes")
    out.print(table)


@app.command()
def bench(
    engines: Annotated[
        list[Path], typer.Argument(metavar="ENGINE...", help="`.onnx`, `.ort`, OpenVINO `.xml`")
    ],
    baseline: Annotated[
        Path | None,
        typer.Option(help="An engine, or a `.json` that --save wrote on this device"),
    ] = None,
    limit: Annotated[
        list[str],
        typer.Option(
            metavar="METRIC:PERCENT",
            help="Slow-down tolerated of p50, p90, p99 or load; may be repeated",
        ),
    ] = DEFAULT_LIMITS,
    confidence: Annotated[float, typer.Option(help="Percent, of all verdicts together")] = 99.0,
    budget: Annotated[str, typer.Option(help="Longest time of sampling: 60s, 2m")] = "60s",
    save: Annotated[Path | None, typer.Option(help="Save the measurement of the engine")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML")] = None,
    github: Annotated[bool, typer.Option("--github", help="Print GitHub annotations")] = False,
    markdown: Annotated[Path | None, typer.Option(help="Write a Markdown section")] = None,
    runtime: Annotated[str | None, typer.Option(help="[default: by the file's name]")] = None,
    precision: Annotated[str, typer.Option(help="What the engine must run in")] = "fp32",
    threads: Annotated[int, typer.Option(help="Of each engine")] = 1,
    cold: Annotated[bool, typer.Option("--cold", help="Empty the caches each time")] = False,
    concurrency: Annotated[
        int, typer.Option(help="Measure throughput with so many inferences at a time")
    ] = 0,
    memory: Annotated[bool, typer.Option("--memory", help="Measure peak memory")] = False,
    recorded: Annotated[
        bool, typer.Option("--recorded", help="Compare with the record even where its engine is")
    ] = False,
    drift: Annotated[
        str, typer.Option(help="Tolerated on top of the limits against a record")
    ] = f"{100 * SESSION_DRIFT:g}%",
    history: Annotated[
        Path | None, typer.Option(help="Folder [default: ~/.local/state/espalier]")
    ] = None,
    page: Annotated[Path | None, typer.Option(help="Write the history as an HTML page")] = None,
) -> None:
    """Fail when an engine got slower than its baseline, and only then.

    Exit code 0: pass (or nothing to compare with). 1: a regression. 2: bad input. 3: not sure, not
    comparable, or another bench runs here. 130: interrupted; what was measured is in the history.
    """
    with reported(engines, junit, github):
        request = _understood(
            lambda: Request(
                engines=tuple(engines),
                history=history or _state_folder(),
                baseline=baseline,
                is_recorded=recorded,
                runtime=runtime,
                settings=EngineSettings(precision=precision, threads=threads),
                rules=_rules(limit, confidence, budget, drift, {"is_cold": cold}),
                concurrency=concurrency,
                with_memory=memory,
                save=save,
            )
        )
        with err.status("loading the engines") as status:
            outcome = gate(request, lambda glimpse: status.update(_line(glimpse)))
        _show(outcome)
        if github:
            for line in formats.annotations(outcome):
                typer.echo(line)
        if junit is not None:
            write_whole(junit, formats.junit(outcome))
        if markdown is not None:
            write_whole(markdown, formats.markdown(outcome))
        if page is not None:
            past = read_history(history_path(request.history))
            write_whole(page, history_page(f"Latency on {outcome.device}", past))
        raise typer.Exit(EXIT_CODES[outcome.verdict] if outcome.is_complete else INTERRUPTED)


@contextmanager
def reported(engines: Sequence[Path], junit: Path | None, github: bool) -> Iterator[None]:
    """Turn our errors into one message and an exit code; what is not comparable is told to CI."""
    try:
        yield
    except (DeviceMismatchError, BusyError) as error:
        _tell(error)
        if github:
            typer.echo(formats.annotation("warning", formats.SUITE, str(engines[0]), str(error)))
        if junit is not None:
            now = datetime.now(timezone.utc).isoformat()
            write_whole(junit, formats.junit_refused(engines, str(error), now))
        raise typer.Exit(UNDECIDED) from error
    except HardwareError as error:
        _tell(error)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        err.print("Interrupted before anything was measured.")
        raise typer.Exit(INTERRUPTED) from None


def _tell(error: HardwareError) -> None:
    err.print(f"[bold red]error:[/] {type(error).__name__}", highlight=False)
    err.print(str(error), markup=False, highlight=False)


def _rules(
    limits: Sequence[str], confidence: float, budget: str, drift: str, schedule: dict[str, bool]
) -> Rules:
    """Return the rules that the options describe; raises ValueError."""
    return Rules(
        limits=tuple(Limit.parse(text) for text in limits),
        confidence=confidence / 100,
        schedule=Schedule(budget_s=parse_seconds(budget), **schedule),
        drift=parse_share(drift),
    )


def _understood(make: Callable[[], Parsed]) -> Parsed:
    """Return what an option means; a value that means nothing is a usage error, exit code 2."""
    try:
        return make()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _state_folder() -> Path:
    """Return where programs keep what outlasts them, by the XDG rules."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "espalier"


def _line(glimpse: Glimpse) -> str:
    """Return the state of a bench in one line."""
    said = [
        f"{c.limit.metric} {100 * (c.ratio.estimate - 1):+.1f} % {c.verdict.value}"
        for found in glimpse.comparisons
        for c in found
    ]
    return escape(f"{glimpse.seconds:.0f} s  " + "  ".join(said or ["measuring"]))


def _show(outcome: Outcome) -> None:
    """Print what was measured, then what it comes to."""
    table = Table("engine", "p50 ms", "p90 ms", "p99 ms", "load ms", "first ms", "samples")
    extra = [row for row in outcome.rows if row.figures.images_per_s or row.figures.peak_bytes]
    if extra:
        table.add_column("images/s")
        table.add_column("peak MiB")
    if outcome.baseline is not None:
        table.add_row(*_cells(outcome.baseline, "baseline: ", bool(extra)))
    for row in outcome.rows:
        table.add_row(*_cells(row, "", bool(extra)))
    out.print(table)
    for row in outcome.rows:
        for check in row.checks:
            said = sentence(check, outcome.confidence_pct)
            out.print(f"{check.verdict.value}: {row.subject.path}: {said}", markup=False)
    cut = "" if outcome.is_complete else ", interrupted"
    out.print(f"{outcome.mode}, {outcome.seconds:.1f} s{cut}", highlight=False)
    if outcome.foreign_cores > CORES_BUSY:
        out.print(
            f"Others kept {outcome.foreign_cores:.1f} cores busy meanwhile: expect wider intervals."
        )


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

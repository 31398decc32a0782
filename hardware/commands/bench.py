"""`espalier bench` on the command line: what its options mean, what it prints, its exit codes."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hardware.commands.bench_views import state_line, views
from hardware.errors import BusyError, DeviceMismatchError, HardwareError
from hardware.gate import reports as formats
from hardware.gate.bench import Rules
from hardware.gate.history import read_history
from hardware.gate.page import page as history_page
from hardware.gate.run import Request, gate, history_path, parse_seconds
from hardware.gate.sample import Schedule
from hardware.gate.sequential_test import ASSUMED_DRIFT, Drift, Limit, Verdict, parse_share
from hardware.records import write_whole
from hardware.runtimes.base import EngineSettings

out = Console()
err = Console(stderr=True)

DEFAULT_LIMITS = ["p50:2%"]
# A gate that is not sure must not pass for one that is.
EXIT_CODES = {None: 0, Verdict.PASS: 0, Verdict.REGRESSION: 1, Verdict.INCONCLUSIVE: 3}
UNDECIDED = 3
INTERRUPTED = 130

HELP = """Fail when an engine got slower than its baseline, and only then.

- Compare two files, timed now, in turns: `espalier bench new.onnx --baseline old.onnx`
- Compare with the past. On this device, earlier: `espalier bench old.onnx --save old.json`;
  now: `espalier bench new.onnx --baseline old.json`
- Only measure: `espalier bench net.onnx --memory --concurrency 2`

`--limit p50:2%` tolerates a median of 1.02 times the baseline's. The verdict is looked for after
every fortieth of the budget and given as soon as it is sure.

Exit codes:

- **0** pass, or nothing to compare with
- **1** regression
- **2** bad input
- **3** not sure within the budget (the least slow-down that would have been seen is printed), not
  comparable, or another bench runs here
- **130** interrupted; what was measured is in the history
"""

COMPARE, MEASURE, REPORT = "What counts as slower", "How to measure", "What to keep and tell"
Engines = Annotated[
    list[Path],
    typer.Argument(
        metavar="ENGINE...", help="`.onnx`, `.ort`, OpenVINO `.xml`, TensorRT `.engine`"
    ),
]
Baseline = Annotated[
    Path | None,
    typer.Option(
        help="An engine file, or a `.json` that --save wrote on this device",
        rich_help_panel=COMPARE,
    ),
]
Limits = Annotated[
    list[str],
    typer.Option(
        metavar="METRIC:PERCENT",
        help="Slow-down tolerated of p50, p90, p99, load or throughput, increase of memory; "
        "may be repeated",
        rich_help_panel=COMPARE,
    ),
]
Confidence = Annotated[
    float, typer.Option(help="Percent, of all verdicts together", rich_help_panel=COMPARE)
]
Recorded = Annotated[
    bool,
    typer.Option(
        "--recorded",
        help="Compare with the record even where the engine that it is of is at hand",
        rich_help_panel=COMPARE,
    ),
]
Tolerated = Annotated[
    str | None,
    typer.Option(
        metavar="PERCENT",
        help="Tolerated on top of the limits against a record [default: as sessions in the "
        f"history differ; {ASSUMED_DRIFT.share:.0%} where they are few]",
        rich_help_panel=COMPARE,
    ),
]
Budget = Annotated[
    str,
    typer.Option(
        help="Longest time of sampling: 60s, 2m; throughput and memory have as much again where "
        "they have a limit",
        rich_help_panel=MEASURE,
    ),
]
RuntimeName = Annotated[
    str | None,
    typer.Option(
        help="As `espalier devices` lists them [default: by the file's name]",
        rich_help_panel=MEASURE,
    ),
]
Precision = Annotated[
    str, typer.Option(help="What the engines must run in", rich_help_panel=MEASURE)
]
Threads = Annotated[int, typer.Option(help="Of each engine", rich_help_panel=MEASURE)]
BaselineThreads = Annotated[
    int | None,
    typer.Option(help="Of the baseline [default: as --threads]", rich_help_panel=MEASURE),
]
Cold = Annotated[
    bool,
    typer.Option("--cold", help="Empty the caches before each sample", rich_help_panel=MEASURE),
]
Concurrency = Annotated[
    int,
    typer.Option(
        help="Measure throughput too, with so many inferences at a time", rich_help_panel=MEASURE
    ),
]
Memory = Annotated[
    bool,
    typer.Option(
        "--memory",
        help="Measure the memory that loading and running adds",
        rich_help_panel=MEASURE,
    ),
]
Save = Annotated[
    Path | None,
    typer.Option(
        help="Save the measurement as a baseline for later; spends the whole budget",
        rich_help_panel=REPORT,
    ),
]
Junit = Annotated[Path | None, typer.Option(help="Write JUnit XML", rich_help_panel=REPORT)]
Github = Annotated[
    bool, typer.Option("--github", help="Print GitHub annotations", rich_help_panel=REPORT)
]
Markdown = Annotated[
    Path | None, typer.Option(help="Write a Markdown section", rich_help_panel=REPORT)
]
Folder = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the history [default: ~/.local/state/espalier]", rich_help_panel=REPORT
    ),
]
Page = Annotated[
    Path | None,
    typer.Option(help="Write the device's history as an HTML page", rich_help_panel=REPORT),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reports:
    """What to write once the outcome is known."""

    junit: Path | None
    github: bool
    markdown: Path | None
    page: Path | None


def add_bench(app: typer.Typer) -> None:
    """Add the command to a command line."""
    app.command(help=HELP)(bench)


def bench(
    engines: Engines,
    baseline: Baseline = None,
    limit: Limits = DEFAULT_LIMITS,
    confidence: Confidence = 99.0,
    recorded: Recorded = False,
    drift: Tolerated = None,
    budget: Budget = "60s",
    runtime: RuntimeName = None,
    precision: Precision = "fp32",
    threads: Threads = 1,
    baseline_threads: BaselineThreads = None,
    cold: Cold = False,
    concurrency: Concurrency = 0,
    memory: Memory = False,
    save: Save = None,
    junit: Junit = None,
    github: Github = False,
    markdown: Markdown = None,
    history: Folder = None,
    page: Page = None,
) -> None:
    """Fail when an engine got slower than its baseline; see `HELP`."""
    reports = Reports(junit=junit, github=github, markdown=markdown, page=page)
    with reported(engines, reports):
        with understood():
            request = Request(
                engines=tuple(engines),
                history=history or _state_folder(),
                baseline=baseline,
                is_recorded=recorded,
                drift=None if drift is None else Drift(parse_share(drift)),
                runtime=runtime,
                settings=EngineSettings(precision=precision, threads=threads),
                baseline_threads=baseline_threads,
                rules=_rules(limit, confidence, budget, is_cold=cold),
                concurrency=concurrency,
                with_memory=memory,
                save=save,
            )
        raise typer.Exit(_benched(request, reports))


def _benched(request: Request, reports: Reports) -> int:
    """Bench, print, write the reports, and return the exit code."""
    with err.status("loading the engines") as status:
        outcome = gate(request, lambda seconds, found: status.update(state_line(seconds, found)))
    for view in views(outcome):
        out.print(view, highlight=False)
    if reports.github:
        for line in formats.annotations(outcome):
            typer.echo(line)
    if reports.junit is not None:
        write_whole(reports.junit, formats.junit(outcome))
    if reports.markdown is not None:
        write_whole(reports.markdown, formats.markdown(outcome))
    if reports.page is not None:
        past = read_history(history_path(request.history))
        write_whole(reports.page, history_page(f"Latency on {outcome.device}", past))
    return EXIT_CODES[outcome.verdict] if outcome.is_complete else INTERRUPTED


@contextmanager
def reported(engines: Sequence[Path], reports: Reports) -> Iterator[None]:
    """Turn our errors into one message and an exit code; what is not comparable is told to CI."""
    try:
        yield
    except (DeviceMismatchError, BusyError) as error:
        _tell(error)
        if reports.github:
            typer.echo(formats.annotation("warning", formats.SUITE, str(engines[0]), str(error)))
        if reports.junit is not None:
            now = datetime.now(timezone.utc).isoformat()
            write_whole(reports.junit, formats.junit_refused(engines, str(error), now))
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


@contextmanager
def understood() -> Iterator[None]:
    """Make a value that means nothing a usage error, exit code 2."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _rules(limits: Sequence[str], confidence: float, budget: str, *, is_cold: bool) -> Rules:
    """Return the rules that the options describe; raises ValueError."""
    return Rules(
        limits=tuple(Limit.parse(text) for text in limits),
        confidence=confidence / 100,
        schedule=Schedule(budget_s=parse_seconds(budget), is_cold=is_cold),
    )


def _state_folder() -> Path:
    """Return where programs keep what outlasts them, by the XDG rules."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "espalier"

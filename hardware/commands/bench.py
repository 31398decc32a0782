"""`espalier bench` on the command line: what its options mean, what it prints, its exit codes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer

from hardware.commands.console import INTERRUPTED, command_of, err, out, print_error
from hardware.errors import BusyError, DeviceMismatchError, HardwareError
from hardware.gate import reports
from hardware.gate.bench import Rules
from hardware.gate.history import read_history
from hardware.gate.page import page as history_page
from hardware.gate.run import Request, gate, history_path, parse_seconds
from hardware.gate.sample import Schedule
from hardware.gate.sequential_test import (
    ASSUMED_ALLOWANCE,
    Allowance,
    Limit,
    Verdict,
    parse_share,
)
from hardware.records import write_whole
from hardware.runtimes.base import EngineSettings

DEFAULT_LIMIT = "p50:2%"
# A gate that is not sure must not pass for one that is.
EXIT_CODES = {None: 0, Verdict.PASS: 0, Verdict.REGRESSION: 1, Verdict.INCONCLUSIVE: 3}
UNDECIDED = 3

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
  comparable, or another process measures here
- **130** interrupted; what was measured is in the history
"""

COMPARE, MEASURE, REPORT = "What counts as slower", "How to measure", "What to keep and tell"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `espalier bench` is asked for: a field for every argument and option."""

    engines: Annotated[
        list[Path],
        typer.Argument(
            metavar="ENGINE...", help="`.onnx`, `.ort`, OpenVINO `.xml`, TensorRT `.engine`"
        ),
    ]
    baseline: Annotated[
        Path | None,
        typer.Option(
            help="An engine file, or a `.json` that --save wrote on this device",
            rich_help_panel=COMPARE,
        ),
    ] = None
    limit: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC:PERCENT",
            help="Slow-down tolerated of p50, p90, p99, load or throughput, increase of memory; "
            f"may be repeated [default: {DEFAULT_LIMIT}]",
            rich_help_panel=COMPARE,
        ),
    ] = None
    confidence: Annotated[
        float, typer.Option(help="Percent, of all verdicts together", rich_help_panel=COMPARE)
    ] = 99.0
    recorded: Annotated[
        bool,
        typer.Option(
            "--recorded",
            help="Compare with the record even where the engine that it is of is at hand",
            rich_help_panel=COMPARE,
        ),
    ] = False
    allowance: Annotated[
        str | None,
        typer.Option(
            metavar="PERCENT",
            help="Tolerated on top of the limits against a record [default: as sessions in the "
            f"history differ; {ASSUMED_ALLOWANCE.share:.0%} where they are few]",
            rich_help_panel=COMPARE,
        ),
    ] = None
    budget: Annotated[
        str,
        typer.Option(
            help="Longest time of sampling: 60s, 2m; throughput and memory have as much again "
            "where they have a limit",
            rich_help_panel=MEASURE,
        ),
    ] = "60s"
    runtime: Annotated[
        str | None,
        typer.Option(
            help="As `espalier devices` lists them [default: by the file's name]",
            rich_help_panel=MEASURE,
        ),
    ] = None
    precision: Annotated[
        str, typer.Option(help="What the engines must run in", rich_help_panel=MEASURE)
    ] = "fp32"
    threads: Annotated[int, typer.Option(help="Of each engine", rich_help_panel=MEASURE)] = 1
    baseline_threads: Annotated[
        int | None,
        typer.Option(help="Of the baseline [default: as --threads]", rich_help_panel=MEASURE),
    ] = None
    cold: Annotated[
        bool,
        typer.Option("--cold", help="Empty the caches before each sample", rich_help_panel=MEASURE),
    ] = False
    concurrency: Annotated[
        int,
        typer.Option(
            help="Measure throughput too, with so many inferences at a time",
            rich_help_panel=MEASURE,
        ),
    ] = 0
    memory: Annotated[
        bool,
        typer.Option(
            "--memory",
            help="Measure the memory that loading and running adds",
            rich_help_panel=MEASURE,
        ),
    ] = False
    save: Annotated[
        Path | None,
        typer.Option(
            help="Save the measurement as a baseline for later; spends the whole budget",
            rich_help_panel=REPORT,
        ),
    ] = None
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML", rich_help_panel=REPORT)] = (
        None
    )
    github: Annotated[
        bool, typer.Option("--github", help="Print GitHub annotations", rich_help_panel=REPORT)
    ] = False
    markdown: Annotated[
        Path | None, typer.Option(help="Write a Markdown section", rich_help_panel=REPORT)
    ] = None
    history: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the history [default: ~/.local/state/espalier]", rich_help_panel=REPORT
        ),
    ] = None
    html: Annotated[
        Path | None,
        typer.Option(help="Write the device's history as an HTML page", rich_help_panel=REPORT),
    ] = None

    def request(self) -> Request:
        """Return what is to be measured and compared; raises ValueError."""
        limits = tuple(Limit.parse(text) for text in self.limit or [DEFAULT_LIMIT])
        schedule = Schedule(budget_s=parse_seconds(self.budget), is_cold=self.cold)
        return Request(
            engines=tuple(self.engines),
            history=self.history or _state_folder(),
            baseline=self.baseline,
            is_recorded=self.recorded,
            allowance=None if self.allowance is None else Allowance(parse_share(self.allowance)),
            runtime=self.runtime,
            settings=EngineSettings(precision=self.precision, threads=self.threads),
            baseline_threads=self.baseline_threads,
            rules=Rules(limits=limits, confidence=self.confidence / 100, schedule=schedule),
            concurrency=self.concurrency,
            with_memory=self.memory,
            save=self.save,
        )


def add_bench(app: typer.Typer) -> None:
    """Add the command to a command line."""
    app.command(help=HELP)(command_of(Options, bench))


def bench(options: Options) -> None:
    """Fail when an engine got slower than its baseline; see `HELP`."""
    with _reported(options):
        with _understood():
            request = options.request()
        raise typer.Exit(_benched(request, options))


def _benched(request: Request, options: Options) -> int:
    """Bench, print, write the reports, and return the exit code."""
    with err.status("loading the engines") as status:
        outcome = gate(
            request, lambda seconds, found: status.update(reports.state_line(seconds, found))
        )
    for view in reports.views(outcome):
        out.print(view, highlight=False)
    if options.github:
        for line in reports.annotations(outcome):
            typer.echo(line)
    if options.junit is not None:
        write_whole(options.junit, reports.junit(outcome))
    if options.markdown is not None:
        write_whole(options.markdown, reports.markdown(outcome))
    if options.html is not None:
        past = read_history(history_path(request))
        write_whole(options.html, history_page(f"Latency on {outcome.device}", past))
    return EXIT_CODES[outcome.verdict] if outcome.is_complete else INTERRUPTED


@contextmanager
def _reported(options: Options) -> Iterator[None]:
    """Turn our errors into one message and an exit code; CI hears of what is not comparable."""
    try:
        yield
    except (DeviceMismatchError, BusyError) as error:
        print_error(error)
        if options.github:
            engine = str(options.engines[0])
            typer.echo(reports.annotation("warning", reports.SUITE, engine, str(error)))
        if options.junit is not None:
            now = datetime.now(timezone.utc).isoformat()
            write_whole(options.junit, reports.junit_refused(options.engines, str(error), now))
        raise typer.Exit(UNDECIDED) from error
    except HardwareError as error:
        print_error(error)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        err.print("Interrupted before anything was measured.")
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def _understood() -> Iterator[None]:
    """Make a value that means nothing a usage error, exit code 2."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _state_folder() -> Path:
    """Return where programs keep what outlasts them, by the XDG rules."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "espalier"

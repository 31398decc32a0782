"""What the terminal shows: rich tables of records, and the progress of stages. Prints nothing."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType

from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from hardware.channels import ChannelMap
from pipeline import wording
from pipeline.records import Floor, Plan, Verdict

Told = Callable[[int, int, str], None]
"""How a loop tells how far it is: steps done, steps in all (0: not known), and what it is at."""

_HEARTBEAT_S = 60.0  # a log without bars says at least this often that a long stage lives


def verdict_table(verdict: Verdict) -> RenderableType:
    """Return before, after and limit of everything that a verdict promises."""
    outcome = (
        Text("passed", style="bold green") if verdict.passed else Text("missed", style="bold red")
    )
    setting = (
        f"{wording.runtime_name(verdict.runtime)}, {verdict.precision}, batch {verdict.batch}, "
    )
    table = _table(Text.assemble("Verdict: ", outcome))
    table.caption = Text(f"{setting}{verdict.threads} thread{'s' if verdict.threads != 1 else ''}")
    table.add_column("")
    for heading in ("before", "after"):
        table.add_column(heading, justify="right")
    table.add_column("")
    low, high = verdict.speedup_interval
    drop = verdict.accuracy_pct - verdict.baseline_accuracy_pct
    rows = (
        (
            "latency",
            wording.ms(verdict.baseline_ms),
            wording.ms(verdict.measured_ms),
            f"target {wording.ms(verdict.target_ms)}, predicted {wording.ms(verdict.predicted_ms)}",
        ),
        (
            "speed-up",
            "",
            wording.times(verdict.speedup),
            f"{wording.times(low)} to {wording.times(high)}",
        ),
        (
            "accuracy",
            wording.pct(verdict.baseline_accuracy_pct),
            wording.pct(verdict.accuracy_pct),
            f"{wording.signed(drop)} points on {verdict.test_images:,} test images",
        ),
        ("multiply-adds", *map(wording.many, verdict.macs), wording.change(verdict.macs)),
        ("parameters", *map(wording.many, verdict.parameters), wording.change(verdict.parameters)),
        ("parity", "", wording.tiny(verdict.parity), "engine against torch"),
        ("proof", "", wording.tiny(verdict.proof_error), "removed against masked"),
    )
    for row in rows:
        table.add_row(*row)
    table.add_section()
    for holds, text in map(wording.limit, verdict.reasons):
        mark = {
            True: Text("held", style="green"),
            False: Text("missed", style="red"),
            None: Text(""),
        }
        table.add_row("limit", "", mark[holds], Text(text))
    return Group(table, "", _files([verdict]))


def comparison_table(verdicts: Sequence[Verdict]) -> RenderableType:
    """Return one row per verdict, the same network on several runtimes, and where the files are."""
    table = _table("Before and after, as measured on this machine")
    for heading in ("runtime", "verdict"):
        table.add_column(heading)
    for heading in ("before, ms", "after, ms", "speed-up", "accuracy, %"):
        table.add_column(heading, justify="right", no_wrap=True)
    for verdict in verdicts:
        before, _, after = wording.ms_pair((verdict.baseline_ms, verdict.measured_ms), "→").split()[
            :3
        ]
        table.add_row(
            Text(wording.runtime_name(verdict.runtime)),
            Text("passed", style="green") if verdict.passed else Text("missed", style="red"),
            before,
            after,
            wording.times(verdict.speedup),
            " → ".join(
                wording.fixed(value, 2)
                for value in (verdict.baseline_accuracy_pct, verdict.accuracy_pct)
            ),
        )
    return Group(table, "", _files(verdicts))


def plan_table(
    plan: Plan, floors: Sequence[Floor] = (), saved_us: Mapping[str, float] | None = None
) -> Table:
    """Return the width of every group with the reason for it.

    Args:
        plan: what to show.
        floors: their details are shown where the plan gives none.
        saved_us: per group the microseconds that its new width saves; None leaves the column out.
    """
    details = {floor.group: floor.detail for floor in floors}
    table = _table(
        f"Plan: {wording.ms_pair((plan.baseline_ms, plan.predicted_ms), '→')} predicted, "
        f"target {wording.ms(plan.target_ms)}"
    )
    table.caption = Text(
        f"objective {plan.objective}, gap {wording.number(100 * plan.gap)} %, solved in "
        f"{wording.duration(plan.solver_s)}, "
        f"{'every latency measured' if plan.measured else 'some latencies ESTIMATED'}"
    )
    table.add_column("group", overflow="fold", ratio=3)
    for heading in ("width", "floor", *(("saved, µs",) if saved_us is not None else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("reason", overflow="fold", ratio=5)
    for choice in plan.choices:
        detail = choice.detail or details.get(choice.group, "")
        frozen = choice.reason.startswith("frozen")
        cells = [
            wording.layer_of(choice.group),
            _widths(choice.full, choice.width),
            "" if frozen else str(choice.floor),
        ]
        if saved_us is not None:
            cells.append(wording.us(saved_us[choice.group]) if choice.group in saved_us else "")
        reason = Text.assemble(choice.reason, (f": {detail}" if detail else "", "dim"))
        table.add_row(*map(Text, cells), reason, style="dim" if frozen else None)
    return table


def groups_table(channels: ChannelMap, floors: Sequence[Floor] | None = None) -> Table:
    """Return every pruning group with its coupled layers, its floor, and whether it is frozen."""
    known = {floor.group: floor for floor in floors or ()}
    groups, prunable = channels.groups, channels.prunable
    table = _table(f"{len(groups)} pruning groups, {len(prunable)} may be pruned")
    table.add_column("group", overflow="fold", ratio=3)
    table.add_column("width", justify="right")
    if floors is not None:
        table.add_column("floor", justify="right")
    table.add_column("produced by", justify="right")
    table.add_column("read by", justify="right")
    table.add_column("", overflow="fold", ratio=4)
    for group in groups:
        cells = [wording.layer_of(group.name), str(group.width)]
        if floors is not None:
            cells.append(str(known[group.name].floor) if group.name in known else "")
        cells += [_layers(len(group.producers)), _layers(len(group.consumers))]
        note = f"frozen: {group.frozen}" if group.frozen else ""
        if group.mixes:
            note = " ".join(filter(None, (note, f"{group.mixes} mixes its channels")))
        elif not note and group.name in known:
            note = known[group.name].detail
        table.add_row(*map(Text, (*cells, note)), style="dim" if group.frozen else None)
    return table


def frozen_table(channels: ChannelMap) -> Table:
    """Return the channels that may not be pruned, one row per reason and place."""
    table = _table("Frozen channels")
    if channels.unknown_operators:
        names = ", ".join(
            f"{name} ({count}×)" for name, count in channels.unknown_operators.items()
        )
        table.caption = Text(f"operators without a rule: {names}")
    table.add_column("where", overflow="fold", ratio=2)
    table.add_column("channels", justify="right")
    table.add_column("reason", overflow="fold", ratio=3)
    for group in channels.groups:
        if group.frozen is not None:
            table.add_row(
                *map(Text, (wording.layer_of(group.name), str(group.width), group.frozen))
            )
    for axis in channels.frozen:
        table.add_row(
            *map(Text, (wording.layer_of(axis.parameter), str(axis.channels), axis.reason))
        )
    return table


def devices_table(rows: Sequence[tuple[str, str, str, str | None]]) -> Table:
    """Return what can be measured here.

    Args:
        rows: runtime, version, device, and what is missing (None: ready).
    """
    table = _table("Runtimes on this machine")
    for heading in ("runtime", "version", "device"):
        table.add_column(heading, overflow="fold")
    table.add_column("", overflow="fold", ratio=1)
    for runtime, version, device, missing in rows:
        state = Text("ready", style="green") if missing is None else Text(missing, style="yellow")
        table.add_row(*map(Text, (runtime, version, device)), state)
    return table


class StageProgress(AbstractContextManager["StageProgress"]):
    """Progress of one stage after another: bars with the time left, or lines in a log.

    On a terminal every stage has a bar. Elsewhere (a pipe, a file, CI) every stage is one line
    when it is done, and a line a minute while it takes longer.

        with StageProgress(console) as stages, stages.stage("fine-tuning") as told:
            told(3, 10, "accuracy 91.2 %")

    Args:
        console: where to; standard error by default, because results go to standard output.
        bars: whether to draw bars; None finds out.
    """

    def __init__(self, console: Console | None = None, bars: bool | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bars = _draws_bars(self._console) if bars is None else bars
        self._progress = Progress(
            SpinnerColumn(finished_text=Text("✓", style="green")),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[text]}", style="dim", markup=False),
            console=self._console,
            redirect_stdout=False,  # results keep going to standard output
            redirect_stderr=self._bars,
            disable=not self._bars,
        )

    def __enter__(self) -> "StageProgress":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    @contextmanager
    def stage(self, name: str) -> Iterator[Told]:
        """Show one stage while the block runs; yields what its loop reports to."""
        with self._bar(name) if self._bars else self._lines(name) as told:
            yield told

    @contextmanager
    def _bar(self, name: str) -> Iterator[Told]:
        task: TaskID = self._progress.add_task(name, total=None, text="")

        def told(done: int, total: int, text: str) -> None:
            self._progress.update(task, completed=done, total=total or None, text=text)

        yield told
        # Reached only when the stage ended well: a stage that failed keeps its unfinished bar.
        total = self._progress.tasks[self._progress.task_ids.index(task)].total or 1
        self._progress.update(task, completed=total, total=total)

    @contextmanager
    def _lines(self, name: str) -> Iterator[Told]:
        begun = spoken = time.perf_counter()
        last = ""

        def told(done: int, total: int, text: str) -> None:
            nonlocal spoken, last
            last = text
            now = time.perf_counter()
            if now - spoken >= _HEARTBEAT_S:
                spoken = now
                left = _time_left(now - begun, done, total)
                self._line(f"{name}: {done} of {total or '?'}{left}, {text}")

        try:
            yield told
        except BaseException:
            self._line(f"{name}: stopped after {wording.duration(time.perf_counter() - begun)}")
            raise
        took = wording.duration(time.perf_counter() - begun)
        self._line(f"{name}: done in {took}{', ' if last else ''}{last}")

    def _line(self, text: str) -> None:
        self._console.print(text.rstrip(" ,"), markup=False, highlight=False, soft_wrap=True)


def _draws_bars(console: Console) -> bool:
    """Return whether bars can move: on a real terminal, not in a CI job that claims to be one."""
    return console.is_interactive and console.file.isatty() and not os.environ.get("CI")


def _time_left(elapsed_s: float, done: int, total: int) -> str:
    if not (0 < done < total):
        return ""
    return f", about {wording.duration(elapsed_s / done * (total - done))} left"


def _table(title: str | Text) -> Table:
    return Table(
        title=title,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        pad_edge=False,
        show_edge=False,
    )


def _widths(full: int, width: int) -> str:
    return str(full) if width == full else f"{full} → {width}"


def _layers(count: int) -> str:
    return f"{count} layer{'s' if count != 1 else ''}"


def _files(verdicts: Sequence[Verdict]) -> Table:
    """Return where engines and reports are, a line each: a path is never squeezed into a column."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for verdict in verdicts:
        name = wording.runtime_name(verdict.runtime)
        grid.add_row(Text(f"{name} engine"), Text(verdict.engine))
        grid.add_row(Text(f"{name} report"), Text(verdict.report))
    return grid

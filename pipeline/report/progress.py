"""The progress of one stage after another: bars on a terminal, lines in a log. On stderr."""

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType

from rich import progress as bars
from rich.console import Console
from rich.table import Column
from rich.text import Text

from pipeline import wording
from pipeline.records import Progress

_HEARTBEAT_S = 60.0  # a log without bars has a line of a long stage at least this often


class StageProgress(AbstractContextManager["StageProgress"]):
    """Progress of one stage after another: bars with the time left, or lines in a log.

    On a terminal every stage has a bar. Elsewhere (a pipe, a file, CI) every stage is one line
    when it is done, and a line a minute while it takes longer.

        with StageProgress(console) as stages, stages.stage("fine-tuning") as progress:
            progress(3, 10, "accuracy 91.2 %")

    Args:
        console: where to; standard error by default, because results go to standard output.
        draws_bars: whether bars are drawn; None finds out.
    """

    def __init__(self, console: Console | None = None, draws_bars: bool | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bars = _draws_bars(self._console) if draws_bars is None else draws_bars
        self._progress = bars.Progress(
            bars.SpinnerColumn(finished_text=Text("✓", style="green")),
            bars.TextColumn("{task.description}", markup=False, table_column=_fixed(None)),
            bars.BarColumn(bar_width=14, table_column=_fixed(14)),
            bars.TextColumn("{task.percentage:>3.0f} %", table_column=_fixed(5)),
            bars.TimeRemainingColumn(
                compact=True, elapsed_when_finished=True, table_column=_fixed(5)
            ),
            bars.TextColumn(
                "{task.fields[text]}",
                style="dim",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
            ),
            expand=True,
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
    def stage(self, name: str) -> Iterator[Progress]:
        """Show one stage while the block runs; yields what its loop reports to."""
        with self._bar(name) if self._bars else self._lines(name) as progress:
            yield progress

    @contextmanager
    def _bar(self, name: str) -> Iterator[Progress]:
        task: bars.TaskID = self._progress.add_task(name, total=None, text="")

        def report(done: int, total: int, text: str) -> None:
            self._progress.update(task, completed=done, total=total or None, text=text)

        yield report
        # Reached only when the stage ended well: a stage that failed keeps its unfinished bar.
        total = self._progress.tasks[self._progress.task_ids.index(task)].total or 1
        self._progress.update(task, completed=total, total=total)

    @contextmanager
    def _lines(self, name: str) -> Iterator[Progress]:
        begun = printed = time.perf_counter()
        last = ""

        def report(done: int, total: int, text: str) -> None:
            nonlocal printed, last
            last = text
            now = time.perf_counter()
            if now - printed >= _HEARTBEAT_S:
                printed = now
                left = _time_left(now - begun, done, total)
                self._line(f"{name}: {done} of {total or '?'}{left}, {text}")

        try:
            yield report
        except BaseException:
            self._line(f"{name}: stopped after {wording.duration(time.perf_counter() - begun)}")
            raise
        took = wording.duration(time.perf_counter() - begun)
        self._line(f"{name}: done in {took}{', ' if last else ''}{last}")

    def _line(self, text: str) -> None:
        self._console.print(text.rstrip(" ,"), markup=False, highlight=False, soft_wrap=True)


def _fixed(min_width: int | None) -> Column:
    """Return a column that keeps its width where the line is too short for all."""
    return Column(no_wrap=True, min_width=min_width)


def _draws_bars(console: Console) -> bool:
    """Return whether bars can move: on a real terminal, not in a CI job that claims to be one."""
    return console.is_interactive and console.file.isatty() and not os.environ.get("CI")


def _time_left(elapsed_s: float, done: int, total: int) -> str:
    if not (0 < done < total):
        return ""
    return f", about {wording.duration(elapsed_s / done * (total - done))} left"

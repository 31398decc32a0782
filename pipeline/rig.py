"""What measures on this machine: a runtime with its settings, and the file of its latency table."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx

from hardware.graph.carve import carve, keep_first
from hardware.intervals import Interval
from hardware.latency import sweep as sweeping
from hardware.latency.end_to_end import LOADS, PLAN_PROTOCOL, Timing, time_engines
from hardware.latency.table import LatencyTable, TableKey, load_table, open_table
from hardware.latency.variant import Template
from hardware.lock import file_lock, machine_lock
from hardware.runtimes import check_measurable, get_runtime
from hardware.runtimes.base import Engine, EngineSettings, Runtime
from pipeline.networks.analyse import Subject
from pipeline.recipe import Recipe
from pipeline.records import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Rig:
    """What measures, and where the table lies that it fills.

    The table is never kept beside its file: whatever measures reads it, adds to it and saves it
    while it holds the table's lock, so that nothing that was measured is lost. While anything is
    measured, the machine's lock is held as well.
    """

    runtime: Runtime
    settings: EngineSettings
    key: TableKey
    path: Path
    minutes: float  # that a sweep takes at most

    def table(self) -> LatencyTable:
        """Return the table as it lies in its file, empty where there is none yet."""
        if not self.path.exists():
            return LatencyTable(key=self.key)
        return load_table(self.path, self.key)

    def profile(
        self,
        subject: Subject,
        candidates: Mapping[str, tuple[int, ...]],
        seed: int,
        progress: Progress,
    ) -> LatencyTable:
        """Return the table with every layer of the network measured at designed widths."""
        with self._measuring("the layers of a network"):
            goal = sweeping.Goal(candidates=candidates, minutes=self.minutes, seed=seed)
            return sweeping.sweep(self._place(subject), goal, self.table(), progress)

    def measure(self, subject: Subject, widths: Mapping[str, int]) -> tuple[LatencyTable, Interval]:
        """Return the table with one narrowed network more, and what share of the latency that took.

        Both networks were timed in turns, so their ratio is free of what slows the machine down.
        """
        with self._measuring("a planned network"):
            table, variant = sweeping.measure(self._place(subject), widths, self.table())
            table.save(self.path)
        took, full_ms = variant.end_to_end, variant.full_ms
        return table, Interval(
            took.median_ms / full_ms, took.low_ms / full_ms, took.high_ms / full_ms
        )

    def confirm(self, subject: Subject, widths: Mapping[str, int]) -> Interval:
        """Return what share of the latency a narrowed network takes, several loads of each timed.

        A plan is chosen because its one measurement was low, so that is low by chance as a rule.
        """
        narrowed = carve(subject.template, subject.channels, keep_first(subject.channels, widths))
        full, plan = self.loads(subject.template), self.loads(narrowed)
        with machine_lock("measuring a planned network", wait_s=math.inf):
            speedup = time_engines(full, plan, protocol=PLAN_PROTOCOL).speedup
        return Interval(1 / speedup.estimate, 1 / speedup.high, 1 / speedup.low)

    def baseline_ms(self, subject: Subject) -> float:
        """Return what the full network takes now, milliseconds."""
        engine = self.runtime.build(subject.template, self.settings)
        return self.compare([engine], [engine]).baseline.median_ms

    def compare(
        self,
        baselines: Sequence[Engine],
        delivered: Sequence[Engine],
        progress: Progress | None = None,
    ) -> Timing:
        """Return the latencies of two networks, several loads of each, timed in turns."""
        with machine_lock("measuring two engines in turns", wait_s=math.inf):
            return time_engines(baselines, delivered, progress)

    def loads(self, model: onnx.ModelProto) -> list[Engine]:
        """Return engines of one model: two loads of it differ for as long as they live."""
        return [self.runtime.build(model, self.settings) for _ in range(LOADS)]

    def _place(self, subject: Subject) -> sweeping.Place:
        """Return where a network is measured: as its template, on the device, into the table."""
        template = Template(
            model=subject.template, channels=subject.channels, layers=subject.layers
        )
        return sweeping.Place(
            template=template, runtime=self.runtime, settings=self.settings, path=self.path
        )

    @contextmanager
    def _measuring(self, what: str) -> Iterator[None]:
        """Hold the table and the machine; wait for them, because a run may have trained for hours.

        Raises:
            StorageError: a lock's file cannot be opened.
        """
        purpose = f"measuring {what} into {self.path}"
        with (
            file_lock(self.path, purpose, wait_s=math.inf),
            machine_lock(purpose, wait_s=math.inf),
        ):
            yield


def open_rig(recipe: Recipe) -> Rig:
    """Return what measures the recipe's network, after checking the table that is there.

    Raises:
        RuntimeMissingError: the runtime is unknown, or not installed.
        BuildError: the runtime cannot tell what layers take.
        StorageError: the table is damaged.
        DeviceMismatchError: the table was measured on another device, runtime or setting.
    """
    target = recipe.target
    runtime = get_runtime(target.runtime)
    settings = EngineSettings(precision=target.precision, threads=target.threads)
    check_measurable(runtime, settings)
    table, path = open_table(recipe.profiles, target.table, runtime, settings, target.batch)
    return Rig(
        runtime=runtime,
        settings=settings,
        key=table.key,
        path=path,
        minutes=target.table_minutes,
    )

"""Tables from nothing, plans they never saw, and the same sweep twice."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx

from benchmarks.fidelity.isolated import IsolatedTable
from benchmarks.fidelity.records import Coverage, PlanTimes
from benchmarks.fidelity.subjects import Candidates
from benchmarks.neighbours import neighbour
from benchmarks.quiet import READINGS_IN_A_ROW, SharedMemory
from hardware.graph.carve import carve, keep_first
from hardware.latency.layers import macs_of
from hardware.latency.predict import predict_plan_ms
from hardware.latency.references import References, narrow_widths
from hardware.latency.spreads import spread_of
from hardware.latency.sweep import complete_widths, digest_of, sweep
from hardware.latency.table import STEADY_PACE, LatencyTable, key_of, load_table
from hardware.latency.variant import ANCHORS, beside_of
from hardware.runtimes.base import Engine, EngineSettings, Runtime
from hardware.timing import Protocol, time_together
from pipeline.networks.analyse import Subject

Progress = Callable[[int, int, str], None]

BESIDE = range(4, 10)  # variants beside which a neighbour spins, where one is asked for
# Every plan is measured at so many moments, minutes apart, each time with engines loaded anew: two
# engines of one model differ by 3 % and more, and what else the hardware does hits small networks
# otherwise than large ones, for minutes.
PASSES = 3
# Where the machine is not as it was for the table, a plan is measured again, for so long in one
# pass; and after the passes, plans that never met the table's pace, as long as patience lasts.
PATIENCE_S = 10.0
CALM_S = 300.0  # a sweep begins in a quiet moment, if there is one within this
PROTOCOL = Protocol(
    warmup_s=0.2,
    min_samples=10,
    max_samples=100,
    max_seconds=1.0,
    relative_width=0.005,
    min_sample_us=5000.0,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What measures, and how."""

    runtime: Runtime
    settings: EngineSettings
    seed: int
    memory: SharedMemory = field(default_factory=SharedMemory)
    minutes: float = 1.0  # of measuring a table
    patience_s: float = 90.0  # of waiting for the table's pace, all plans together


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """A table after a sweep, and what the sweep cost."""

    table: LatencyTable
    builds: int
    seconds: float
    noticed: int | None = None  # variants that were marked while a neighbour spun


def build_table(
    subject: Subject, candidates: Candidates, setting: Setting, path: Path, progress: Progress
) -> Swept:
    """Sweep a network into the table at that path, which may hold others or nothing yet."""
    key = key_of(setting.runtime, setting.settings, 1)
    if not path.exists():
        progress(0, 1, "waiting for a quiet moment")
        setting.memory.wait(CALM_S, readings=READINGS_IN_A_ROW)
    start = time.perf_counter()
    table = load_table(path, key) if path.exists() else LatencyTable(key=key)
    before = len(table.variants)
    table = sweep(
        subject.template,
        subject.channels,
        subject.layers,
        candidates,
        setting.runtime,
        setting.settings,
        table,
        path,
        minutes=setting.minutes,
        seed=setting.seed,
        progress=progress,
    )
    seconds = time.perf_counter() - start
    return Swept(table=table, builds=len(table.variants) - before, seconds=seconds)


def build_beside_neighbour(
    subject: Subject, candidates: Candidates, setting: Setting, path: Path, progress: Progress
) -> Swept:
    """Build a table while a process spins on one core beside some of its variants."""
    noticed = 0

    def told(done: int, total: int, text: str) -> None:
        nonlocal noticed
        if done == BESIDE.start:
            beside.enter_context(neighbour())
        elif done == BESIDE.stop:
            beside.close()
            noticed = sum(variant.is_crowded for variant in load_table(path).variants)
        progress(done, total, text)

    with ExitStack() as beside:
        swept = build_table(subject, candidates, setting, path, told)
    return replace(swept, noticed=noticed)


def measure_plans(
    subject: Subject,
    plans: Sequence[tuple[str, Mapping[str, int]]],
    table: LatencyTable,
    setting: Setting,
    isolated: IsolatedTable,
    progress: Progress,
) -> list[PlanTimes]:
    """Return what each plan was predicted to take and took, two networks beside every one.

    The first is the full network itself. All times are at the table's pace: what is measured now
    is divided by how much slower than in the table the full network and the narrow one are now
    (`hardware.latency.references`). What a plan took is the median of several passes over all
    plans, without those in which the machine was slower or faster, or others used the memory, as
    far as there are others.
    """
    usual = table.references(digest_of(subject.template))
    whole = complete_widths(subject.channels, {})
    ms_per_mac = usual.full_ms / macs_of(subject.layers, whole)
    named = [("full", whole), *plans]
    passes, alone_ms = _all_passes(subject, named, usual, setting, isolated, progress)
    return [
        PlanTimes(
            name=name,
            widths=widths,
            predicted_ms=predict_plan_ms(table, subject.layers, widths),
            measured_ms=at_table_pace(found),
            passes_ms=tuple(one.ms for one in found),
            paces=tuple(round(one.pace, 4) for one in found),
            quiet=tuple(one.is_quiet for one in found),
            is_at_pace=any(one.is_at_pace for one in found),
            isolated_ms=alone,
            macs_ms=ms_per_mac * macs_of(subject.layers, widths),
            macs=macs_of(subject.layers, widths),
        )
        for (name, widths), found, alone in zip(named, passes, alone_ms, strict=True)
    ]


def _all_passes(
    subject: Subject,
    named: Sequence[tuple[str, Mapping[str, int]]],
    usual: References,
    setting: Setting,
    isolated: IsolatedTable,
    progress: Progress,
) -> tuple[list[list["Pass"]], list[float]]:
    """Return every pass over each plan, and the sum of its layers timed alone."""
    runtime, settings = setting.runtime, setting.settings
    narrow = _carved(subject, narrow_widths(subject.channels))
    alone_ms: list[float] = []
    passes: list[list[Pass]] = [[] for _ in named]
    patience_s, turn = setting.patience_s, 0
    due = list(range(len(named)))
    while due and (turn < PASSES or patience_s > 0):
        anchors = [runtime.build(subject.template, settings) for _ in range(ANCHORS)]
        narrows = [runtime.build(narrow, settings) for _ in range(ANCHORS)]
        for place, number in enumerate(due):
            name, widths = named[number]
            engine = runtime.build(_carved(subject, widths), settings)
            anchors = [*anchors[1:], runtime.build(subject.template, settings)]
            narrows = [*narrows[1:], runtime.build(narrow, settings)]
            start, waits_s = time.monotonic(), min(patience_s, PATIENCE_S)
            found = _at_pace(setting, [anchors, narrows, [engine]], usual, waits_s)
            passes[number].append(found)
            if turn >= PASSES or not found.is_at_pace:
                patience_s = max(patience_s - (time.monotonic() - start), 0.0)
            if not turn:
                alone_ms.append(isolated.sum_ms(subject.layers, widths, found.pace))
            done = min(turn, PASSES - 1) * len(named) + place + 1
            progress(done, PASSES * len(named), f"{name}: measured {found.ms:.4g} ms")
        turn += 1
        if turn >= PASSES:
            due = [number for number in due if not any(one.is_at_pace for one in passes[number])]
    return passes, alone_ms


def _carved(subject: Subject, widths: Mapping[str, int]) -> onnx.ModelProto:
    return carve(subject.template, subject.channels, keep_first(subject.channels, widths))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One measurement of a plan, and how the machine was meanwhile."""

    ms: float  # at the table's pace
    pace: float  # how much slower than for the table a network of this time ran
    is_quiet: bool = True  # others left the memory alone

    @property
    def is_at_pace(self) -> bool:
        """Whether the machine was as it was for the table, as far as can be told."""
        return self.is_quiet and abs(self.pace - 1) <= STEADY_PACE


def at_table_pace(passes: Sequence[Pass]) -> float:
    """Return the median of the passes at the table's pace; where there are none, of the nearest."""
    quiet = [one for one in passes if one.is_quiet] or passes
    most = max(STEADY_PACE, min(abs(one.pace - 1) for one in quiet))
    return float(np.median([one.ms for one in quiet if abs(one.pace - 1) <= most]))


def _at_pace(
    setting: Setting,
    engines: Sequence[Sequence[Engine]],
    usual: References,
    patience_s: float,
) -> Pass:
    """Time a plan beside full and narrow networks, again while the machine is not as for the table.

    Only these two and the memory are asked for that: whether it is measured again, and which
    measurement counts, does not depend on how far the plan's time is from what was predicted.

    Args:
        setting: what measures.
        engines: of the full network, of the narrow one, and of the plan.
        usual: what the first two take at the table's pace.
        patience_s: of measuring again.
    """
    runtime = setting.runtime
    feeds = engines[0][0].random_feeds()
    timers = [[engine.timer(feeds) for engine in same] for same in engines]
    takes: list[Pass] = []
    start = time.monotonic()
    while not takes or time.monotonic() - start < patience_s:
        setting.memory.wait(patience_s)
        full, narrow, plan = time_together(
            timers, PROTOCOL, seed=len(takes), foreign_s=lambda: runtime.counters().foreign_s
        )
        ms = plan.latency.median_ms
        pace = beside_of(plan, full, narrow).slowdown(usual, ms)
        takes.append(Pass(ms=ms / pace, pace=pace, is_quiet=setting.memory.is_quiet()))
        if takes[-1].is_at_pace:
            break
    return min(takes, key=lambda take: (not take.is_quiet, abs(take.pace - 1)))


def coverage_of(first: LatencyTable, again: Swept, digest: str) -> Coverage:
    """Return how often the second table's figures lie in the first's intervals, at one pace.

    Args:
        first: whose intervals are asked.
        again: the same sweep once more.
        digest: of the network's template.
    """
    second, spread = again.table, spread_of(first)
    pace = first.anchors_ms[digest] / second.anchors_ms[digest]
    entries, entry_changes = [], []
    for entry in first.entries:
        other = second.by_key.get(entry.key)
        if other is not None and entry.median_us > 0:
            entries.append(spread.of_entry(entry).contains(pace * other.median_us))
            entry_changes.append(abs(pace * other.median_us / entry.median_us - 1))
    others = {tuple(sorted(v.widths.items())): v for v in second.variants if v.template == digest}
    variants, variant_changes = [], []
    for variant in first.variants:
        same = others.get(tuple(sorted(variant.widths.items())))
        if variant.template == digest and same is not None:
            now_ms = same.end_to_end.median_ms / same.beside.slowdown(
                variant.beside, same.end_to_end.median_ms
            )
            variants.append(spread.of_variant(variant).contains(now_ms))
            variant_changes.append(abs(now_ms / variant.end_to_end.median_ms - 1))
    return Coverage(
        entries=len(entries),
        entries_covered_pct=_pct(entries),
        variants=len(variants),
        variants_covered_pct=_pct(variants),
        entry_change_pct=round(100 * float(np.median(entry_changes)), 3),
        variant_change_pct=round(100 * float(np.median(variant_changes)), 3),
        noticed_variants=again.noticed,
        beside_variants=len(BESIDE) if again.noticed is not None else None,
    )


def _pct(said: Sequence[bool]) -> float:
    return round(100 * float(np.mean(said)), 1)

"""Choose which engines are compared: equal ones, and true slow-downs found by measuring."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from benchmarks.gate.engines import Build
from hardware.errors import RunError
from hardware.gate.bench import Rules, bench
from hardware.gate.sample import Schedule
from hardware.gate.session import Measurement, whole
from hardware.intervals import Interval, median_interval
from hardware.records import Record

SLOWER_PCT = (3, 5, 10)
EQUAL = (
    Build(),
    Build(size_px=28),
    Build(threads=2),
)  # engines that are benched against themselves
WIDER = [
    Build(widened=widened, more=more)
    for more, widened in product((4, 8, 16), (1, 2, 3, 4, 5, 6, 8, 10))
]
SIZES_PX = (3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20)
FINDING = 6  # budgets of one bench that finding the slow-downs of one kind may take


class SlowDown(Record):
    """Two builds of which the second is slower, as measured once, before the runs."""

    baseline: Build
    candidate: Build
    slower_pct: float
    low_pct: float  # 95 % interval
    high_pct: float


class Found(Record):
    """The slow-downs of one runtime by the percentage that they are called."""

    by_channels: dict[int, SlowDown]
    by_threads: dict[int, SlowDown | None]  # None: no size was slower by about that much


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison that is to be made."""

    kind: str  # "aa", "3", "5", "10", "threads 3", ...
    beside: bool  # whether a neighbour spins meanwhile
    runtime: str
    baseline: Build
    candidate: Build


def find_slow_downs(runtime: str, budget_s: float, folder: Path) -> Found:
    """Measure many builds side by side and return those that are slower by about each percentage.

    The least slow-down is chosen that is certainly (at 95 %) as large as it is called, so that not
    finding it is a fault of the gate.

    Raises:
        RunError: no wider network is slower by about that much.
    """
    wider, counted = by_channels(runtime, budget_s, folder), by_threads(runtime, budget_s, folder)
    least = {percent: _least(wider, percent) for percent in SLOWER_PCT}
    found = {percent: one for percent, one in least.items() if one is not None}
    if len(found) < len(SLOWER_PCT):
        known = (f"{s.slower_pct:.1f} ({s.low_pct:.1f} to {s.high_pct:.1f})" for s in wider)
        raise RunError(
            f"{runtime}: no network is slower by a little more than each of {SLOWER_PCT} %. "
            f"Measured: {', '.join(known)} %. Intervals this wide come from a busy machine: wait "
            "until it is quiet."
        )
    return Found(
        by_channels=found,
        by_threads={percent: _least(counted, percent) for percent in SLOWER_PCT},
    )


def by_channels(runtime: str, budget_s: float, folder: Path) -> list[SlowDown]:
    """Return how much slower networks with a few channels more are."""
    first, *others = _measured([Build(), *WIDER], runtime, budget_s, folder)
    return [_slow_down(Build(), first, b, m) for b, m in zip(WIDER, others, strict=True)]


def by_threads(runtime: str, budget_s: float, folder: Path) -> list[SlowDown]:
    """Return how much slower networks of several sizes are on one thread than on two, and back."""
    builds = [Build(size_px=size, threads=threads) for size in SIZES_PX for threads in (1, 2)]
    took = _measured(builds, runtime, budget_s, folder)
    found = []
    for index in range(0, len(builds), 2):
        (one, two), (alone, both) = builds[index : index + 2], took[index : index + 2]
        found += [_slow_down(two, both, one, alone), _slow_down(one, alone, two, both)]
    return found


def _measured(
    builds: Sequence[Build], runtime: str, budget_s: float, folder: Path
) -> tuple[Measurement, ...]:
    """Return what all builds take in turns; without a baseline the whole budget is spent."""
    engines = [build.engine_file(runtime, folder) for build in builds]
    return bench(engines, None, Rules(schedule=Schedule(budget_s=FINDING * budget_s))).measurements


def _slow_down(baseline: Build, fast: Measurement, candidate: Build, slow: Measurement) -> SlowDown:
    units = zip(slow.units, fast.units, strict=True)
    ratios = [100 * (whole("p50", [ours]) / whole("p50", [theirs]) - 1) for ours, theirs in units]
    found = median_interval(ratios)
    bounded = Interval(found.estimate, max(found.low, min(ratios)), min(found.high, max(ratios)))
    return SlowDown(
        baseline=baseline,
        candidate=candidate,
        slower_pct=bounded.estimate,
        low_pct=bounded.low,
        high_pct=bounded.high,
    )


def _least(found: Sequence[SlowDown], percent: int) -> SlowDown | None:
    """Return the least slow-down that is certainly one of `percent`; None where it is much more."""
    above = [one for one in found if percent <= one.low_pct and one.slower_pct <= 1.7 * percent]
    return min(above, key=lambda one: one.slower_pct, default=None)


def plan(aa_runs: int, runs: int, found: dict[str, Found]) -> list[Case]:
    """Return all runs, the kinds mixed evenly, so that whatever is done at a moment is balanced.

    Another thread count is benched without the neighbour only: beside one, two threads are slower
    than one, and nobody has measured by how much.
    """
    runtimes = sorted(found)
    drawn: list[tuple[float, Case]] = []
    equal = list(product(EQUAL, runtimes))
    for index, beside in product(range(aa_runs), (False, True)):
        build, runtime = equal[index % len(equal)]
        drawn.append((index / aa_runs, Case("aa", beside, runtime, build, build)))
    for index, percent in product(range(runs), SLOWER_PCT):
        runtime = runtimes[index % len(runtimes)]
        wider, counted = found[runtime].by_channels[percent], found[runtime].by_threads[percent]
        for pair, kind, besides in (
            (wider, str(percent), (False, True)),
            (counted, f"threads {percent}", (False,)),
        ):
            if pair is not None:
                drawn += [
                    (index / runs, Case(kind, beside, runtime, pair.baseline, pair.candidate))
                    for beside in besides
                ]
    return [case for _, case in sorted(drawn, key=lambda entry: entry[0])]

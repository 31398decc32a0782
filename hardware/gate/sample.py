"""Sample several engines side by side: load them all, time them in turns, load them anew, ...

Everything that could favour one of them is drawn by lot: the order of loading, anew for every
load, and the order of the turns, anew for every round. The turns are those of `hardware.timing`.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from hardware.records import Record
from hardware.timing import (
    Recorder,
    Timer,
    Turn,
    calls_per_sample,
    fill_caches,
    play_round,
    warm_up,
    without_garbage_collection,
)

UNITS = 40  # that a budget is meant to give; fewer where loading is slow
LOADS = 24  # of the engines that a budget pays for at half its time, at the least
TURN_S = 0.01  # of one engine's samples in a turn: short, so that both see the same machine
TURN_SAMPLES = 8  # in one turn, at most
LEAST_SAMPLE_US = 50.0  # shorter inferences are repeated within a sample: the clock costs 0.1 us
WARM_UP_S = 0.01  # of inferences after the first one, before the first turn, at most
SWEPT_BYTES = 64 << 20  # written before each sample where caches are to be cold


class UnitSamples(Record):
    """What one engine took in one unit."""

    load: int  # number of the load in which it was measured, from 0
    load_ms: float
    first_ms: float  # the first inference after loading
    samples_ms: tuple[float, ...]


Unit = tuple[UnitSamples, ...]  # one per engine, in the order given


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine that is ready to be timed, and how long loading took."""

    load_ms: float
    timer: Timer


Loader = Callable[[], Loaded]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long to sample, and from which caches."""

    budget_s: float = 60.0
    is_cold: bool = False  # evict the caches before every sample

    def __post_init__(self) -> None:
        if not 0 < self.budget_s < float("inf"):
            raise ValueError(f"A budget is a positive time; got {self.budget_s} s.")


def sample_units(
    loaders: Sequence[Loader],
    schedule: Schedule,
    *,
    seed: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Unit]:
    """Yield one unit after the other until the budget is spent; stop whenever enough is known.

    A unit is a stretch of rounds in which every engine has one turn. Engines are loaded anew for
    every unit, so that a lucky layout of memory is drawn again, and is one witness among many.
    Where that would take more than half the time, several units share a load.

    Args:
        loaders: load the engines, anew at each call.
        schedule: the budget, and whether caches are cold.
        seed: of all orders; None: by chance.
        clock: seconds, of whatever origin.

    Raises:
        HardwareError: an engine does not load, or failed while it ran.
    """
    generator = np.random.default_rng(seed)
    sampler = _Sampler(schedule, generator, clock)
    start, load = clock(), 0
    with without_garbage_collection():
        while True:
            before_s = clock()
            loaded = _load_all(loaders, generator)
            first_ms = sampler.warm([engine.timer for engine in loaded])
            load_s = clock() - before_s
            unit_s, units = _split(schedule.budget_s, load_s)
            for _ in range(units):
                samples = sampler.rounds([engine.timer for engine in loaded], unit_s)
                yield tuple(
                    UnitSamples(load=load, load_ms=a.load_ms, first_ms=b, samples_ms=tuple(c))
                    for a, b, c in zip(loaded, first_ms, samples, strict=True)
                )
                if clock() - start + unit_s > schedule.budget_s:
                    return
            load += 1
            del loaded
            gc.collect(1)  # frees the engines before the next are loaded; all of it would take long
            if clock() - start + load_s + unit_s > schedule.budget_s:
                return


def _load_all(loaders: Sequence[Loader], generator: np.random.Generator) -> list[Loaded]:
    """Load every engine once, in an order drawn by lot."""
    found = {int(index): loaders[index]() for index in generator.permutation(len(loaders))}
    return [found[index] for index in range(len(loaders))]


def _split(budget_s: float, load_s: float) -> tuple[float, int]:
    """Return the length of a unit, seconds, and how many of them share a load."""
    units = max(1, ceil(load_s * LOADS / budget_s))
    return max(budget_s / UNITS, load_s / units), units


class _Sampler:
    """Times engines in turns of equal shape, which the first load decides."""

    def __init__(
        self, schedule: Schedule, generator: np.random.Generator, clock: Callable[[], float]
    ) -> None:
        self.generator, self.clock = generator, clock
        self.is_cold = schedule.is_cold
        self.turn: Turn | None = None
        self.swept = np.zeros(SWEPT_BYTES if self.is_cold else 0, dtype=np.uint8)

    def warm(self, timers: Sequence[Timer]) -> list[float]:
        """Return each one's first inference, ms; run each until it is warm."""
        order = [int(index) for index in self.generator.permutation(len(timers))]
        found = {index: warm_up(timers[index], WARM_UP_S) for index in order}
        if self.turn is None:
            self.turn = self._shape([now_ms for _, now_ms in found.values()])
        return [found[index][0] for index in range(len(timers))]

    def _shape(self, warm_ms: Sequence[float]) -> Turn:
        """Return the turn of all engines alike: a sample of more calls would have less spread."""
        if self.is_cold:
            return Turn(prepare=self._empty_caches)
        calls = calls_per_sample(min(warm_ms), LEAST_SAMPLE_US)
        sample_s = calls * max(warm_ms) / 1e3
        samples = min(max(int(TURN_S / sample_s), 1), TURN_SAMPLES)
        return Turn(prepare=fill_caches, samples=samples, calls=calls)

    def _empty_caches(self, _: Timer) -> None:
        self.swept += 1

    def rounds(self, timers: Sequence[Timer], seconds: float) -> list[list[float]]:
        """Return the samples of each, ms, of one round or as many as `seconds` allow."""
        assert self.turn is not None  # `warm` comes first
        recorders = [Recorder((timer,), self.turn) for timer in timers]
        start = self.clock()
        while True:
            play_round(recorders, self.generator)
            if self.clock() - start >= seconds:
                return [recorder.samples_ms for recorder in recorders]

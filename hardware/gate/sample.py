"""Sample several engines side by side: load them all, time them in turns, load them anew, ...

Everything that could favour one of them is drawn by lot: the order of loading, anew for every
load, and the order of the turns, anew for every round.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from hardware.intervals import median
from hardware.records import Record
from hardware.timing import Timer, checked_ms, without_garbage_collection

UNITS = 40  # that a budget is meant to give; fewer where loading is slow
LOADS = 24  # of the engines that a budget pays for at half its time, at the least
TURN_S = 0.01  # one engine's turn: short, so that both see the same machine
TURN_SAMPLES = 8  # in one turn, at most
LEAST_SAMPLE_US = 50.0  # shorter inferences are repeated within a sample: the clock costs 0.1 us
WARM_CALLS = 2  # after the first inference, before the first sample
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
    """Times engines in turns of equal shape: the first load decides how many calls a turn has."""

    def __init__(
        self, schedule: Schedule, generator: np.random.Generator, clock: Callable[[], float]
    ) -> None:
        self.generator, self.clock = generator, clock
        self.is_cold = schedule.is_cold
        self.calls, self.turn_samples = 0, 1
        self.swept = np.zeros(SWEPT_BYTES if self.is_cold else 0, dtype=np.uint8)

    def warm(self, timers: Sequence[Timer]) -> list[float]:
        """Return each one's first inference, ms; run each until it is warm."""
        first_ms = [0.0] * len(timers)
        warm_ms = [0.0] * len(timers)
        for index in self.generator.permutation(len(timers)):
            first_ms[index] = checked_ms(timers[index](1))
            warm_ms[index] = median([checked_ms(timers[index](1)) for _ in range(WARM_CALLS)])
        if not self.calls:
            self._shape_turns(warm_ms)
        return first_ms

    def _shape_turns(self, warm_ms: Sequence[float]) -> None:
        """Fix the turns, alike for all engines: a sample of more calls would have less spread."""
        self.calls = max(1, ceil(LEAST_SAMPLE_US / (1e3 * min(warm_ms))))
        sample_s = self.calls * max(warm_ms) / 1e3
        self.turn_samples = min(max(int(TURN_S / sample_s), 1), TURN_SAMPLES)
        if self.is_cold:
            self.calls, self.turn_samples = 1, 1

    def rounds(self, timers: Sequence[Timer], seconds: float) -> list[list[float]]:
        """Return the samples of each, ms, of one round or as many as `seconds` allow."""
        samples: list[list[float]] = [[] for _ in timers]
        start = self.clock()
        while True:
            for index in self.generator.permutation(len(timers)):
                self._settle(timers[index])
                for _ in range(self.turn_samples):
                    samples[index].append(checked_ms(timers[index](self.calls)))
            if self.clock() - start >= seconds:
                return samples

    def _settle(self, timer: Timer) -> None:
        """Fill the caches with this engine's weights, or empty them."""
        if self.is_cold:
            self.swept += 1
        else:
            timer(1)

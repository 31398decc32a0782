"""Time engines together: warm up, sample in random order, stop when the intervals are tight.

Every round times every run once, so that drift (clocks, heat, neighbours) hits all of them alike;
compare two runs only through one call of `time_together`.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil, inf, isfinite

import numpy as np
from pydantic import model_validator

from hardware.device import foreign_cpu_s
from hardware.errors import RunError
from hardware.intervals import (
    Interval,
    mad,
    median,
    median_interval,
    ratio_interval,
    samples_needed,
)
from hardware.runtimes.base import Timer
from hardware.runtimes.base import timer_of as timer_of
from hardware.storing import Record

Progress = Callable[[float, str], None]
"""Is told what fraction is done, 0 to 1, and a line of text."""

WINDOW_S = 0.25  # the system counts processor time in ticks of 10 ms: shorter windows say little
WARM_BLOCK = 3  # two blocks of this many samples must agree before a run counts as warm


class Latency(Record):
    """How long one inference takes on one device, and how far to trust the figure."""

    median_ms: float
    low_ms: float  # confidence interval of the median
    high_ms: float
    mad_ms: float  # median absolute deviation of the samples
    samples: int  # that the figures rest on
    tainted: int = 0  # samples taken while something else used the processor

    @model_validator(mode="after")
    def _is_possible(self) -> "Latency":
        # Written as what must hold, so that NaN is refused too.
        if not (0 < self.median_ms < inf and self.mad_ms >= 0 and self.samples > 0):
            raise ValueError(f"Latency needs median > 0, MAD >= 0, samples > 0; got {self}")
        if not self.low_ms <= self.median_ms <= self.high_ms:
            raise ValueError(f"The median must lie in its interval; got {self}")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """How long to warm up, when to stop, and what counts as disturbed."""

    warmup_s: float = 1.0  # at most, per run; less where it is stable before
    warm_tolerance: float = 0.03  # warm when two blocks' medians agree within this, relative
    min_samples: int = 20
    max_samples: int = 500
    max_seconds: float = 10.0  # of sampling, for all runs together
    relative_width: float = 0.02  # stop when every interval is this narrow against its median
    confidence: float = 0.95
    min_sample_us: float = 50.0  # shorter runs are repeated within a sample: the clock costs 0.1 us
    foreign_cores: float = 0.25  # more processor than this used by others taints a window
    lost_share: float = 0.1  # a sample that loses more than this of its processor time is tainted

    def __post_init__(self) -> None:
        needed = samples_needed(self.confidence)
        if not needed <= self.min_samples <= self.max_samples:
            raise ValueError(
                f"A confidence of {self.confidence} needs at least {needed} samples; got "
                f"min_samples={self.min_samples}, max_samples={self.max_samples}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Every sample of one run, in the order of the rounds; nothing is dropped."""

    samples_ms: tuple[float, ...]  # time of one inference
    tainted: tuple[bool, ...]  # whether the sample was disturbed from outside
    calls: int = 1  # inferences per sample; more than one for very short runs
    confidence: float = 0.95

    @property
    def clean_ms(self) -> tuple[float, ...]:
        """The samples that were not disturbed."""
        return tuple(s for s, bad in zip(self.samples_ms, self.tainted, strict=True) if not bad)

    @property
    def interval(self) -> Interval:
        """Confidence interval of the median, from the clean samples while they are the majority."""
        return median_interval(self._trusted_ms, self.confidence)

    @property
    def latency(self) -> Latency:
        """The figures, from the clean samples while they are the majority, else from all."""
        interval = self.interval
        return Latency(
            median_ms=interval.estimate,
            low_ms=max(interval.low, 0.0),
            high_ms=interval.high,
            mad_ms=mad(self._trusted_ms),
            samples=len(self._trusted_ms),
            tainted=sum(self.tainted),
        )

    @property
    def _trusted_ms(self) -> tuple[float, ...]:
        clean = self.clean_ms
        enough = max(len(self.samples_ms) / 2, samples_needed(self.confidence))
        return clean if len(clean) >= enough else self.samples_ms


def ratio(a: Series, b: Series) -> Interval:
    """Return how many times slower `a` is than `b`, with the interval of the paired rounds.

    Rounds in which either was disturbed are left out while the others are the majority.

    Raises:
        ValueError: the two were not timed together (they differ in length).
    """
    rounds = list(zip(a.samples_ms, b.samples_ms, a.tainted, b.tainted, strict=True))
    clean = [r for r in rounds if not (r[2] or r[3])]
    enough = max(len(rounds) / 2, samples_needed(a.confidence))
    used = clean if len(clean) >= enough else rounds
    return ratio_interval([r[0] for r in used], [r[1] for r in used], a.confidence)


def time_together(
    timers: Sequence[Timer],
    protocol: Protocol = Protocol(),
    *,
    seed: int = 0,
    progress: Progress | None = None,
    foreign_s: Callable[[], float] = foreign_cpu_s,
) -> tuple[Series, ...]:
    """Time several runs in interleaved rounds until every median is known tightly enough.

    Each run is warmed up until it is stable. Then every round times each of them once, in an order
    drawn anew, until every confidence interval is narrower than `protocol.relative_width` or a cap
    is reached. The garbage collector rests meanwhile. Samples during which other processes used
    the processor are marked, never dropped; sampling goes on until the clean ones suffice.

    The intervals are looked at again and again while sampling, which makes their true coverage
    slightly lower than stated; the checks are spaced geometrically to keep that small.

    Args:
        timers: `Engine.timer(feeds)` or `timer_of(function)`.
        protocol: when to stop.
        seed: of the random orders.
        progress: is told the fraction done and the width reached.
        foreign_s: reads the processor seconds that others have used so far.

    Raises:
        RunError: a run failed, or its timer returned something that is not a time.
    """
    generator = np.random.default_rng(seed)
    tell = progress or _silent
    with _without_garbage_collection():
        recorders = [_Recorder(t, warm_up(t, protocol), protocol) for t in timers]
        watch = _Watch(foreign_s, protocol)
        start, rounds, next_check = time.monotonic(), 0, protocol.min_samples
        while recorders and rounds < protocol.max_samples:
            for index in generator.permutation(len(recorders)):
                recorders[index].sample()
            rounds += 1
            watch.end_round(recorders)
            elapsed = (time.monotonic() - start) / protocol.max_seconds
            if rounds >= next_check:
                next_check = ceil(rounds * 1.1)
                width = max(r.series().interval.relative_width for r in recorders)
                done = max(rounds / protocol.max_samples, elapsed)
                done = max(done, (protocol.relative_width / width) ** 2 if width else 1.0)
                tell(min(done, 1.0), f"{rounds} rounds, intervals within {width:.1%}")
                if width <= protocol.relative_width:
                    break
            if elapsed >= 1 and rounds >= protocol.min_samples:
                break
    tell(1.0, f"{rounds} rounds")
    return tuple(r.series() for r in recorders)


def warm_up(timer: Timer, protocol: Protocol) -> int:
    """Run until two blocks of samples agree or `warmup_s` is spent; return calls per sample."""
    start = time.monotonic()
    samples = [_checked(timer(1))]
    while time.monotonic() - start < protocol.warmup_s:
        samples.append(_checked(timer(1)))
        before, now = samples[-2 * WARM_BLOCK : -WARM_BLOCK], samples[-WARM_BLOCK:]
        if len(samples) >= 2 * WARM_BLOCK and (
            abs(median(now) / median(before) - 1) <= protocol.warm_tolerance
        ):
            break
    return max(1, ceil(protocol.min_sample_us / (1e3 * median(samples[-WARM_BLOCK:]))))


@dataclass(slots=True)
class _Recorder:
    """The samples of one run so far, with the processor time that this process got for each."""

    timer: Timer
    calls: int
    protocol: Protocol
    samples_ms: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)  # own processor time over wall time
    foreign: list[bool] = field(default_factory=list)  # others used the processor meanwhile

    def sample(self) -> None:
        wall, own = time.perf_counter_ns(), time.process_time_ns()
        milliseconds = _checked(self.timer(self.calls))
        own_ns, wall_ns = time.process_time_ns() - own, time.perf_counter_ns() - wall
        self.samples_ms.append(milliseconds)
        self.shares.append(own_ns / max(wall_ns, 1))
        self.foreign.append(False)

    def series(self) -> Series:
        # A run that computes all the time gets less than its usual share only when it is preempted.
        # Runs that wait for a device have no usual share, and very short ones measure it badly.
        usual = median(self.shares)
        long_enough = median(self.samples_ms) * self.calls * 1e3 >= self.protocol.min_sample_us / 2
        least = usual * (1 - self.protocol.lost_share) if usual > 0.9 and long_enough else 0.0
        return Series(
            samples_ms=tuple(self.samples_ms),
            tainted=tuple(
                bad or share < least for bad, share in zip(self.foreign, self.shares, strict=True)
            ),
            calls=self.calls,
            confidence=self.protocol.confidence,
        )


class _Watch:
    """Marks the rounds of each window of time in which other processes kept the processor busy."""

    def __init__(self, foreign_s: Callable[[], float], protocol: Protocol) -> None:
        self.foreign_s, self.protocol = foreign_s, protocol
        self.first_round = 0
        self.rounds = 0
        self.since_s, self.used_s = time.monotonic(), foreign_s()

    def end_round(self, recorders: Sequence[_Recorder]) -> None:
        self.rounds += 1
        now_s = time.monotonic()
        if now_s - self.since_s < WINDOW_S:
            return
        used_s = self.foreign_s()
        if (used_s - self.used_s) / (now_s - self.since_s) > self.protocol.foreign_cores:
            for recorder in recorders:
                for index in range(self.first_round, self.rounds):
                    recorder.foreign[index] = True
        self.first_round, self.since_s, self.used_s = self.rounds, now_s, used_s


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _checked(milliseconds: float) -> float:
    if not (isfinite(milliseconds) and milliseconds > 0):
        raise RunError(f"A timer returned {milliseconds} ms; a time must be positive and finite.")
    return milliseconds


def _silent(done: float, text: str) -> None:
    """Tell nobody."""

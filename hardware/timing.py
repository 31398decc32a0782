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
from hardware.records import Record

Timer = Callable[[int], float]
"""Runs something that many times back to back and returns the milliseconds that one run took."""

Progress = Callable[[float, str], None]
"""Is told what fraction is done, 0 to 1, and a line of text."""

WINDOW_S = 0.25  # the system counts processor time in ticks of 10 ms: shorter windows say little
TRUSTED_SAMPLES = 10  # fewer clean samples than this are not worth more than all of them
LEAST_WINDOW_S = 0.1  # what is left at the end and shorter says nothing by itself
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
    # Between runs caches hold the last run's weights: inferences go untimed until this much time or
    # so many of them have passed, one at the least. 0: none do.
    settle_ms: float = 10.0
    settle_calls: int = 8
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
    interrupted: tuple[bool, ...]  # the run lost the processor during the sample
    crowded: tuple[bool, ...]  # others kept the processor busy around that time
    calls: int = 1  # inferences per sample; more than one for very short runs
    confidence: float = 0.95

    @property
    def tainted(self) -> tuple[bool, ...]:
        """Whether each sample was disturbed from outside."""
        return tuple(a or b for a, b in zip(self.interrupted, self.crowded, strict=True))

    @property
    def interval(self) -> Interval:
        """Confidence interval of the median of the least disturbed samples that are enough."""
        return median_interval(self._trusted_ms, self.confidence)

    @property
    def latency(self) -> Latency:
        """The figures, from the least disturbed samples that are enough."""
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
    def _trusted_ms(self) -> list[float]:
        kept = _least_disturbed(self.tainted, self.interrupted, self.confidence)
        return [self.samples_ms[index] for index in kept]


def ratio(a: Series, b: Series) -> Interval:
    """Return how many times slower `a` is than `b`, with the interval of the paired rounds.

    Only rounds in which neither was disturbed count, as long as there are enough of them.

    Raises:
        ValueError: the two were not timed together (they differ in length).
    """
    tainted = [x or y for x, y in zip(a.tainted, b.tainted, strict=True)]
    interrupted = [x or y for x, y in zip(a.interrupted, b.interrupted, strict=True)]
    kept = _least_disturbed(tainted, interrupted, a.confidence)
    return ratio_interval(
        [a.samples_ms[i] for i in kept], [b.samples_ms[i] for i in kept], a.confidence
    )


def _least_disturbed(
    tainted: Sequence[bool], interrupted: Sequence[bool], confidence: float
) -> list[int]:
    """Return which samples to trust: the clean ones, else those not interrupted, else all.

    The first of these with enough samples for an interval. The marks come from processor time and
    neighbours, never from the sample's own length, so choosing by them does not favour fast ones.
    """
    enough = max(samples_needed(confidence), TRUSTED_SAMPLES)
    for marks in (tainted, interrupted):
        kept = [index for index, bad in enumerate(marks) if not bad]
        if len(kept) >= enough:
            return kept
    return list(range(len(tainted)))


def time_together(
    timers: Sequence[Timer | Sequence[Timer]],
    protocol: Protocol = Protocol(),
    *,
    seed: int = 0,
    progress: Progress | None = None,
    foreign_s: Callable[[], float] = foreign_cpu_s,
) -> tuple[Series, ...]:
    """Time several runs in interleaved rounds until every median is known tightly enough.

    Each run is warmed up until it is stable. Then every round times each of them once, in an order
    drawn anew, until every confidence interval is narrower than `protocol.relative_width` or a cap
    is reached. Before each sample some inferences go untimed, because the run before has filled
    the caches with its own weights. The garbage collector rests meanwhile. Samples during which
    other processes used the processor are marked, never dropped; sampling goes on until the least
    disturbed ones suffice.

    The intervals are looked at again and again while sampling, which makes their true coverage
    slightly lower than stated; the checks are spaced geometrically to keep that small.

    Args:
        timers: `Engine.timer(feeds)` or `timer_of(function)` of each run. Where a run has several
            (engines of one model), they take turns: sample `i` is that of timer `i % count`.
        protocol: when to stop.
        seed: of the random orders.
        progress: is told the fraction done and the width reached.
        foreign_s: reads the processor seconds that others have used so far.

    Raises:
        RunError: a run failed, or its timer returned something that is not a time.
    """
    generator = np.random.default_rng(seed)
    tell = progress or _silent
    with without_garbage_collection():
        recorders = [_recorder((t,) if callable(t) else tuple(t), protocol) for t in timers]
        settles = len(recorders) > 1
        watch = _Watch(foreign_s, protocol)
        start, rounds, next_check = time.monotonic(), 0, protocol.min_samples
        while recorders and rounds < protocol.max_samples:
            for index in generator.permutation(len(recorders)):
                recorders[index].sample(settles)
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
        watch.end(recorders)
    tell(1.0, f"{rounds} rounds")
    return tuple(r.series() for r in recorders)


def warm_up(timer: Timer, protocol: Protocol) -> int:
    """Run until two blocks of samples agree or `warmup_s` is spent; return calls per sample."""
    start = time.monotonic()
    samples = [checked_ms(timer(1))]
    while time.monotonic() - start < protocol.warmup_s:
        samples.append(checked_ms(timer(1)))
        before, now = samples[-2 * WARM_BLOCK : -WARM_BLOCK], samples[-WARM_BLOCK:]
        if len(samples) >= 2 * WARM_BLOCK and (
            abs(median(now) / median(before) - 1) <= protocol.warm_tolerance
        ):
            break
    return max(1, ceil(protocol.min_sample_us / (1e3 * median(samples[-WARM_BLOCK:]))))


@dataclass(slots=True)
class _Recorder:
    """The samples of one run so far, with the processor time that this process got for each."""

    timers: tuple[Timer, ...]  # of several engines of one model, in turns
    calls: int
    protocol: Protocol
    samples_ms: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)  # own processor time over wall time
    walls_us: list[float] = field(default_factory=list)
    crowded: list[bool] = field(default_factory=list)  # others used the processor meanwhile

    def sample(self, settles: bool) -> None:
        timer = self.timers[len(self.samples_ms) % len(self.timers)]
        if settles:
            self._settle(timer)
        wall, own = time.perf_counter_ns(), time.process_time_ns()
        milliseconds = checked_ms(timer(self.calls))
        own_ns, wall_ns = time.process_time_ns() - own, time.perf_counter_ns() - wall
        self.samples_ms.append(milliseconds)
        self.shares.append(own_ns / max(wall_ns, 1))
        self.walls_us.append(wall_ns / 1e3)
        self.crowded.append(False)

    def _settle(self, timer: Timer) -> None:
        """Fill the caches with this engine's weights.

        One inference is not enough where other engines' weights fill the last cache: a narrowed
        MobileNetV2 took 1.58 ms after one, 1.37 ms after four, 1.30 ms after eight, and 1.25 ms
        alone.
        """
        passed_ms, calls = 0.0, 0
        while passed_ms < self.protocol.settle_ms and calls < self.protocol.settle_calls:
            passed_ms += checked_ms(timer(1))
            calls += 1

    def series(self) -> Series:
        least = self._least_share()
        return Series(
            samples_ms=tuple(self.samples_ms),
            interrupted=tuple(share < least for share in self.shares),
            crowded=tuple(self.crowded),
            calls=self.calls,
            confidence=self.protocol.confidence,
        )

    def _least_share(self) -> float:
        """Return the share of processor time below which a sample was interrupted.

        A run that computes all the time gets less than usual only when it is preempted. Runs that
        wait for another device have no usual share, and very short ones measure it badly.
        """
        usual = float(np.quantile(self.shares, 0.9))
        if usual < 0.9 or median(self.walls_us) < self.protocol.min_sample_us / 2:
            return 0.0
        return usual * (1 - self.protocol.lost_share)


def _recorder(timers: tuple[Timer, ...], protocol: Protocol) -> _Recorder:
    """Return a recorder of one run whose engines are warm; the first tells how long that takes."""
    calls = warm_up(timers[0], protocol)
    for timer in timers[1:]:
        timer(WARM_BLOCK)
    return _Recorder(timers, calls, protocol)


class _Watch:
    """Marks the rounds of each window of time in which other processes kept the processor busy."""

    def __init__(self, foreign_s: Callable[[], float], protocol: Protocol) -> None:
        self.foreign_s, self.protocol = foreign_s, protocol
        self.first_round = 0
        self.rounds = 0
        self.since = self.before = (time.monotonic(), foreign_s())

    def end_round(self, recorders: Sequence[_Recorder]) -> None:
        self.rounds += 1
        if time.monotonic() - self.since[0] >= WINDOW_S:
            self._judge(recorders, self.since)

    def end(self, recorders: Sequence[_Recorder]) -> None:
        """Judge the rounds since the last window, together with it where they took no time."""
        is_short = time.monotonic() - self.since[0] < LEAST_WINDOW_S
        if self.rounds > self.first_round:
            self._judge(recorders, self.before if is_short else self.since)

    def _judge(self, recorders: Sequence[_Recorder], since: tuple[float, float]) -> None:
        now = time.monotonic(), self.foreign_s()
        seconds = now[0] - since[0]
        if (
            seconds >= LEAST_WINDOW_S
            and (now[1] - since[1]) / seconds > self.protocol.foreign_cores
        ):
            for recorder in recorders:
                for index in range(self.first_round, self.rounds):
                    recorder.crowded[index] = True
        self.first_round, self.before, self.since = self.rounds, self.since, now


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Collect the young garbage once and let the collector rest meanwhile."""
    was_on = gc.isenabled()
    gc.collect(1)  # beside torch all of it takes a quarter of a second, every time
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def checked_ms(milliseconds: float) -> float:
    """Return the time that a timer gave; raises RunError where it is none."""
    if not (isfinite(milliseconds) and milliseconds > 0):
        raise RunError(f"A timer returned {milliseconds} ms; a time must be positive and finite.")
    return milliseconds


def _silent(done: float, text: str) -> None:
    """Tell nobody."""


def timer_of(run: Callable[[], object]) -> Timer:
    """Return a timer of a plain function, by this machine's clock."""

    def milliseconds(calls: int) -> float:
        start = time.perf_counter_ns()
        for _ in range(calls):
            run()
        return (time.perf_counter_ns() - start) / calls / 1e6

    return milliseconds

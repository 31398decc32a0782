"""Time engines together: warm up, sample in random order, stop when the intervals are tight.

Every round gives every run one turn, so that what changes over time (clocks, heat, neighbours) hits
all of them alike; compare two runs only through one call of `time_together`. The gate, which loads
its engines anew again and again and stops by a test of its own, times them by the same turns.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
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
"""Gets what fraction is done, 0 to 1, and a line of text."""

WINDOW_S = 0.25  # the system counts processor time in ticks of 10 ms: shorter windows say little
TRUSTED_SAMPLES = 10  # fewer undisturbed samples than this are not worth more than all of them
LEAST_WINDOW_S = 0.1  # what is left at the end and shorter says nothing by itself
WARM_BLOCK = 3  # two blocks of this many samples must agree before a run counts as warm
WARM_TOLERANCE = 0.03  # within this, relative to the earlier block's median
# Between turns the caches hold the last run's weights: inferences go untimed until this much time
# or so many of them have passed, one at the least.
FILL_MS = 10.0
FILL_CALLS = 8


class Latency(Record):
    """How long one inference takes on one device, and how far to trust the figure."""

    median_ms: float
    low_ms: float  # confidence interval of the median
    high_ms: float
    mad_ms: float  # median absolute deviation of the samples
    samples: int  # that the figures rest on
    disturbed: int = 0  # samples taken while something else used the processor

    @model_validator(mode="before")
    @classmethod
    def _takes_the_former_name(cls, body: object) -> object:
        """Return what a file holds, with the name that `disturbed` had in older ones replaced."""
        if isinstance(body, dict) and "tainted" in body:
            return {"disturbed" if key == "tainted" else key: body[key] for key in body}
        return body

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

    warmup_s: float = 1.0  # of inferences, at most, per run; less where it is stable before
    min_samples: int = 20
    max_samples: int = 500
    max_seconds: float = 10.0  # of sampling, for all runs together
    relative_width: float = 0.02  # stop when every interval is this narrow against its median
    confidence: float = 0.95
    min_sample_us: float = 50.0  # shorter runs are repeated within a sample: the clock costs 0.1 us
    fill_ms: float = FILL_MS
    fill_calls: int = FILL_CALLS  # 0: every turn finds the caches as the last one left them
    foreign_cores: float = 0.25  # more processor than this used by others disturbs a window
    lost_share: float = 0.1  # a sample that loses more than this of its processor time is disturbed

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
    shared: tuple[bool, ...]  # others kept the processor busy around that time
    calls: int = 1  # inferences per sample; more than one for very short runs
    confidence: float = 0.95

    @property
    def disturbed(self) -> tuple[bool, ...]:
        """Whether each sample was disturbed from outside."""
        return tuple(a or b for a, b in zip(self.interrupted, self.shared, strict=True))

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
            disturbed=sum(self.disturbed),
        )

    @property
    def _trusted_ms(self) -> list[float]:
        kept = _least_disturbed(self.disturbed, self.interrupted, self.confidence)
        return [self.samples_ms[index] for index in kept]


def ratio(a: Series, b: Series) -> Interval:
    """Return how many times slower `a` is than `b`, with the interval of the paired rounds.

    Only rounds in which neither was disturbed count, as long as there are enough of them.

    Raises:
        ValueError: the two were not timed together (they differ in length).
    """
    disturbed = [x or y for x, y in zip(a.disturbed, b.disturbed, strict=True)]
    interrupted = [x or y for x, y in zip(a.interrupted, b.interrupted, strict=True)]
    kept = _least_disturbed(disturbed, interrupted, a.confidence)
    return ratio_interval(
        [a.samples_ms[i] for i in kept], [b.samples_ms[i] for i in kept], a.confidence
    )


def _least_disturbed(
    disturbed: Sequence[bool], interrupted: Sequence[bool], confidence: float
) -> list[int]:
    """Return which samples to trust: the undisturbed, else those not interrupted, else all.

    The first of these with enough samples for an interval. The marks come from processor time and
    neighbours, never from the sample's own length, so choosing by them does not favour fast ones.
    """
    enough = max(samples_needed(confidence), TRUSTED_SAMPLES)
    for marks in (disturbed, interrupted):
        kept = [index for index, bad in enumerate(marks) if not bad]
        if len(kept) >= enough:
            return kept
    return list(range(len(disturbed)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What a run does when it is its turn."""

    prepare: Callable[[Timer], None] | None  # brings the caches into the state to be timed in
    samples: int = 1
    calls: int = 1  # inferences per sample


@dataclass(slots=True)
class Recorder:
    """The samples of one run so far, with the processor time that this process got for each."""

    timers: tuple[Timer, ...]  # of several engines of one model, in turns
    turn: Turn
    samples_ms: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)  # own processor time over wall time
    walls_us: list[float] = field(default_factory=list)
    shared: list[bool] = field(default_factory=list)  # others used the processor meanwhile

    def take_turn(self) -> None:
        """Prepare the caches and take the samples of one turn."""
        timer = self.timers[len(self.samples_ms) // self.turn.samples % len(self.timers)]
        if self.turn.prepare is not None:
            self.turn.prepare(timer)
        for _ in range(self.turn.samples):
            wall, own = time.perf_counter_ns(), time.process_time_ns()
            milliseconds = checked_ms(timer(self.turn.calls))
            own_ns, wall_ns = time.process_time_ns() - own, time.perf_counter_ns() - wall
            self.samples_ms.append(milliseconds)
            self.shares.append(own_ns / max(wall_ns, 1))
            self.walls_us.append(wall_ns / 1e3)
            self.shared.append(False)

    def series(self, protocol: Protocol) -> Series:
        """Return the samples, and which of them were disturbed by the protocol's measure."""
        least = self._least_share(protocol)
        return Series(
            samples_ms=tuple(self.samples_ms),
            interrupted=tuple(share < least for share in self.shares),
            shared=tuple(self.shared),
            calls=self.turn.calls,
            confidence=protocol.confidence,
        )

    def _least_share(self, protocol: Protocol) -> float:
        """Return the share of processor time below which a sample was interrupted.

        A run that computes all the time gets less than usual only when it is preempted. Runs that
        wait for another device have no usual share, and very short ones measure it badly.
        """
        usual = float(np.quantile(self.shares, 0.9))
        if usual < 0.9 or median(self.walls_us) < protocol.min_sample_us / 2:
            return 0.0
        return usual * (1 - protocol.lost_share)


def play_round(recorders: Sequence[Recorder], generator: np.random.Generator) -> None:
    """Give every run one turn, in an order drawn by lot."""
    for index in generator.permutation(len(recorders)):
        recorders[index].take_turn()


def fill_caches(timer: Timer, most_ms: float = FILL_MS, most_calls: int = FILL_CALLS) -> None:
    """Run untimed inferences until the caches hold this engine's weights.

    One inference is not enough where other engines' weights fill the last cache: a narrowed
    MobileNetV2 took 1.58 ms after one, 1.37 ms after four, 1.30 ms after eight, and 1.25 ms alone.
    """
    passed_ms, calls = 0.0, 0
    while passed_ms < most_ms and calls < most_calls:
        passed_ms += checked_ms(timer(1))
        calls += 1


def warm_up(timer: Timer, most_s: float) -> tuple[float, float]:
    """Run until two blocks of inferences agree, or took so long beyond the first one.

    Returns:
        What the first inference took, and what one takes now, ms.
    """
    first_ms = checked_ms(timer(1))
    samples: list[float] = []
    spent_ms = 0.0
    while spent_ms < 1e3 * most_s:
        samples.append(checked_ms(timer(1)))
        spent_ms += samples[-1]
        before, now = samples[-2 * WARM_BLOCK : -WARM_BLOCK], samples[-WARM_BLOCK:]
        if len(samples) >= 2 * WARM_BLOCK and (
            abs(median(now) / median(before) - 1) <= WARM_TOLERANCE
        ):
            break
    return first_ms, median(samples[-WARM_BLOCK:] or [first_ms])


def calls_per_sample(run_ms: float, least_us: float) -> int:
    """Return how many inferences a sample must have to last so long."""
    return max(1, ceil(least_us / (1e3 * run_ms)))


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
        progress: gets the fraction done and the width reached.
        foreign_s: reads the processor seconds that others have used so far.

    Raises:
        RunError: a run failed, or its timer returned something that is not a time.
    """
    generator = np.random.default_rng(seed)
    report = progress or _silent
    with without_garbage_collection():
        together = len(timers) > 1
        recorders = [
            _recorder((t,) if callable(t) else tuple(t), protocol, together) for t in timers
        ]
        watch = _Watch(foreign_s, protocol)
        start, rounds, next_check = time.monotonic(), 0, protocol.min_samples
        while recorders and rounds < protocol.max_samples:
            play_round(recorders, generator)
            rounds += 1
            watch.end_round(recorders)
            elapsed = (time.monotonic() - start) / protocol.max_seconds
            if rounds >= next_check:
                next_check = ceil(rounds * 1.1)
                width = max(r.series(protocol).interval.relative_width for r in recorders)
                done = max(rounds / protocol.max_samples, elapsed)
                done = max(done, (protocol.relative_width / width) ** 2 if width else 1.0)
                report(min(done, 1.0), f"{rounds} rounds, intervals within {width:.1%}")
                if width <= protocol.relative_width:
                    break
            if elapsed >= 1 and rounds >= protocol.min_samples:
                break
        watch.end(recorders)
    report(1.0, f"{rounds} rounds")
    return tuple(r.series(protocol) for r in recorders)


def _recorder(timers: tuple[Timer, ...], protocol: Protocol, together: bool) -> Recorder:
    """Return a recorder of one run whose engines are warm; the first tells how long that takes.

    Args:
        timers: of its engines.
        protocol: how long to warm up, and to fill the caches.
        together: whether other runs, which fill the caches too, are timed in turns with it.
    """
    _, run_ms = warm_up(timers[0], protocol.warmup_s)
    for timer in timers[1:]:
        timer(WARM_BLOCK)
    fill = partial(fill_caches, most_ms=protocol.fill_ms, most_calls=protocol.fill_calls)
    calls = calls_per_sample(run_ms, protocol.min_sample_us)
    return Recorder(timers, Turn(prepare=fill if together else None, calls=calls))


class _Watch:
    """Marks the rounds of each window of time in which other processes kept the processor busy."""

    def __init__(self, foreign_s: Callable[[], float], protocol: Protocol) -> None:
        self.foreign_s, self.protocol = foreign_s, protocol
        self.first_round = 0
        self.rounds = 0
        self.since = self.before = (time.monotonic(), foreign_s())

    def end_round(self, recorders: Sequence[Recorder]) -> None:
        self.rounds += 1
        if time.monotonic() - self.since[0] >= WINDOW_S:
            self._judge(recorders, self.since)

    def end(self, recorders: Sequence[Recorder]) -> None:
        """Judge the rounds since the last window, together with it where they took no time."""
        is_short = time.monotonic() - self.since[0] < LEAST_WINDOW_S
        if self.rounds > self.first_round:
            self._judge(recorders, self.before if is_short else self.since)

    def _judge(self, recorders: Sequence[Recorder], since: tuple[float, float]) -> None:
        now = time.monotonic(), self.foreign_s()
        seconds = now[0] - since[0]
        if (
            seconds >= LEAST_WINDOW_S
            and (now[1] - since[1]) / seconds > self.protocol.foreign_cores
        ):
            for recorder in recorders:
                for index in range(self.first_round, self.rounds):
                    recorder.shared[index] = True
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
    """Report to nobody."""


def timer_of(run: Callable[[], object]) -> Timer:
    """Return a timer of a plain function, by this machine's clock."""

    def milliseconds(calls: int) -> float:
        start = time.perf_counter_ns()
        for _ in range(calls):
            run()
        return (time.perf_counter_ns() - start) / calls / 1e6

    return milliseconds

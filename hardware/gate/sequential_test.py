"""Decide, while the samples still come in, whether a ratio of latencies exceeds its limit.

The verdict may be looked for after every unit: its error rate holds however often that is done.
"""

from bisect import insort
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from math import exp, inf, log, log1p

import numpy as np

from hardware.intervals import Interval, median

# The share of the stake that each player bets on "above"; a bold one is quick where the case is
# clear, the timid ones are patient where it is not. Their wealth is averaged by these weights.
BETS = np.array([1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 0.97])
WEIGHTS = np.array([0.1, 0.1, 0.1, 0.1, 0.2, 0.4])
CAPACITIES = ("throughput", "memory")  # sampled after the latencies, in units of their own
METRICS = ("p50", "p90", "p99", "load", *CAPACITIES)
LEAST_LOADS = 3  # where one load gives several units, the loads must agree, and be so many
EXACT = Interval(0.0, 0.0, 0.0)  # the log-ratio of a baseline that is measured alongside


@dataclass(frozen=True, slots=True)
class Allowance:
    """What two sessions may differ in although nothing changed: tolerated on top of a limit."""

    share: float  # 0.03: one session may come out 1.03 times as slow as the other
    sessions: int = 0  # that it was estimated from; 0: it was not

    def __post_init__(self) -> None:
        if not 0 <= self.share < inf:
            raise ValueError(f"An allowance is a slow-down of 0 % or more; got {self.share:.1%}.")


NO_ALLOWANCE = Allowance(0.0)
ASSUMED_ALLOWANCE = Allowance(0.03)  # where nothing is known of the device


class Verdict(str, Enum):
    """What a comparison comes to."""

    PASS = "pass"
    REGRESSION = "regression"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True, slots=True)
class Limit:
    """The slow-down that is tolerated of one metric; a speed-up never fails.

    Of throughput it is that of the time per image, of memory an increase.
    """

    metric: str
    tolerated: float  # 0.02: the candidate may take 1.02 times as long

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"Unknown metric {self.metric!r}. Known: {', '.join(METRICS)}.")
        if not 0 <= self.tolerated < inf:
            raise ValueError(f"A limit is a slow-down of 0 % or more; got {self.tolerated:.1%}.")

    @classmethod
    def parse(cls, text: str) -> "Limit":
        """Return the limit written as `p50:2%`.

        Raises:
            ValueError: not of that form, or an unknown metric.
        """
        metric, _, amount = text.partition(":")
        try:
            return cls(metric.strip(), parse_share(amount))
        except ValueError as error:
            raise ValueError(f"A limit is METRIC:PERCENT, like p50:2%: {error}") from error

    def __str__(self) -> str:
        return f"{self.metric}:{100 * self.tolerated:g}%"


def parse_share(text: str) -> float:
    """Return the share that `2%` or `2` means; raises ValueError where it is no number."""
    try:
        return float(text.strip().removesuffix("%")) / 100
    except ValueError:
        raise ValueError(f"{text!r} is no percentage; write 2%.") from None


@lru_cache(maxsize=65536)
def heads_needed(count: int, error: float) -> int | None:
    """Return how many of `count` values must lie above a number to prove the median above it.

    The proof is a bet: whoever stakes part of his money on "above" before every value cannot expect
    to gain while the median is not above; wealth 1 / `error` is therefore reached, at whatever
    moment, with a probability of at most `error`. None: even all of them would prove nothing yet.

    Reference:
        Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS B
        2024, arXiv:2010.09686, sec. 4, with the signs as the bounded variables; Howard and Ramdas,
        "Sequential estimation of quantiles with applications to A/B testing and best-arm
        identification", Bernoulli 2022, arXiv:1906.09712. A finite mixture of bets is ours.
    """
    for heads in range(count // 2 + 1, count + 1):
        terms = np.log(WEIGHTS) + heads * np.log1p(BETS) + (count - heads) * np.log1p(-BETS)
        if np.logaddexp.reduce(terms) >= -log(error):
            return heads
    return None


@dataclass(slots=True)
class MedianBounds:
    """A confidence interval of the median of a series that is valid after every value at once.

    It assumes that each value lies above the median with probability 1/2 given those before it. It
    assumes nothing else: no moments, no distribution, no independence of sizes. Where the order of
    two engines is drawn anew for every unit, that holds for the log-ratio of two engines that
    differ by a factor, however correlated and heavy-tailed the machine's noise is: the coin that
    orders them decides the sign.

    Args:
        confidence: that the interval covers the median at all times, 0 to 1.
    """

    confidence: float
    low: float = -inf
    high: float = inf
    values: list[float] = field(default_factory=list)  # sorted

    def add(self, value: float) -> None:
        """Take one more value into account; the interval never widens."""
        insort(self.values, value)
        count = len(self.values)
        needed = heads_needed(count, (1 - self.confidence) / 2)
        if needed is not None:
            self.low = max(self.low, self.values[count - needed])
            self.high = min(self.high, self.values[needed - 1])

    @property
    def interval(self) -> Interval:
        """The median and its bounds; an estimate outside of them is moved to the nearer one."""
        middle, last = self.values, len(self.values) - 1
        estimate = (middle[last // 2] + middle[(last + 1) // 2]) / 2 if middle else 0.0
        return Interval(min(max(estimate, self.low), self.high), self.low, self.high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How many times as long the candidate takes, against a limit."""

    limit: Limit
    verdict: Verdict
    ratio: Interval  # candidate over baseline
    units: int
    detectable: float  # the least slow-down that this run would have called a regression; inf: none
    allowance: Allowance = NO_ALLOWANCE


@dataclass(slots=True)
class SequentialTest:
    """A sequential test of one limit, fed with one log-ratio per unit.

    Args:
        limit: what is tolerated.
        confidence: that the interval covers, 0 to 1; each side may err half of the rest.
        baseline: interval of the baseline's own log-ratio to the same reference where it was
            measured at another time; the candidate's log-ratios are then to that reference too.
        allowance: tolerated on top where the baseline is of another session.
    """

    limit: Limit
    confidence: float
    baseline: Interval = EXACT
    allowance: Allowance = NO_ALLOWANCE
    bounds: MedianBounds = field(init=False)
    loads: dict[int, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bounds = MedianBounds(self.confidence)

    def add(self, log_ratio: float, load: int) -> None:
        """Take a unit into account that was measured in that load of the engines."""
        self.bounds.add(log_ratio)
        self.loads.setdefault(load, []).append(log_ratio)

    @property
    def interval(self) -> Interval:
        """Interval of the log of candidate over baseline."""
        found, base = self.bounds.interval, self.baseline
        return Interval(
            found.estimate - base.estimate, found.low - base.high, found.high - base.low
        )

    def comparison(self) -> Comparison:
        """Return what can be said at this moment."""
        found = self.interval
        border = log1p(self.limit.tolerated) + log1p(self.allowance.share)
        verdict = Verdict.INCONCLUSIVE
        if found.low > border and self._loads_agree(border, 1):
            verdict = Verdict.REGRESSION
        elif found.high < border and self._loads_agree(border, -1):
            verdict = Verdict.PASS
        missing = found.estimate - found.low
        return Comparison(
            limit=self.limit,
            verdict=verdict,
            ratio=Interval(*(exp(x) for x in (found.estimate, found.low, found.high))),
            units=len(self.bounds.values),
            detectable=exp(border + missing) - 1,
            allowance=self.allowance,
        )

    def _loads_agree(self, border: float, side: int) -> bool:
        """Return whether every load says the same, where loads gave several units each.

        What is special to one load (a lucky layout of memory) then hides in all its units alike:
        they are no independent witnesses of the engine.
        """
        if len(self.loads) == len(self.bounds.values):
            return True
        shift = border + self.baseline.estimate
        medians = [median(values) for values in self.loads.values()]
        return len(medians) >= LEAST_LOADS and all(side * (m - shift) > 0 for m in medians)

"""Medians and confidence intervals that assume nothing about how latencies are distributed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf

import numpy as np
import numpy.typing as npt
from scipy.stats import binom

Samples = Sequence[float] | npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the confidence interval around it, all in the samples' unit."""

    estimate: float
    low: float
    high: float

    @property
    def relative_width(self) -> float:
        """Width over estimate; infinite where there are too few samples to say anything."""
        return (self.high - self.low) / self.estimate if self.estimate else inf

    def contains(self, value: float) -> bool:
        """Tell whether `value` lies in the interval, ends included."""
        return self.low <= value <= self.high


def median(samples: Samples) -> float:
    """Return the median.

    Raises:
        ValueError: no samples, or one that is not a number.
    """
    return float(np.median(_checked(samples)))


def mad(samples: Samples) -> float:
    """Return the median absolute deviation from the median, not scaled to a standard deviation.

    Raises:
        ValueError: no samples, or one that is not a number.
    """
    values = _checked(samples)
    return float(np.median(np.abs(values - np.median(values))))


def median_interval(samples: Samples, confidence: float = 0.95) -> Interval:
    """Return the median and its confidence interval; see `quantile_interval`."""
    return quantile_interval(samples, 0.5, confidence)


def quantile_interval(samples: Samples, quantile: float, confidence: float = 0.95) -> Interval:
    """Return a quantile and its distribution-free confidence interval by order statistics.

    The number of samples below the true quantile is binomial whatever the distribution, so two of
    the sorted samples bracket the quantile with a known probability. The interval is the narrowest
    with at most half the error on either side; it covers at least `confidence` of the time for
    independent samples. An end that would need more samples than there are is infinite.

    Args:
        samples: any order.
        quantile: in (0, 1); 0.5 is the median.
        confidence: in (0, 1).

    Raises:
        ValueError: no samples, one that is not a number, or a probability out of range.

    Reference:
        Conover, "Practical Nonparametric Statistics", 3rd ed., 1999, sec. 3.2, confidence
        interval for a quantile; the exact binomial form, not the normal approximation.
    """
    values = np.sort(_checked(samples))
    lower, upper = _ranks(len(values), quantile, confidence)
    return Interval(
        estimate=float(np.quantile(values, quantile)),
        low=float(values[lower - 1]) if lower >= 1 else -inf,
        high=float(values[upper - 1]) if upper <= len(values) else inf,
    )


def ratio_interval(numerator: Samples, denominator: Samples, confidence: float = 0.95) -> Interval:
    """Return the median of the paired ratios and its confidence interval.

    Both series come from the same rounds, so whatever slows a round down (heat, clocks, a
    neighbour) divides out before anything is estimated. Where the two differ by a constant factor
    the median of the ratios is that factor, which is also the ratio of the medians.

    Args:
        numerator: one sample per round.
        denominator: one sample per round, same order and length, all positive.
        confidence: in (0, 1).

    Raises:
        ValueError: lengths that differ, no samples, or a denominator that is not positive.

    Reference:
        Conover (see `quantile_interval`), applied to the ratios; it is the sign test's interval.
    """
    above, below = _checked(numerator), _checked(denominator)
    if len(above) != len(below):
        raise ValueError(f"Paired series differ in length: {len(above)} and {len(below)} rounds.")
    if not bool(np.all(below > 0)):
        raise ValueError(f"The denominator must be positive; its smallest sample is {below.min()}.")
    return median_interval(above / below, confidence)


@lru_cache
def samples_needed(confidence: float, quantile: float = 0.5) -> int:
    """Return the fewest samples that give a finite interval for the quantile."""
    count = 1
    while True:
        lower, upper = _ranks(count, quantile, confidence)
        if lower >= 1 and upper <= count:
            return count
        count += 1


@lru_cache(maxsize=4096)
def _ranks(count: int, quantile: float, confidence: float) -> tuple[int, int]:
    """Return the ranks (from 1) of the samples that bracket the quantile; 0, count + 1: none do."""
    if not (0 < quantile < 1 and 0 < confidence < 1):
        raise ValueError(f"Need 0 < quantile, confidence < 1; got {quantile} and {confidence}.")
    tail = (1 - confidence) / 2
    # Largest l with P(B <= l - 1) <= tail, and smallest u with P(B >= u) <= tail, B binomial.
    lower = int(binom.ppf(tail, count, quantile))
    if binom.cdf(lower, count, quantile) <= tail:
        lower += 1
    upper = int(binom.isf(tail, count, quantile)) + 1
    return lower, upper


def _checked(samples: Samples) -> npt.NDArray[np.float64]:
    """Return the samples as an array, refusing what has no median."""
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"Needs a flat series of samples; got shape {values.shape}.")
    if bool(np.isnan(values).any()):
        raise ValueError(f"{int(np.isnan(values).sum())} of {values.size} samples are not numbers.")
    return values

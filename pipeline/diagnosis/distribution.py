"""How the weights of a layer are distributed: are its filters draws from one Gaussian?"""

import math

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from hardware.records import Record

LEVEL = 0.05  # false discovery rate of the normality tests
LEAST_SAMPLE = 20  # values that a normality test needs
COORDINATES = 128  # of a filter, at most, for correlations
OFF_CENTRE = 0.1  # mean over standard deviation, above which the mean is not zero
OFF_VARIANCE = 0.25  # spread of the filters' variances beyond chance
OFF_CORRELATION = 0.1  # mean absolute correlation beyond chance


class WeightDistribution(Record):
    """What the weights of one layer look like; dead filters (all zero) are left out."""

    filters: int
    dead: int
    fan_in: int
    mean: float  # of all weights, in standard deviations
    mean_p: float  # of a test that the mean is 0
    variance_spread: float  # standard deviation of the filters' variances, over their mean
    variance_spread_null: float  # of Gaussian filters
    correlation: float  # mean absolute correlation of two weights over the filters
    correlation_null: float  # of independent ones
    tests: int  # normality tests made, 0 where the layer is too small
    rejected: int  # of them, at a false discovery rate of 5 %
    excess_kurtosis: float  # 0: Gaussian, above: heavy tails
    is_gaussian: bool
    verdict: str


def describe_weights(weight: Tensor) -> WeightDistribution:
    """Return how far a layer's filters are from independent draws of one Gaussian.

    With thousands of weights every real layer fails an exact test sooner or later, so the verdict
    on mean, variance and correlation goes by size, beyond what chance explains; that on normality
    by the share of filters whose test is rejected (D'Agostino and Pearson's, Benjamini and
    Hochberg's control over all filters).

    Args:
        weight: `(width, fan-in)`.
    """
    values = weight.double()
    live = values[values.any(dim=1)]
    dead = len(values) - len(live)
    count, fan_in = live.shape
    if count < 2 or fan_in < 2 or float(live.std()) == 0:
        return _too_small(len(values), dead, fan_in)
    scale = float(live.std())
    mean = float(live.mean()) / scale
    variances = live.var(dim=1)
    spread = float(variances.std() / variances.mean())
    spread_null = math.sqrt(2 / (fan_in - 1))
    correlation = _mean_correlation(live)
    correlation_null = math.sqrt(2 / (math.pi * count))
    p_values = _normality(live.numpy())
    rejected = int((_adjusted(p_values) < LEVEL).sum())
    # Rejected by more than the tests' own error, not by a few odd filters.
    faults = [
        *(["mean off zero"] if abs(mean) > OFF_CENTRE else []),
        *(["filters of unequal variance"] if spread > spread_null + OFF_VARIANCE else []),
        *(["correlated weights"] if correlation > correlation_null + OFF_CORRELATION else []),
        *(["not normal"] if rejected > max(1, 2 * LEVEL * len(p_values)) else []),
    ]
    return WeightDistribution(
        filters=count,
        dead=dead,
        fan_in=fan_in,
        mean=mean,
        mean_p=float(2 * stats.norm.sf(abs(mean) * math.sqrt(count * fan_in))),
        variance_spread=spread,
        variance_spread_null=spread_null,
        correlation=correlation,
        correlation_null=correlation_null,
        tests=len(p_values),
        rejected=rejected,
        excess_kurtosis=float(stats.kurtosis(live.numpy().ravel())),
        is_gaussian=not faults,
        verdict=", ".join(faults) if faults else "Gaussian-like",
    )


def _too_small(width: int, dead: int, fan_in: int) -> WeightDistribution:
    return WeightDistribution(
        filters=width - dead,
        dead=dead,
        fan_in=fan_in,
        mean=0,
        mean_p=1,
        variance_spread=0,
        variance_spread_null=0,
        correlation=0,
        correlation_null=0,
        tests=0,
        rejected=0,
        excess_kurtosis=0,
        is_gaussian=False,
        verdict="too few weights to tell",
    )


def _mean_correlation(live: Tensor) -> float:
    """Return the mean absolute correlation over filters of two weights at different places."""
    places = torch.linspace(0, live.shape[1] - 1, min(live.shape[1], COORDINATES)).long()
    centred = live[:, places] - live[:, places].mean(dim=0)
    sizes = centred.norm(dim=0)
    directions = centred[:, sizes > 0] / sizes[sizes > 0]
    if directions.shape[1] < 2:
        return 0.0
    products = (directions.T @ directions).abs()
    above = torch.triu(torch.ones_like(products), diagonal=1).bool()
    return float(products[above].mean())


def _normality(
    live: np.ndarray[tuple[int, int], np.dtype[np.float64]],
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return one p-value per filter; of short filters, one per place over all filters."""
    if live.shape[1] >= LEAST_SAMPLE:
        samples = live
    elif live.shape[0] >= LEAST_SAMPLE:
        samples = live.T
    else:
        return np.empty(0)
    samples = samples[np.ptp(samples, axis=1) > 0]
    return np.asarray(stats.normaltest(samples, axis=1).pvalue)


def _adjusted(
    p_values: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return Benjamini and Hochberg's adjusted p-values."""
    return np.asarray(stats.false_discovery_control(p_values)) if len(p_values) else p_values

"""How fast the device was while a variant was profiled.

End-to-end times and node times are taken one after the other. On a machine that others share, the
device may be slower for one of them: a profile's times then are all too long, by 60 % in one of 36
variants of a MobileNetV2, and plans that need what only that variant executed are predicted 5 to
8 % too long. Two things tell: sums of node times that are more than usual beside the end-to-end
time, and layers that took longer than in other variants. Either has other reasons as well (sums
follow no straight line where the profiler takes most of the time; layers take longer in networks
that move more memory). So only where they agree, the smaller counts.

Reference:
    Sen, "Estimates of the regression coefficient based on Kendall's tau", JASA 1968: the line of
    end-to-end times over sums, here of both divided by the sum.
"""

from statistics import median

import numpy as np
import numpy.typing as npt
from scipy.stats import theilslopes

from hardware.latency.table import LatencyTable, Variant, pace_of

Array = npt.NDArray[np.float64]

LEAST_US = 1.0  # shorter layers say nothing of a few per cent
LEAST_VARIANTS = 7  # of a template, before their sums are compared
LEAST_SHARE = 0.1  # of a variant's time, in layers that others executed too


def paced_us(table: LatencyTable) -> list[Array]:
    """Return what each variant's layers took, at the table's pace, (layers,) each."""
    return [
        np.array(variant.times_us) / (table.drift(variant) * pace)
        for variant, pace in zip(table.variants, profile_paces(table).tolist(), strict=True)
    ]


def profile_paces(table: LatencyTable) -> Array:
    """Return how much slower the device was for variants' profiles than for their end-to-end times.

    (variants,); 1 where nothing is known. Node times over this, and over the table's drift, are
    those at the table's pace.
    """
    by_sum, by_layers = np.log(_by_sums(table)), np.log(_by_layers(table))
    agreed = np.minimum(np.abs(by_sum), np.abs(by_layers))
    return np.asarray(np.where(by_sum * by_layers > 0, np.exp(np.sign(by_sum) * agreed), 1.0))


def _by_sums(table: LatencyTable) -> Array:
    """Return each variant's sum of node times over what is usual beside its end-to-end time."""
    paces = np.ones(len(table.variants))
    for template in {variant.template for variant in table.variants}:
        places = [i for i, v in enumerate(table.variants) if v.template == template]
        known = [table.variants[i] for i in places]
        if len(known) < LEAST_VARIANTS:
            continue
        sums_us = np.array([variant.sum_us for variant in known])
        ends_us = np.array([1000 * variant.end_to_end.median_ms for variant in known])
        # The end-to-end time is linear in the sum; in relative terms, so that all sizes count.
        line = theilslopes(ends_us / sums_us, 1 / sums_us)
        outside_us, slope = float(line.slope), float(line.intercept)
        within_us = ends_us - outside_us
        if slope > 0 and within_us.min() > 0:
            paces[places] = sums_us * slope / within_us
    return paces


def _by_layers(table: LatencyTable) -> Array:
    """Return what each variant's layers took over what they took in other variants."""
    seen: list[list[tuple[int, float]]] = [[] for _ in table.entries]
    for number, variant in enumerate(table.variants):
        for place, time_us in _at_pace(table, variant):
            seen[place].append((number, time_us))
    paces = np.ones(len(table.variants))
    for number, variant in enumerate(table.variants):
        shared = []
        for place, time_us in _at_pace(table, variant):
            others = [other for i, other in seen[place] if i != number]
            if others and min(time_us, median(others)) > LEAST_US:
                shared.append((time_us, others))
        if sum(time_us for time_us, _ in shared) > LEAST_SHARE * sum(variant.times_us):
            paces[number] = pace_of(shared)
    return paces


def _at_pace(table: LatencyTable, variant: Variant) -> list[tuple[int, float]]:
    """Return each of a variant's entries and what it took, corrected for drift."""
    drift = table.drift(variant)
    return [(i, us / drift) for i, us in zip(variant.entries, variant.times_us, strict=True)]


__all__ = ["paced_us", "profile_paces"]

"""How far to trust a table: where another sweep of the same network would find its figures.

An interval here is meant for another sweep's figure, not for a true value: that figure has an
error of its own, so the interval is wider by the square root of two. It rests on what was measured
in the same table (how far builds of one entry lie apart, and how far engines of one model), and on
what another minute usually adds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import median

import numpy as np
import numpy.typing as npt

from hardware.intervals import Interval
from hardware.latency.layers import LayerKey
from hardware.latency.table import Entry, LatencyTable, Variant

Array = npt.NDArray[np.float64]

NORMAL_95 = 1.96  # standard deviations to either side of 95 % of a normal distribution
TAIL, NORMAL_TAIL = 0.9, 1.645  # a quantile of deviations, and where a normal distribution has it
BINS = 5  # of entries by their time: short ones are measured worse
LEAST_DEVIATIONS = 10  # in a bin
RESOLUTION_US = 0.01  # tables hold times to this
USUAL_ENTRY = 0.03  # relative, where no entry was built twice
# Engines of one model differ for as long as they live. The full network was built a few times
# only, so what is usual counts as much as what those few tell.
USUAL_ENGINE = 0.01
# What another minute adds: caches and memory are shared with others, who slow large networks and
# small ones down differently. Networks measured twice on a virtual machine, minutes apart.
USUAL_MINUTE = 0.01
MEDIAN_LOSS = 1.57  # variance of a median of many over that of their mean, normal distribution


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Relative standard deviations of what a table holds."""

    log_us: Array  # (bins,) of entries' times
    entry: Array  # (bins,) of one build of an entry of that time
    engine: float  # of engines of one model

    def of_entry(self, entry: Entry) -> Interval:
        """Return where 95 of 100 other sweeps would find an entry's time, us."""
        time_us = max(entry.median_us, RESOLUTION_US)
        one = float(np.interp(np.log(time_us), self.log_us, self.entry))
        found = np.hypot(one / sqrt(_worth(entry.builds)), RESOLUTION_US / time_us)
        return _around(entry.median_us, float(found))

    def of_variant(self, variant: Variant) -> Interval:
        """Return where 95 of 100 other sweeps would find a variant's end-to-end time, ms."""
        latency = variant.end_to_end
        sampled = (latency.high_ms - latency.low_ms) / (2 * NORMAL_95 * latency.median_ms)
        engines, anchors = (variant.raw.engines, variant.raw.anchors) if variant.raw else (1, 1)
        built = self.engine * sqrt(1 / engines + 1 / anchors)
        found = sqrt(sampled**2 + built**2 + USUAL_MINUTE**2)
        return _around(latency.median_ms, found)


def spread_of(table: LatencyTable) -> Spread:
    """Return how far apart repeated measurements in a table lie."""
    found = sorted(_deviations(table))
    bins = min(BINS, len(found) // LEAST_DEVIATIONS)
    if not bins:
        log_us, entry = np.zeros(1), np.full(1, USUAL_ENTRY)
    else:
        parts = np.array_split(np.array(found), bins)
        log_us = np.array([np.median(part[:, 0]) for part in parts])
        entry = np.array([np.quantile(part[:, 1], TAIL) / NORMAL_TAIL for part in parts])
    return Spread(log_us=log_us, entry=entry, engine=_between_engines(table))


def _around(middle: float, relative: float) -> Interval:
    half = NORMAL_95 * sqrt(2) * relative * middle
    return Interval(middle, max(middle - half, 0.0), middle + half)


def _worth(builds: int) -> float:
    """Return how many builds' mean is as good as the median of so many."""
    return builds / MEDIAN_LOSS if builds > 2 else builds


def _deviations(table: LatencyTable) -> list[tuple[float, float]]:
    """Return of every build of an entry the log of the time, and how far it lies from the others.

    Relative to the median of the other builds, and less by what that median's own error adds.
    """
    times: dict[LayerKey, list[float]] = {}
    for variant in table.variants:
        drift = table.drift(variant)
        for place, time_us in zip(variant.entries, variant.times_us, strict=True):
            if time_us > 0:
                times.setdefault(table.entries[place].key, []).append(time_us / drift)
    found = []
    for same in times.values():
        for index, time_us in enumerate(same):
            others = same[:index] + same[index + 1 :]
            if others:
                off = abs(time_us / median(others) - 1) / sqrt(1 + 1 / _worth(len(others)))
                found.append((float(np.log(time_us)), off))
    return found


def _between_engines(table: LatencyTable) -> float:
    """Return the relative standard deviation of engines of one model, from the full network's."""
    raws = [variant.raw for variant in table.variants if variant.raw is not None]
    squares = [_variance(raw.anchor_us(), raw.anchors) for raw in raws if raw.anchors > 1]
    told = median(squares) if squares else USUAL_ENGINE**2
    return sqrt((told + USUAL_ENGINE**2) / 2)


def _variance(samples_us: Sequence[float] | npt.NDArray[np.float32], engines: int) -> float:
    """Return the relative variance of the engines' medians; sample `i` is engine `i % engines`."""
    values = np.asarray(samples_us, dtype=np.float64)
    medians = [np.median(values[index::engines]) for index in range(engines)]
    return float(np.var(medians, ddof=1) / np.mean(medians) ** 2)

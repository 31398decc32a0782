"""What one kind of layer takes against its channel counts: from measured widths to all others.

What was measured is taken as it is. Elsewhere runs a trend, linear in the input channels, the
output channels and their product, with non-negative coefficients; and what the measured widths
nearby have in common beyond the trend is interpolated, in the logs.

Reference:
    Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, sec. 2.2: the mean of a
    process with a squared exponential covariance. Its two scales are fixed, not fitted: choosing
    them kind by kind gained nothing on twelve tables.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from hardware.latency.entries import LEAST_US, Entry
from hardware.latency.layers import Kind, LayerKey
from hardware.latency.table import LatencyTable

Array = npt.NDArray[np.float64]
Curve = tuple[tuple[int, float], ...]
"""Widths, ascending, and microseconds."""

REACH = 0.35  # how far widths know of each other, as a share of the widest
DOUBT = 0.5  # standard deviation of one build, over that of what neighbouring widths share


@dataclass(frozen=True, slots=True, kw_only=True)
class KindModel:
    """What one kind of layer takes against its channel counts."""

    measured_us: Mapping[LayerKey, float]
    weights: Array  # (features,), microseconds per feature, >= 0
    widest: Array  # (2,) most input and output channels that were measured
    places: Array  # (n, 2) measured channel counts, as shares of the widest
    corrections: Array  # (n,) weight of each measurement in the log of what is near it

    def predict(self, keys: Sequence[LayerKey]) -> Array:
        """Return the microseconds of each layer of this kind, (keys,), >= 0."""
        near = _closeness(_counts(keys) / self.widest, self.places)
        estimates = _features(keys) @ self.weights * np.exp(near @ self.corrections)
        estimates = np.where(estimates > LEAST_US, estimates, 0.0)
        pairs = zip(keys, estimates.tolist(), strict=True)
        return np.array([self.measured_us.get(key, time_us) for key, time_us in pairs])


def fit_kind(entries: Sequence[Entry]) -> KindModel:
    """Return the model of one kind of layer.

    Args:
        entries: what was measured of it; at least one.
    """
    keys = [entry.key for entry in entries]
    times_us = np.maximum([entry.median_us for entry in entries], LEAST_US)
    builds = np.array([entry.builds for entry in entries], dtype=np.float64)
    features = _features(keys)
    weights, _ = nnls(features / times_us[:, None], np.ones(len(keys)))  # in relative terms
    off = np.log(times_us / np.maximum(features @ weights, LEAST_US))
    widest = np.maximum(_counts(keys).max(axis=0), 1.0)
    places = _counts(keys) / widest
    covariance = _closeness(places, places) + np.diag(DOUBT**2 / builds)
    return KindModel(
        measured_us={entry.key: entry.median_us for entry in entries},
        weights=np.asarray(weights),
        widest=widest,
        places=places,
        corrections=np.linalg.solve(covariance, off),
    )


def _features(keys: Sequence[LayerKey]) -> Array:
    """Return what the trend is linear in, (keys, features), all >= 0."""
    inputs, outputs = _counts(keys).T
    # Thinned layers compute a part of their pixels only: they have a trend of their own.
    thinned = np.array([key.thinned for key in keys], dtype=np.float64)
    whole = 1 - thinned
    product = inputs * outputs
    return np.stack(
        [whole, whole * inputs, whole * outputs, whole * product, thinned, thinned * product],
        axis=1,
    )


def _counts(keys: Sequence[LayerKey]) -> Array:
    """Return the input and output channels of layers, (keys, 2)."""
    counts = [(key.in_channels, key.out_channels) for key in keys]
    return np.array(counts, dtype=np.float64).reshape(-1, 2)


def _closeness(a: Array, b: Array) -> Array:
    """Return how much places know of each other, (a, b), 1 for the same place."""
    squares: Array = ((a[:, None, :] - b[None, :, :]) ** 2).sum(axis=2)
    return np.asarray(np.exp(-squares / (2 * REACH**2)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What a kind of layer takes at one width, with the largest layer's channels on the other."""

    width: int
    time_us: float  # what plans reckon with
    exact: bool  # measured just there; else estimated, from other channels on the other side
    entries: int  # measured at this width, whatever is on the other side


@dataclass(frozen=True, slots=True, kw_only=True)
class Staircase:
    """One kind of layer: what was measured of it, and what plans reckon with."""

    label: str
    axis: str  # "out": the line runs over output channels, "in": over input channels
    other: int | None  # channels on the other side, the largest layer's; None: the same as here
    curve: Curve  # at every width up to the widest
    entries: tuple[Entry, ...]

    def width_of(self, entry: Entry) -> int:
        """Return where on the axis an entry lies."""
        return entry.key.out_channels if self.axis == "out" else entry.key.in_channels

    def across(self, entry: Entry) -> int:
        """Return the channels of an entry on the other side."""
        return entry.key.in_channels if self.axis == "out" else entry.key.out_channels

    @property
    def rows(self) -> tuple[Row, ...]:
        """The widths that were measured, ascending."""
        times_us, rows = dict(self.curve), []
        for width in sorted({self.width_of(entry) for entry in self.entries}):
            here = [entry for entry in self.entries if self.width_of(entry) == width]
            exact = any(self.other in (None, self.across(entry)) for entry in here)
            rows.append(Row(width=width, time_us=times_us[width], exact=exact, entries=len(here)))
        return tuple(rows)


def staircases(table: LatencyTable) -> tuple[Staircase, ...]:
    """Return the staircase of every kind of layer, the slowest first.

    The line is what plans reckon with: the same model, of the same entries.
    """
    entries: dict[Kind, list[Entry]] = {}
    for entry in table.entries:
        entries.setdefault(entry.key.kind, []).append(entry)
    found = [_staircase(same) for same in entries.values() if not all(e.key.thinned for e in same)]
    return tuple(sorted(found, key=lambda stairs: -max(us for _, us in stairs.curve)))


def _staircase(entries: Sequence[Entry]) -> Staircase:
    model = fit_kind(entries)
    whole = [entry for entry in entries if not entry.key.thinned]
    keys = [entry.key for entry in whole]
    axis = "out" if len({key.out_channels for key in keys}) > 1 else "in"
    coupled = all(key.in_channels == key.out_channels for key in keys)
    # The largest layer that was measured: where expansions and projections are one kind, the widest
    # input and the widest output belong to no layer together.
    example = max(keys, key=lambda key: key.in_channels * key.out_channels)
    line = []
    widest = max(key.out_channels if axis == "out" else key.in_channels for key in keys)
    for width in range(1, widest + 1):
        at_out = (width if coupled else example.in_channels, width)
        line.append(example.at(*(at_out if axis == "out" else (width, example.out_channels))))
    other = example.in_channels if axis == "out" else example.out_channels
    return Staircase(
        label=label_of(example),
        axis=axis,
        other=None if coupled else other,
        curve=tuple((n, float(us)) for n, us in enumerate(model.predict(line), start=1)),
        entries=tuple(whole),
    )


def label_of(key: LayerKey) -> str:
    """Return a kind of layer in words: operator, kernel, stride, groups and size."""
    parts = [" + ".join((key.operator, *key.tail))]
    if key.kernel:
        parts.append("x".join(map(str, key.kernel)))
    if set(key.strides) - {1}:
        parts.append(f"stride {max(key.strides)}")
    if key.is_depthwise:
        parts.append("depthwise")
    elif key.conv_groups > 1:
        parts.append(f"{key.conv_groups} groups")
    if key.in_size:
        parts.append(f"at {'x'.join(map(str, key.in_size))} px")
    return ", ".join(parts)

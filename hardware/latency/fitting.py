"""What one kind of layer takes against its channel counts: from measured widths to all others.

A staircase (padded channels, non-negative coefficients) carries the trend. A Gaussian process in
the logs of the residuals knows what neighbouring widths share and what belongs to one width,
whatever the other is. Small enough to be fitted again after every build.

Reference:
    Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, sec. 2.2 (prediction),
    5.4.2 (leave-one-out in closed form).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from hardware.latency.layers import Kind, LayerKey
from hardware.latency.table import Entry

Array = npt.NDArray[np.float64]

TILES = (1, 4, 8, 16, 32)
TILE_PAIRS = tuple(product(TILES, TILES))  # input channels, output channels
USUAL_ERROR = 0.03  # relative; errors well beyond are outliers, not evidence about tiles
OTHERS_COUNT = 0.5  # weight of the other kinds' say in a kind's tiles
LEAST_US = 0.05  # below this a time is the clock's, not the layer's
# Relative standard deviations of the staircase's errors: those that neighbouring widths share, and
# those that belong to one width, whatever the other is. Blocks of channels that do not divide among
# threads make such: OpenVINO on two threads takes 12 to 20 % longer for 112 filters (seven blocks
# of 16) of a ResNet-18 than those of 96 and 128 tell.
NEAR_SCALES = (0.0, 0.02, 0.05, 0.15)
WIDTH_SCALES = (0.0, 0.03, 0.1)
RESIDUAL_NOISE = (0.003, 0.01, 0.03, 0.1)  # standard deviation of the log of a measured entry
LEAST_POINTS = 8  # of a kind, before its model counts beside what was measured
LEAST_SETTLED_US = 2.0  # below this the clock's steps are no errors of a few per cent
MOST_OFF = -0.7, 0.7  # of the log of an estimate, from its trend
REACH = 0.35  # how far neighbouring widths know of each other, as a share of the widest


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """How much the relative residuals of two layers of one kind have in common."""

    near: float = 0.0  # standard deviation of what neighbouring widths share
    widths: tuple[float, float] = (0.0, 0.0)  # of what those of one input, of one output width do

    def between(self, a: Array, b: Array, widest: tuple[int, int]) -> Array:
        """Return the covariance of the residuals at these channel counts, (a, b)."""
        unit = np.maximum(np.array(widest), 1)
        same = (a[:, None, :] == b[None, :, :]) @ np.square(self.widths)
        return np.asarray(self.near**2 * closeness(a / unit, b / unit) + same)


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyModel:
    """The latency of one kind of layer against its channel counts."""

    in_tile: int
    out_tile: int
    tails: tuple[tuple[str, ...], ...]
    weights: Array  # (features,), microseconds per feature, >= 0
    thinned: float  # what a thinned layer takes, as a share of a whole one
    widest: tuple[int, int]
    counts: Array  # (n, 2) measured channel counts
    likeness: Likeness
    pull: Array  # (n,) weight of each point in the relative residuals of those like it
    error: float  # leave-one-out, relative, root mean square

    def predict(self, keys: Sequence[LayerKey]) -> Array:
        """Return the estimated microseconds of each key, (keys,), >= 0."""
        trend = _features(keys, self.in_tile, self.out_tile, self.tails) @ self.weights
        trend *= np.where([key.thinned for key in keys], self.thinned, 1.0)
        alike = self.likeness.between(counts_of(keys), self.counts, self.widest)
        estimate = trend * np.exp(np.clip(alike @ self.pull, *MOST_OFF))
        return np.asarray(np.where(estimate > LEAST_US, estimate, 0.0))


def fit_families(entries: Mapping[Kind, Sequence[Entry]]) -> dict[Kind, FamilyModel]:
    """Return the model of every kind of layer.

    Tiles belong to the device and its runtime more than to a kind of layer: each kind takes the
    tiles that predict its entries best from one another, but what all other kinds say counts too.
    Thinned layers are a fixed share of whole ones.

    Args:
        entries: per kind what was measured of it; at least one entry each.
    """
    scores = {kind: _tile_scores(found) for kind, found in entries.items()}
    total = np.sum([s for s in scores.values() if s is not None], axis=0)
    models = {}
    for kind, found in entries.items():
        own = scores[kind]
        in_tile, out_tile = 1, 1
        if own is not None:
            place = int(np.argmin(own + OTHERS_COUNT * (total - own)))
            in_tile, out_tile = TILE_PAIRS[place]
        models[kind] = _fit_family(found, in_tile, out_tile)
    return models


def settled_us(entries: Sequence[Entry], models: Mapping[Kind, FamilyModel]) -> Array:
    """Return what entries take by their own measurements and by those of their kind, (entries,).

    What a layer took in a network or two is off by several per cent: the moment, and where that
    network's memory lay. So the kind's model counts as one more measurement of it, where that rests
    on enough.

    Args:
        entries: as they were measured.
        models: fitted to these.
    """
    found = np.array([entry.median_us for entry in entries], dtype=np.float64)
    places: dict[Kind, list[int]] = {}
    for place, entry in enumerate(entries):
        if not entry.key.thinned and entry.median_us > LEAST_SETTLED_US:
            places.setdefault(entry.key.kind, []).append(place)
    for kind, same in places.items():
        if len(models[kind].counts) < LEAST_POINTS:
            continue
        expected = np.maximum(models[kind].predict([entries[i].key for i in same]), LEAST_US)
        own = np.array([entries[i].builds for i in same])
        own = own / (own + 1)
        found[same] = np.exp(own * np.log(found[same]) + (1 - own) * np.log(expected))
    return found


def _tile_scores(entries: Sequence[Entry]) -> Array | None:
    """Return how badly each pair of tiles predicts these entries; None: too few to say."""
    whole = [entry for entry in entries if not entry.key.thinned]
    keys = [entry.key for entry in whole]
    times = _times(whole)
    if len(whole) < 6 or times.max(initial=0.0) <= LEAST_US:
        return None
    tails = tuple(sorted({key.tail for key in keys}))
    rows = (_features(keys, a, b, tails) / times[:, None] for a, b in TILE_PAIRS)
    return np.array([_left_out_score(row) for row in rows])


def _fit_family(entries: Sequence[Entry], in_tile: int, out_tile: int) -> FamilyModel:
    """Return the model of one kind of layer with these tiles."""
    keys, times = [entry.key for entry in entries], _times(entries)
    thin = np.array([key.thinned for key in keys])
    tails = tuple(sorted({key.tail for key in keys}))
    features = _features(keys, in_tile, out_tile, tails)
    # Where nothing but thinned layers was measured, they are a kind of their own.
    rows = ~thin if not thin.all() else thin
    weights = _robust_weights(features[rows], times[rows])
    trend = np.maximum(features @ weights, LEAST_US)
    share = float(np.median(times[thin] / trend[thin])) if thin.any() else 1.0
    trend = np.where(thin, share * trend, trend)
    widest = (max(k.in_channels for k in keys), max(k.out_channels for k in keys))
    counts = counts_of(keys)
    builds = np.array([entry.builds for entry in entries])
    likeness, pull, error = _fit_residuals(counts, widest, np.log(times / trend), builds)
    return FamilyModel(
        in_tile=in_tile,
        out_tile=out_tile,
        tails=tails,
        weights=weights,
        thinned=share,
        widest=widest,
        counts=counts,
        likeness=likeness,
        pull=pull,
        error=error,
    )


def _times(entries: Sequence[Entry]) -> Array:
    return np.asarray(np.maximum([entry.median_us for entry in entries], LEAST_US))


def _robust_weights(features: Array, times: Array) -> Array:
    """Return non-negative weights that fit the times relatively; outliers count less and less."""
    scale = times.copy()
    weights, _ = nnls(features / scale[:, None], times / scale)
    for _ in range(5):
        trend = np.maximum(features @ weights, LEAST_US)
        # The larger of both as the scale: an outlier is as far above as below.
        off = np.abs(np.log(times / trend))
        typical = max(float(np.median(off)), 0.01)
        scale = np.maximum(times, trend) * np.sqrt(np.maximum(1.0, off / (3 * typical)))
        weights, _ = nnls(features / scale[:, None], times / scale)
    return np.asarray(weights)


def _features(
    keys: Sequence[LayerKey], in_tile: int, out_tile: int, tails: Sequence[tuple[str, ...]]
) -> Array:
    """Return the staircase's features, (keys, features), all >= 0."""
    inputs = np.array([key.in_channels for key in keys], dtype=np.float64)
    outputs = np.array([key.out_channels for key in keys], dtype=np.float64)
    padded_in = np.ceil(inputs / in_tile) * in_tile
    padded_out = np.ceil(outputs / out_tile) * out_tile
    ragged_in, ragged_out = padded_in != inputs, padded_out != outputs
    columns = [
        np.ones(len(keys)),
        padded_in,
        padded_out,
        padded_in * padded_out,
        inputs * outputs,
        ragged_in * inputs,
        ragged_out * outputs,
    ]
    for tail in tails:
        has = np.array([key.tail == tail for key in keys], dtype=np.float64)
        columns += [has, has * padded_out] if len(tails) > 1 else []
    return np.stack(columns, axis=1)


def counts_of(keys: Sequence[LayerKey]) -> Array:
    """Return the input and output channels of layers, (keys, 2)."""
    counts = [(key.in_channels, key.out_channels) for key in keys]
    return np.array(counts, dtype=np.float64).reshape(-1, 2)


def closeness(a: Array, b: Array) -> Array:
    """Return how much places know of each other, (a, b), 1 for the same place."""
    squares: Array = ((a[:, None, :] - b[None, :, :]) ** 2).sum(axis=2)
    return np.asarray(np.exp(-squares / (2 * REACH**2)))


def _left_out_score(rows: Array) -> float:
    """Return how badly a linear fit of ones predicts each row from all others; outliers say less.

    The sum over rows of the negative log density of a Cauchy distribution, up to a constant.
    """
    scaled: Array = rows / np.maximum(np.linalg.norm(rows, axis=0), 1e-12)
    gram = scaled @ scaled.T
    inverse = np.linalg.inv(gram + 1e-4 * np.trace(gram) / len(gram) * np.eye(len(gram)))
    left_out = inverse.sum(axis=1) / np.diag(inverse)
    return float(np.log1p((left_out / USUAL_ERROR) ** 2).sum())


def _fit_residuals(
    counts: Array, widest: tuple[int, int], residuals: Array, builds: Array
) -> tuple[Likeness, Array, float]:
    """Return how alike residuals are, each point's pull on the others, and the left-out error.

    That likeness is taken which predicts each residual best from all others (Rasmussen and
    Williams, sec. 5.4.2), by the log density of a Student distribution (four degrees of freedom):
    outliers say less.
    """
    found = Likeness(), np.zeros(len(residuals)), float(np.sqrt(np.mean(residuals**2)))
    if len(residuals) < 4:
        return found
    best = np.inf
    for near, width in product(NEAR_SCALES, WIDTH_SCALES):
        likeness = Likeness(near=near, widths=(width, width))
        alike = likeness.between(counts, counts, widest)
        for noise in RESIDUAL_NOISE:
            inverse = np.linalg.inv(alike + np.diag(noise**2 / np.maximum(builds, 1) + 1e-8))
            pull, precision = inverse @ residuals, np.diag(inverse)
            left_out = pull**2 / precision  # in variances
            score = float((2.5 * np.log1p(left_out / 4) - 0.5 * np.log(precision)).sum())
            if score < best:
                error = float(np.sqrt(np.mean((pull / precision) ** 2)))
                best, found = score, (likeness, pull, error)
    return found

"""Latency models: from the widths that were measured to those that were not, and to whole networks.

Two models, both small enough to be fitted again after every build:

- `FamilyModel`: what one kind of layer takes against its channel counts. A staircase (padded
  channels, non-negative coefficients) carries the trend, a Gaussian process in the relative
  residuals interpolates between what was measured.
- `Calibration`: sums of layers' times against end-to-end times. A Gaussian process again, in which
  what the profiler gets wrong is shared by all layers, by one kind of layer, by neighbouring
  widths, follows the multiply-adds, or belongs to one entry; only as much is shared as the
  end-to-end times support.

Reference:
    Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, sec. 2.2 (prediction),
    5.4.2 (leave-one-out in closed form). Sums of a process's values as
    observations (calibration) are linear functionals, sec. 9.4.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from hardware.keys import Kind, LayerKey
from hardware.tables import Entry

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
# Prior standard deviations of what profiled times get wrong: relative, shared by all layers, by
# those of one kind, by neighbouring widths of a kind, of one entry alone; outside of the layers, of
# the usual end-to-end time. End-to-end times tell which share of all these there is.
ALL, KIND, NEAR, ENTRY, OUTSIDE = 0.05, 0.03, 0.02, 0.01, 0.03
# And in proportion to a layer's multiply-adds, channels padded: where a profiler adds more to each
# node than that takes (ONNX Runtime's on two threads makes a ResNet-56 twice as long), what is
# left of the differences between profiled times is the work. Sixteen floats fill an AVX-512
# register, and the blocks of channels that runtimes compute in.
WORK, WORK_TILE = 0.03, 16
SHARES = (0.1, 0.3, 1.0, 3.0)
# What a profiler adds to every node: ONNX Runtime's 5 us, more than many a narrowed layer takes.
NODE_US = (0.1, 0.3, 1.0, 3.0, 10.0)
# Of that, how far layers of other operators or tails differ in it (some are several nodes), and
# those of other sizes.
NODE_TAIL, NODE_KIND = 0.7, 0.3
NOISES = (0.0002, 0.001, 0.003, 0.01, 0.03)  # relative, of a variant's end-to-end time
REACH = 0.35  # how far neighbouring widths know of each other, as a share of the widest


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """How much the relative residuals of two layers of one kind have in common."""

    near: float = 0.0  # standard deviation of what neighbouring widths share
    width: float = 0.0  # of what layers of the same input or output width share

    def between(self, a: Array, b: Array, widest: tuple[int, int]) -> Array:
        """Return the covariance of the residuals at these channel counts, (a, b)."""
        unit = np.maximum(np.array(widest), 1)
        same = (a[:, None, :] == b[None, :, :]).sum(axis=2)
        return np.asarray(self.near**2 * _closeness(a / unit, b / unit) + self.width**2 * same)


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
    likeness: "Likeness"
    pull: Array  # (n,) weight of each point in the relative residuals of those like it
    error: float  # leave-one-out, relative, root mean square

    def predict(self, keys: Sequence[LayerKey]) -> Array:
        """Return the estimated microseconds of each key, (keys,), >= 0."""
        trend = _features(keys, self.in_tile, self.out_tile, self.tails) @ self.weights
        trend *= np.where([key.thinned for key in keys], self.thinned, 1.0)
        alike = self.likeness.between(_counts(keys), self.counts, self.widest)
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
    counts = _counts(keys)
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


def _counts(keys: Sequence[LayerKey]) -> Array:
    counts = [(key.in_channels, key.out_channels) for key in keys]
    return np.array(counts, dtype=np.float64).reshape(-1, 2)


def _closeness(a: Array, b: Array) -> Array:
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
        likeness = Likeness(near=near, width=width)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """How wrong profiled times are, as far as end-to-end times tell."""

    share: float = 1.0  # of the usual errors in proportion to the time
    node_us: float = 1.0  # standard deviation of what a profiler adds to every node


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Corrections that make sums of layers' times predict end-to-end times."""

    sharing: Sharing
    keys: tuple[LayerKey, ...]  # the entries that the variants executed
    times_us: Array  # (entries,)
    pull_us: Array  # (entries,) weight of each entry in every correction
    outside_us: float  # per inference, belongs to no layer

    def corrections(self, keys: Sequence[LayerKey], times_us: Array) -> Array:
        """Return what to add to the times of these keys, (keys,), microseconds."""
        if not self.keys:
            return np.zeros(len(keys))
        relative, per_node = _shared(keys, times_us, self.keys, self.times_us)
        spread = self.sharing.share**2 * relative + self.sharing.node_us**2 * per_node
        return np.asarray(spread @ self.pull_us)


def calibrate(
    keys: Sequence[LayerKey],
    times_us: Array,
    counts: Array,
    end_to_end_us: Array,
    uncertain_us: Array,
) -> Calibration:
    """Return corrections learnt from variants.

    Args:
        keys: every entry that a variant executed.
        times_us: (entries,) what the table says they take.
        counts: (variants, entries) how often each variant executes each entry.
        end_to_end_us: (variants,) what the variants took.
        uncertain_us: (variants,) standard deviation of that, as far as its samples tell.
    """
    if not len(end_to_end_us):
        return Calibration(
            sharing=Sharing(), keys=(), times_us=times_us, pull_us=times_us, outside_us=0.0
        )
    missing = end_to_end_us - counts @ times_us
    usual = float(np.median(end_to_end_us))
    relative, per_node = (
        counts @ part @ counts.T for part in _shared(keys, times_us, keys, times_us)
    )
    outside = (OUTSIDE * usual) ** 2
    best: tuple[float, Sharing, Array] | None = None
    for share, node_us, noise in product(SHARES, NODE_US, NOISES):
        spread = share**2 * (relative + outside) + node_us**2 * per_node
        score, pull = _condition(spread, np.hypot(noise * end_to_end_us, uncertain_us), missing)
        score -= float(np.log1p(node_us))  # as good without is as good
        if best is None or score > best[0]:
            best = (score, Sharing(share=share, node_us=node_us), pull)
    assert best is not None
    _, sharing, pull = best
    return Calibration(
        sharing=sharing,
        keys=tuple(keys),
        times_us=times_us,
        pull_us=counts.T @ pull,
        outside_us=float(sharing.share**2 * outside * pull.sum()),
    )


def _shared(
    a: Sequence[LayerKey], a_us: Array, b: Sequence[LayerKey], b_us: Array
) -> tuple[Array, Array]:
    """Return how far the errors of two sets of entries are shared, (a, b) each.

    First, in us squared, of errors in proportion to the time, or to the work (times what the second
    set takes per multiply-add); then of those per executed node.
    """
    kinds: dict[Kind, int] = {}
    kind_a = np.array([kinds.setdefault(key.kind, len(kinds)) for key in a], dtype=np.intp)
    kind_b = np.array([kinds.setdefault(key.kind, len(kinds)) for key in b], dtype=np.intp)
    counts_a, counts_b = _counts(a), _counts(b)
    widest = np.ones((len(kinds), 2))
    np.maximum.at(widest, kind_a, counts_a)
    np.maximum.at(widest, kind_b, counts_b)
    alike = kind_a[:, None] == kind_b[None, :]
    index = {key: i for i, key in enumerate(b)}
    same = np.zeros(alike.shape)
    for row, key in enumerate(a):
        if key in index:
            same[row, index[key]] = 1.0
    near = _closeness(counts_a / widest[kind_a], counts_b / widest[kind_b])
    relative = ALL**2 + KIND**2 * alike + NEAR**2 * alike * near + ENTRY**2 * same
    executed = np.outer(a_us > LEAST_US, b_us > LEAST_US)
    forms: dict[tuple[str, tuple[str, ...]], int] = {}
    form_a, form_b = (
        np.array([forms.setdefault((key.operator, key.tail), len(forms)) for key in keys])
        for keys in (a, b)
    )
    formed = form_a[:, None] == form_b[None, :]
    per_node = executed * (1 + NODE_TAIL**2 * formed + NODE_KIND**2 * alike)
    work_a, work_b = _padded_work(a), _padded_work(b)
    us_per_mac = float(b_us.sum()) / max(float(work_b.sum()), 1.0)
    by_work = executed * np.outer(work_a, work_b) * (WORK * us_per_mac) ** 2
    return np.outer(a_us, b_us) * relative + by_work, per_node


def _padded_work(keys: Sequence[LayerKey]) -> Array:
    """Return the multiply-adds of layers whose channels fill whole tiles, (keys,)."""
    counts = np.maximum(_counts(keys), 1)
    padded = np.ceil(counts / WORK_TILE) * WORK_TILE / counts
    single = [key.conv_groups > 1 for key in keys]  # grouped: one filter reads few channels
    macs = np.array([key.batch * key.weights * prod(key.out_size) for key in keys], dtype=float)
    return np.asarray(macs * padded[:, 1] * np.where(single, 1.0, padded[:, 0]))


def _condition(spread: Array, noise: Array, values: Array) -> tuple[float, Array]:
    """Return how well a Gaussian process predicts each value from the others, and its weights.

    Outliers weigh less, and count less in the score: the log density of each value under a Student
    distribution (four degrees of freedom) around its prediction from all others.
    """
    variance = noise**2
    for _ in range(3):
        inverse = np.linalg.inv(spread + np.diag(variance))
        pull = inverse @ values
        deviation = 1 / np.sqrt(np.diag(inverse))
        left_out = np.abs(pull) * deviation  # in standard deviations
        variance = noise**2 * np.maximum(1.0, left_out / 2.5) ** 2
    score = -np.log(deviation).sum() - 2.5 * np.log1p(left_out**2 / 4).sum()
    return float(score), np.asarray(pull)

"""Sums of layers' times against end-to-end times.

A Gaussian process, in which what the profiler gets wrong is shared by all layers, by one kind of
layer, by neighbouring widths, follows the multiply-adds, or belongs to one entry; only as much is
shared as the end-to-end times support.

Reference:
    Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, sec. 2.2 (prediction),
    5.4.2 (leave-one-out in closed form). Sums of a process's values as observations are linear
    functionals, sec. 9.4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np
import numpy.typing as npt

from hardware.latency.fitting import LEAST_US, closeness, counts_of
from hardware.latency.layers import Kind, LayerKey

Array = npt.NDArray[np.float64]

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
    counts_a, counts_b = counts_of(a), counts_of(b)
    widest = np.ones((len(kinds), 2))
    np.maximum.at(widest, kind_a, counts_a)
    np.maximum.at(widest, kind_b, counts_b)
    alike = kind_a[:, None] == kind_b[None, :]
    index = {key: i for i, key in enumerate(b)}
    same = np.zeros(alike.shape)
    for row, key in enumerate(a):
        if key in index:
            same[row, index[key]] = 1.0
    near = closeness(counts_a / widest[kind_a], counts_b / widest[kind_b])
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
    counts = np.maximum(counts_of(keys), 1)
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

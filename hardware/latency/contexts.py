"""What the rest of a network does to each of its layers.

A layer takes longer in a network that moves more memory: fewer of its weights and inputs are still
in the caches when it runs again. On a core with 1 MB of L2, OpenVINO took about 10 us longer for a
megabyte of a layer's weights or inputs per e-fold of what the whole ResNet-18 reads and writes: one
max pooling took 114 us in a wide network, 40 us in a narrow one. So times of one layer in several
networks are brought to one amount of traffic before they are compared, and to that of a plan when
it is predicted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log, prod, sqrt

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from hardware.latency.layers import Kind, LayerKey
from hardware.latency.pacing import paced_us
from hardware.latency.table import LatencyTable, Variant

Array = npt.NDArray[np.float64]

LEAST_US = 1.0  # shorter layers say nothing of a few per cent
USUAL_ERROR, LEAST_ERROR_US = 0.01, 0.1  # of one time, relative and absolute
# Prior standard deviation of what an element gains per e-fold, as a share of what networks take per
# element that they move. On quiet machines 0.02 to 0.3 were found; noise may claim twenty times as
# much where little was measured twice.
USUAL_GAIN = 0.1
# Likewise of what one kind of layer gains beside that, as a share of its time; least scatter of
# such shares. The first layer gains most, whose input nobody has just written.
KIND_GAIN, KIND_ERROR = 0.05, 0.03
OUTLIER = 2.0  # standard deviations beyond which times count less
LEAST_SCATTER = 0.1  # of times around what is found, in errors as above
ROUNDS = 10  # of weighing outliers anew
LEAST_LEFT = 0.3  # of a layer's time, whatever is taken off


@dataclass(frozen=True, slots=True, kw_only=True)
class Contexts:
    """What layers gain per e-fold of the network's traffic, for each element of their own."""

    us_per_element: Array  # (3,) of weights, inputs and outputs, >= 0
    by_kind: Mapping[Kind, float]  # beside that, as a share of a layer's time
    usual: float  # log of the elements of the network whose layers take what `levelled` says

    def extra_us(self, keys: Sequence[LayerKey], times_us: Array, elements: int) -> Array:
        """Return how much longer than usual layers take in a network of so many, (keys,).

        Args:
            keys: the layers.
            times_us: (keys,) what they take in a network of the usual traffic.
            elements: what the network reads and writes.
        """
        distance = log(max(elements, 1)) - self.usual
        gain = _traffic(keys) @ self.us_per_element + self._shares(keys) * times_us
        return np.asarray(distance * gain)

    def _shares(self, keys: Sequence[LayerKey]) -> Array:
        return np.array([self.by_kind.get(key.kind, 0.0) for key in keys])

    def levelled_us(self, table: LatencyTable) -> Array:
        """Return what the table's entries take in a network of the usual traffic, (entries,)."""
        times: list[list[float]] = [[] for _ in table.entries]
        for variant, measured in zip(table.variants, paced_us(table), strict=True):
            keys = [table.entries[place].key for place in variant.entries]
            distance = log(max(elements_in(table, variant), 1)) - self.usual
            level = measured - distance * (_traffic(keys) @ self.us_per_element)
            level /= np.maximum(1 + distance * self._shares(keys), LEAST_LEFT)
            level = np.maximum(level, LEAST_LEFT * measured)
            level = np.where(measured > LEAST_US, level, measured)
            for place, time_us in zip(variant.entries, level.tolist(), strict=True):
                times[place].append(time_us)
        return np.array([np.median(found) for found in times])


def contexts_of(table: LatencyTable) -> Contexts:
    """Return what layers tell that were measured in several networks.

    Each is compared with itself alone, so that nothing is mistaken for the rest of the network that
    comes of the layer's own widths.
    """
    logs = [log(max(elements_in(table, variant), 1)) for variant in table.variants]
    seen: dict[LayerKey, list[tuple[float, float]]] = {}
    for variant, times_us, elements in zip(table.variants, paced_us(table), logs, strict=True):
        if variant.is_crowded or not table.is_at_pace(variant):
            continue
        for place, time_us in zip(variant.entries, times_us.tolist(), strict=True):
            if time_us > LEAST_US:
                seen.setdefault(table.entries[place].key, []).append((elements, time_us))
    usual = float(np.median(logs)) if logs else 0.0
    again = {key: np.array(found) for key, found in seen.items() if len(found) > 1}
    if not again:
        return Contexts(us_per_element=np.zeros(3), by_kind={}, usual=usual)
    features, changes, errors_us = [], [], []
    for key, pairs in again.items():
        # An entry of n times tells n - 1 differences.
        centred = (pairs - pairs.mean(axis=0)) * sqrt(len(pairs) / (len(pairs) - 1))
        features.append(centred[:, :1] * _traffic([key]))
        changes.append(centred[:, 1])
        error_us = USUAL_ERROR * float(np.median(pairs[:, 1])) + LEAST_ERROR_US
        errors_us.append(np.full(len(pairs), error_us))
    per_element_us = [
        1000 * variant.end_to_end.median_ms / max(elements_in(table, variant), 1)
        for variant in table.variants
    ]
    told = _robust_weights(
        np.concatenate(features),
        np.concatenate(changes),
        np.concatenate(errors_us),
        USUAL_GAIN * float(np.median(per_element_us)),
    )
    return Contexts(us_per_element=told, by_kind=_by_kind(again, told), usual=usual)


def _by_kind(again: Mapping[LayerKey, Array], us_per_element: Array) -> dict[Kind, float]:
    """Return what each kind of layer gains per e-fold beside what its elements do, relative.

    Args:
        again: of layers measured in several networks, the log of each one's traffic and the time.
        us_per_element: what all kinds gain.
    """
    found: dict[Kind, list[Array]] = {}
    for key, pairs in again.items():
        centred = (pairs - pairs.mean(axis=0)) * sqrt(len(pairs) / (len(pairs) - 1))
        left_us = centred[:, 1] - centred[:, 0] * (_traffic([key]) @ us_per_element)
        relative = np.stack([centred[:, 0], left_us / float(np.median(pairs[:, 1]))], axis=1)
        found.setdefault(key.kind, []).append(relative)
    return {kind: _robust_slope(np.concatenate(rows)) for kind, rows in found.items()}


def _robust_slope(points: Array) -> float:
    """Return the slope through the origin of points (n, 2), at first thought to be about 0."""
    x, y = points.T
    slope, weights = 0.0, np.ones(len(x))
    for _ in range(ROUNDS):
        off = np.abs(y - slope * x)
        scatter = max(1.4826 * float(np.median(off)), KIND_ERROR)
        weights = np.minimum(1.0, OUTLIER * scatter / np.maximum(off, 1e-12))
        slope = float((weights * x) @ y / ((weights * x) @ x + (scatter / KIND_GAIN) ** 2))
    return slope


def elements_of(keys: Sequence[LayerKey]) -> int:
    """Return the number of elements that these layers read and write in one inference."""
    return int(_traffic(keys).sum())


def elements_in(table: LatencyTable, variant: Variant) -> int:
    """Return the number of elements that a variant's layers read and write in one inference."""
    return elements_of([table.entries[place].key for place in variant.entries])


def _traffic(keys: Sequence[LayerKey]) -> Array:
    """Return the numbers of weights, inputs and outputs of layers, whole batch, (keys, 3)."""
    rows = [
        (
            key.weights,
            key.batch * key.in_channels * prod(key.in_size),
            key.batch * key.out_channels * prod(key.out_size),
        )
        for key in keys
    ]
    return np.array(rows, dtype=np.float64).reshape(-1, 3)


def _robust_weights(features: Array, values: Array, errors: Array, usual: float) -> Array:
    """Return non-negative weights of the features, at first thought to be about as large as usual.

    Outliers count less and less; all values do where they scatter more than their errors say.
    """
    rows, wanted = features * (usual / errors[:, None]), values / errors
    width = features.shape[1]
    sure = np.ones(len(rows))
    told = np.zeros(width)
    for _ in range(ROUNDS):
        told, _ = nnls(
            np.concatenate([rows * sure[:, None], np.eye(width)]),
            np.concatenate([wanted * sure, np.zeros(width)]),
        )
        off = np.abs(wanted - rows @ told)
        scatter = max(1.4826 * float(np.median(off)), 1e-3)
        sure = np.sqrt(np.minimum(1.0, OUTLIER * scatter / np.maximum(off, 1e-12)))
        sure /= max(scatter, LEAST_SCATTER)
    return np.asarray(told * usual)


__all__ = ["Contexts", "contexts_of", "elements_in", "elements_of"]

"""What the rest of a network does to each of its layers.

A layer takes longer in a network that moves more memory: fewer of its weights and inputs are still
in the caches when it runs again. On a core with 1 MB of L2, OpenVINO took about 10 us longer for a
megabyte of a layer's weights or inputs per e-fold of what the whole ResNet-18 reads and writes: one
max pooling took 114 us in a wide network, 40 us in a narrow one. So times of one layer in several
networks are brought to one amount of traffic before they are compared, and to that of a plan when
it is predicted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, prod, sqrt

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from hardware.keys import LayerKey
from hardware.pacing import paced_us
from hardware.tables import LatencyTable, Variant

Array = npt.NDArray[np.float64]

LEAST_US = 1.0  # shorter layers say nothing of a few per cent
USUAL_ERROR, LEAST_ERROR_US = 0.01, 0.1  # of one time, relative and absolute
# Prior standard deviation of what an element gains per e-fold, as a share of what networks take per
# element that they move. On quiet machines 0.02 to 0.3 were found; noise may claim twenty times as
# much where little was measured twice.
USUAL_GAIN = 0.1
OUTLIER = 2.0  # standard deviations beyond which times count less
LEAST_SCATTER = 0.1  # of times around what is found, in errors as above
ROUNDS = 10  # of weighing outliers anew
LEAST_LEFT = 0.3  # of a layer's time, whatever is taken off


@dataclass(frozen=True, slots=True, kw_only=True)
class Contexts:
    """What layers gain per e-fold of the network's traffic, for each element of their own."""

    us_per_element: Array  # (3,) of weights, inputs and outputs, >= 0
    usual: float  # log of the elements of the network whose layers take what `levelled` says

    def extra_us(self, keys: Sequence[LayerKey], elements: int) -> Array:
        """Return how much longer than usual layers take in a network of so many, (keys,)."""
        distance = log(max(elements, 1)) - self.usual
        return np.asarray(distance * (_traffic(keys) @ self.us_per_element))

    def levelled_us(self, table: LatencyTable) -> Array:
        """Return what the table's entries take in a network of the usual traffic, (entries,)."""
        times: list[list[float]] = [[] for _ in table.entries]
        for variant, measured in zip(table.variants, paced_us(table), strict=True):
            keys = [table.entries[place].key for place in variant.entries]
            level = measured - self.extra_us(keys, elements_in(table, variant))
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
        return Contexts(us_per_element=np.zeros(3), usual=usual)
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
    return Contexts(us_per_element=told, usual=usual)


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

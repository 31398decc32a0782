"""From a latency table to what every width of every layer costs, and what a whole plan costs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from hardware.errors import MissingLatencyError
from hardware.latency.entries import Entry
from hardware.latency.layers import Kind, Layer, LayerKey
from hardware.latency.staircase import fit_kind
from hardware.latency.table import LatencyTable

Array = npt.NDArray[np.float64]
Candidates = Mapping[str, tuple[int, ...]]
Widths = Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCost:
    """What one layer, or a part of it, adds to the end-to-end time, per width of its groups.

    A layer of more than two groups comes as several costs that add up to it.
    """

    layer: str
    groups: tuple[str, ...]  # none, one or two
    cost_us: Array  # one axis per group, over its candidates
    measured: npt.NDArray[np.bool_]  # likewise; False where the cost is an estimate


def costs(
    table: LatencyTable,
    layers: Sequence[Layer],
    candidates: Candidates,
    around: Widths | None = None,
) -> tuple[LayerCost, ...]:
    """Return what each layer costs at each candidate width, so that sums predict whole networks.

    Args:
        table: of one device.
        layers: of the template.
        candidates: widths per group, ascending; groups that are not named stay whole.
        around: where the costs of layers of more than two groups are exact (they are linearised:
            plan again around the plan found); None: where all groups are whole.

    Raises:
        MissingLatencyError: a kind of layer that was never measured.
    """
    whole = {name: max(widths) for name, widths in candidates.items()}
    around = {**whole, **{n: w for n, w in (around or {}).items() if n in whole}}
    parts = [part for layer in layers for part in _parts(layer, candidates, around)]
    known = LayerTimes(table, layers)
    known.learn(key for part in parts for keys, _ in part.signed for key in keys if key)
    return tuple(_cost(part, known) for part in parts)


def predict_plan_ms(table: LatencyTable, layers: Sequence[Layer], widths: Widths) -> float:
    """Return the predicted end-to-end time at these group widths, with nothing linearised.

    Groups that are not named are whole.

    Raises:
        MissingLatencyError: a kind of layer that was never measured.
    """
    return _sum_ms(LayerTimes(table, layers), keys_of(layers, widths))


def predict_keys_ms(table: LatencyTable, keys: Sequence[LayerKey]) -> float:
    """Return the predicted end-to-end time of a network, given as what it executes.

    A kind of layer that was never measured counts as nothing.
    """
    return _sum_ms(LayerTimes(table, ()), keys)


def _sum_ms(known: "LayerTimes", keys: Sequence[LayerKey]) -> float:
    known.learn(keys)
    return sum(known.us(key) for key in keys) / 1000


def predict_ms(costs: Iterable[LayerCost], candidates: Candidates, widths: Widths) -> float:
    """Return the predicted end-to-end time of a network at these group widths.

    Groups that are not named have their largest candidate width.

    Raises:
        MissingLatencyError: a width that is not among the candidates.
    """
    total_us = 0.0
    for cost in costs:
        place = []
        for name in cost.groups:
            width = widths.get(name, max(candidates[name]))
            if width not in candidates[name]:
                raise MissingLatencyError(
                    f"Width {width} of {name} is not among its candidates {candidates[name]}; "
                    "ask for the costs of candidates that contain it."
                )
            place.append(candidates[name].index(width))
        total_us += float(cost.cost_us[tuple(place)])
    return total_us / 1000


def layer_times(
    costs: Iterable[LayerCost], candidates: Candidates, widths: Widths
) -> tuple[dict[str, float], dict[str, bool]]:
    """Return what each layer adds at these widths, microseconds, and whether that was measured.

    Args:
        costs: of every layer over the candidates.
        candidates: per group, ascending.
        widths: per group, each among its candidates.
    """
    times_us: dict[str, float] = {}
    measured: dict[str, bool] = {}
    for cost in costs:
        place = tuple(candidates[name].index(widths[name]) for name in cost.groups)
        times_us[cost.layer] = times_us.get(cost.layer, 0.0) + float(cost.cost_us[place])
        measured[cost.layer] = measured.get(cost.layer, True) and bool(cost.measured[place])
    return times_us, measured


def keys_of(layers: Iterable[Layer], widths: Widths) -> list[LayerKey]:
    """Return what a network with these layers executes at these group widths, in order."""
    keys = (
        layer.rest_key_at(widths) if layer.is_emptied(widths) else layer.key_at(widths)
        for layer in layers
    )
    return [key for key in keys if key is not None]


@dataclass(frozen=True, slots=True)
class _Part:
    """A layer, or a part of it, whose costs are to be made over the candidates of its groups."""

    layer: Layer
    groups: tuple[str, ...]
    shape: tuple[int, ...]
    # Keys over the grid of the groups' candidates (row major), and the sign of their costs.
    signed: tuple[tuple[list[LayerKey | None], float], ...]


def _parts(layer: Layer, candidates: Candidates, around: Widths) -> Iterator[_Part]:
    """Yield the parts of a layer, each over at most two groups.

    With more than two groups, one of them (the pivot: one that empties the layer, else its first
    output group) keeps its full interplay with each of the others; those add up linearly.
    """
    groups = [name for name in layer.groups if name in candidates]
    if len(groups) <= 2:
        yield _part(layer, groups, {}, candidates, [({}, 1.0)])
        return
    triggers = [name for name in groups if name in layer.vanishes_with]
    pivot = (triggers or [name for name in layer.out_parts if name in groups] or groups)[0]
    others = [name for name in groups if name != pivot]
    middle = {name: around[name] for name in others}
    middle |= {n: max(candidates[n]) for n in others if n in layer.vanishes_with and not middle[n]}
    yield _part(layer, [pivot], middle, candidates, [({}, 1.0)])
    for name in others:
        rest = {other: width for other, width in middle.items() if other != name}
        yield _part(layer, [pivot, name], rest, candidates, [({}, 1.0), (middle, -1.0)])


def _part(
    layer: Layer,
    groups: Sequence[str],
    fixed: Widths,
    candidates: Candidates,
    signs: Sequence[tuple[Widths, float]],
) -> _Part:
    axes = [candidates[name] for name in groups]
    signed = []
    for instead, sign in signs:
        keys = []
        for point in product(*axes):
            at = {**fixed, **dict(zip(groups, point, strict=True))}
            gone = {n: w for n, w in at.items() if w == 0 and n in layer.vanishes_with}
            at |= {**instead, **gone}
            keys.append(layer.rest_key_at(at) if gone else layer.key_at(at))
        signed.append((keys, sign))
    return _Part(layer, tuple(groups), tuple(len(axis) for axis in axes), tuple(signed))


def _cost(part: _Part, known: "LayerTimes") -> LayerCost:
    cost = np.zeros(part.shape)
    measured = np.ones(part.shape, dtype=bool)
    for keys, sign in part.signed:
        cost += sign * np.array([known.us(key) for key in keys]).reshape(part.shape)
        measured &= np.array([known.is_measured(key) for key in keys]).reshape(part.shape)
    return LayerCost(layer=part.layer.name, groups=part.groups, cost_us=cost, measured=measured)


class LayerTimes:
    """What every layer adds to a network's time: measured where it was, else estimated."""

    def __init__(self, table: LatencyTable, layers: Iterable[Layer]) -> None:
        """Prepare to tell times.

        Args:
            table: of one device.
            layers: of the template: each of their kinds must have been measured. What is left of
                an emptied branch need not: it costs nothing until it is measured.
        """
        self.table = table
        self.required = {layer.key.kind for layer in layers}
        self.times_us: dict[LayerKey | None, float] = {None: 0.0}
        self.entries: dict[Kind, list[Entry]] = {}
        for entry in table.entries:
            self.entries.setdefault(entry.key.kind, []).append(entry)

    def learn(self, keys: Iterable[LayerKey]) -> None:
        """Work out what these layers add.

        Raises:
            MissingLatencyError: a kind of layer that was never measured.
        """
        wanted: dict[Kind, list[LayerKey]] = {}
        for key in dict.fromkeys(keys):
            wanted.setdefault(key.kind, []).append(key)
        for kind, same in wanted.items():
            if kind in self.entries:
                times_us = fit_kind(self.entries[kind]).predict(same).tolist()
            elif kind in self.required:
                size = "x".join(map(str, same[0].in_size))
                raise MissingLatencyError(
                    f"No {same[0].operator} of {size} px has been measured on "
                    f"{self.table.key.device}. Measure this network: espalier profile."
                )
            else:
                times_us = [0.0] * len(same)
            self.times_us.update(zip(same, times_us, strict=True))

    def us(self, key: LayerKey | None) -> float:
        """Return what a layer adds, microseconds; 0 of nothing."""
        return self.times_us[key]

    def is_measured(self, key: LayerKey | None) -> bool:
        """Tell whether a layer was measured at just these channel counts."""
        return key is None or key in self.table.by_key

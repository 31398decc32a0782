"""From a latency table to what every width of every layer costs, and what a whole plan costs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from hardware.errors import MissingLatencyError
from hardware.latency.calibrating import Calibration, calibrate
from hardware.latency.contexts import contexts_of, elements_in, elements_of
from hardware.latency.fitting import FamilyModel, fit_families, settled_us
from hardware.latency.layers import Kind, Layer, LayerKey
from hardware.latency.table import Entry, LatencyTable

Array = npt.NDArray[np.float64]
Candidates = Mapping[str, tuple[int, ...]]
Widths = Mapping[str, int]

OUTSIDE = "(outside the layers)"
LEAST_SHARE = 0.1  # of a layer's profiled time that corrections leave, whatever they say
PACE_ERROR = 0.5  # how wrong a ratio to the full network is, as a share of how far the pace was off


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

    Measured entries count the more the more networks they were measured in, beside what their kind
    of layer tells; the others are estimated from that. Both are corrected so that sums over layers
    agree with the end-to-end times of the variants.

    Args:
        table: of one device.
        layers: of the template.
        candidates: widths per group, ascending; groups that are not named stay whole.
        around: where the costs are exact (layers take longer the more memory the whole network
            moves, and those of more than two groups are linearised: plan again around the plan
            found); None: where all groups are whole.

    Raises:
        MissingLatencyError: a kind of layer that was never measured.
    """
    whole = {name: max(widths) for name, widths in candidates.items()}
    around = {**whole, **{n: w for n, w in (around or {}).items() if n in whole}}
    kinds = frozenset(layer.key.kind for layer in layers)
    prices = _Prices(table, kinds)
    pieces = [piece for layer in layers for piece in _pieces(layer, candidates, around)]
    wanted = (key for _, terms in pieces for keys, _ in terms for key in keys if key)
    prices.learn(wanted, _elements_at(layers, around))
    found = [_cost(layer_piece, terms, prices) for layer_piece, terms in pieces]
    outside = LayerCost(
        layer=OUTSIDE,
        groups=(),
        cost_us=np.array(prices.calibration.outside_us),
        measured=np.array(True),
    )
    return (*found, outside)


def predict_plan_ms(table: LatencyTable, layers: Sequence[Layer], widths: Widths) -> float:
    """Return the predicted end-to-end time at these group widths, with nothing linearised.

    Groups that are not named are whole.

    Raises:
        MissingLatencyError: a kind of layer that was never measured.
    """
    candidates = {name: (width,) for name, width in widths.items()}
    return predict_ms(costs(table, layers, candidates, around=widths), candidates, widths)


def predict_networks_ms(
    table: LatencyTable, networks: Sequence[Sequence[LayerKey]]
) -> tuple[float, ...]:
    """Return the predicted end-to-end time of each network, given as the layers that it executes.

    Raises:
        MissingLatencyError: a kind of layer that was never measured.
    """
    prices = _Prices(table, {key.kind for keys in networks for key in keys})
    found = []
    for keys in networks:
        prices.learn(keys, elements_of(keys))
        found.append(sum(prices.us(key) for key in keys) + prices.calibration.outside_us)
    return tuple(time_us / 1000 for time_us in found)


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


def _elements_at(layers: Iterable[Layer], widths: Widths) -> int:
    """Return the number of elements that a network of these widths reads and writes."""
    keys = [layer.key_at(widths) or layer.rest_key_at(widths) for layer in layers]
    return elements_of([key for key in keys if key is not None])


def layer_times(
    costs: Iterable[LayerCost], candidates: Candidates, widths: Widths
) -> tuple[dict[str, float], dict[str, bool]]:
    """Return what each layer adds at these widths, microseconds, and whether that was measured.

    Args:
        costs: of every layer over the candidates; what lies outside the layers is left out.
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


@dataclass(frozen=True, slots=True)
class _Piece:
    """One cost to be made: of which layer, over which groups."""

    layer: Layer
    groups: tuple[str, ...]
    shape: tuple[int, ...]


Terms = list[tuple[list[LayerKey | None], float]]
"""Keys over the piece's grid (row major) and the sign with which their costs enter."""


def _pieces(layer: Layer, candidates: Candidates, around: Widths) -> Iterator[tuple[_Piece, Terms]]:
    """Yield the pieces of a layer, each over at most two groups.

    With more than two groups, one of them (the pivot: one that empties the layer, else its first
    output group) keeps its full interplay with each of the others; those add up linearly.
    """
    groups = [name for name in layer.groups if name in candidates]
    if len(groups) <= 2:
        yield _piece(layer, groups, {}, candidates, [({}, 1.0)])
        return
    triggers = [name for name in groups if name in layer.vanishes_with]
    pivot = (triggers or [name for name in layer.out_parts if name in groups] or groups)[0]
    others = [name for name in groups if name != pivot]
    middle = {name: around[name] for name in others}
    middle |= {n: max(candidates[n]) for n in others if n in layer.vanishes_with and not middle[n]}
    yield _piece(layer, [pivot], middle, candidates, [({}, 1.0)])
    for name in others:
        rest = {other: width for other, width in middle.items() if other != name}
        yield _piece(layer, [pivot, name], rest, candidates, [({}, 1.0), (middle, -1.0)])


def _piece(
    layer: Layer,
    groups: Sequence[str],
    fixed: Widths,
    candidates: Candidates,
    signs: Sequence[tuple[Widths, float]],
) -> tuple[_Piece, Terms]:
    axes = [candidates[name] for name in groups]
    terms: Terms = []
    for instead, sign in signs:
        keys = []
        for point in product(*axes):
            at = {**fixed, **dict(zip(groups, point, strict=True))}
            gone = {n: w for n, w in at.items() if w == 0 and n in layer.vanishes_with}
            at |= {**instead, **gone}
            keys.append(layer.rest_key_at(at) if gone else layer.key_at(at))
        terms.append((keys, sign))
    return _Piece(layer, tuple(groups), tuple(len(axis) for axis in axes)), terms


def _cost(piece: _Piece, terms: Terms, prices: "_Prices") -> LayerCost:
    cost = np.zeros(piece.shape)
    measured = np.ones(piece.shape, dtype=bool)
    for keys, sign in terms:
        cost += sign * np.array([prices.us(key) for key in keys]).reshape(piece.shape)
        measured &= np.array([prices.is_measured(key) for key in keys]).reshape(piece.shape)
    return LayerCost(layer=piece.layer.name, groups=piece.groups, cost_us=cost, measured=measured)


class _Prices:
    """What every key costs end to end: measured where it was, else estimated, then calibrated."""

    def __init__(self, table: LatencyTable, kinds: Set[Kind]) -> None:
        """Fit the table.

        Args:
            table: of one device.
            kinds: of layer that must have been measured; variants of others are left aside.
        """
        self.table, self.kinds = table, kinds
        self.contexts = contexts_of(table)
        levelled = [
            entry.model_copy(update={"median_us": level_us})
            for entry, level_us in zip(
                table.entries, self.contexts.levelled_us(table).tolist(), strict=True
            )
        ]
        by_kind: dict[Kind, list[Entry]] = {}
        for entry in levelled:
            by_kind.setdefault(entry.key.kind, []).append(entry)
        self.models = fit_families(by_kind)
        self.settled_us = settled_us(levelled, self.models)
        keys = [entry.key for entry in table.entries]
        self.settled = dict(zip(keys, self.settled_us.tolist(), strict=True))
        self.calibration = self._calibration()
        self.known: dict[LayerKey, float] = {}

    def learn(self, keys: Iterable[LayerKey], elements: int) -> None:
        """Work out the cost of these keys in a network that reads and writes so many elements."""
        wanted = list(dict.fromkeys(keys))
        by_kind: dict[Kind, list[LayerKey]] = {}
        raw: dict[LayerKey, float] = {}
        for key in wanted:
            if key in self.settled:
                raw[key] = self.settled[key]
            else:
                by_kind.setdefault(key.kind, []).append(key)
        for kind, unseen in by_kind.items():
            model = self._model(kind, unseen[0])
            times = np.zeros(len(unseen)) if model is None else model.predict(unseen)
            raw.update(zip(unseen, times.tolist(), strict=True))
        times_us = np.array([raw[key] for key in wanted])
        priced = times_us + self.calibration.corrections(wanted, times_us)
        priced += self.contexts.extra_us(wanted, times_us, elements)
        priced = np.where(times_us > 0, np.maximum(priced, LEAST_SHARE * times_us), 0.0)
        self.known = dict(zip(wanted, priced.tolist(), strict=True))

    def us(self, key: LayerKey | None) -> float:
        """Return the cost of a key; 0 of nothing."""
        return 0.0 if key is None else self.known[key]

    def is_measured(self, key: LayerKey | None) -> bool:
        """Tell whether a key's cost rests on a measurement."""
        return key is None or key in self.table.by_key

    def _model(self, kind: Kind, example: LayerKey) -> FamilyModel | None:
        if kind not in self.models and kind in self.kinds:
            raise MissingLatencyError(
                f"No {example.operator} of {'x'.join(map(str, example.in_size))} px has been "
                f"measured on {self.table.key.device}. Measure this network: espalier profile."
            )
        return self.models.get(kind)  # None: left of an emptied branch, free until measured

    def _calibration(self) -> Calibration:
        """Learn from the variants that consist of layers of these kinds."""
        entries = self.table.entries
        ours = np.array([entry.key.kind in self.kinds for entry in entries], dtype=bool)
        rows, targets, uncertain = [], [], []
        for variant in self.table.variants:
            places = np.array(variant.entries, dtype=np.intp)
            times = np.array(variant.times_us)
            if len(places) and times[ours[places]].sum() >= 0.9 * times.sum():
                rows.append(np.bincount(places, minlength=len(entries)))
                keys = [entries[place].key for place in places]
                elements = elements_in(self.table, variant)
                extra = self.contexts.extra_us(keys, self.settled_us[places], elements).sum()
                targets.append(1000 * self.table.corrected_ms(variant) - extra)
                # A 95 % interval is four standard deviations wide.
                latency, off = variant.end_to_end, abs(self.table.drift(variant) - 1)
                sampled_us = 250 * (latency.high_ms - latency.low_ms)
                uncertain.append(float(np.hypot(sampled_us, PACE_ERROR * off * targets[-1])))
        counts = np.array(rows, dtype=np.float64).reshape(len(rows), len(entries))
        used = np.flatnonzero(counts.any(axis=0))
        return calibrate(
            [entries[i].key for i in used],
            self.settled_us[used],
            counts[:, used],
            np.array(targets),
            np.array(uncertain),
        )

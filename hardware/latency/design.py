"""Which variants to build: a design of experiments for latency tables.

Every build measures one width pair of every layer, so variants are chosen for all layers at once:
each next variant is the one whose pairs lie farthest from what has been measured, weighted by what
the layers cost. Pairs that two layers of one kind share are counted once.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle

import numpy as np
import numpy.typing as npt

from hardware.graph.channel_map import Branch
from hardware.latency.layers import Kind, Layer, LayerKey

Candidates = Mapping[str, tuple[int, ...]]
EMPTIED_SHARE = 0.15  # of the branches, in each variant after the first ones
# What a layer takes depends on the rest of the network too: caches keep more of a narrow one.
# Widths drawn group by group make networks of middling size only, so every fourth variant is drawn
# among widths up to such a share of the widest.
CEILINGS = (1.0, 0.25, 1.0, 1.0, 1.0, 0.5, 1.0, 1.0)
ASCENTS = 2  # passes of coordinate ascent per variant
AGAIN = 1e-3  # what measuring a pair once more is worth, as a squared distance


def design(
    layers: Sequence[Layer],
    candidates: Candidates,
    branches: Sequence[Branch],
    seen: Iterable[LayerKey],
    weights: Mapping[str, float],
    seed: int,
) -> Iterator[dict[str, int]]:
    """Yield the widths of variant after variant, without end.

    First the full network, all widths smallest, all in the middle, then every second branch
    emptied and the others; from there on whatever is farthest from what was seen.

    Args:
        layers: of the template.
        candidates: widths per group; 0 among them where the group's branch may be emptied.
        branches: of the channel map.
        seen: keys that have been measured before.
        weights: importance of each layer, by name; others count 1.
        seed: of the random starts.
    """
    whole = {name: max(widths) for name, widths in candidates.items()}
    alive = {name: tuple(w for w in widths if w) or widths for name, widths in candidates.items()}
    removable = [b for b in branches if all(0 in candidates.get(g, ()) for g in b.groups)]
    yield whole
    space = _Space(layers, seen)
    generator = np.random.default_rng(seed)
    first = [
        {name: widths[0] for name, widths in alive.items()},
        {name: widths[len(widths) // 2] for name, widths in alive.items()},
        *(_emptied(whole, half) for half in (removable[0::2], removable[1::2]) if half),
    ]
    for widths in first:
        space.add(widths)
        yield widths
    for ceiling in cycle(CEILINGS):
        allowed = {name: _up_to(ceiling, widths) for name, widths in alive.items()}
        gone = [b for b in removable if generator.random() < EMPTIED_SHARE]
        fixed = {group: 0 for branch in gone for group in branch.groups}
        widths = {n: int(generator.choice(w)) for n, w in allowed.items()} | fixed
        for _ in range(ASCENTS):
            for name in generator.permutation([n for n in alive if n not in fixed]):
                gains = [
                    space.gain({**widths, name: width}, name, weights) for width in allowed[name]
                ]
                # Where nothing is gained the width stays as it was drawn: of many layers of one
                # kind most are free, and would all end at the first of equals, the narrowest.
                if max(gains) > gains[allowed[name].index(widths[name])]:
                    widths[name] = allowed[name][int(np.argmax(gains))]
        space.add(widths)
        yield widths


def _up_to(ceiling: float, widths: tuple[int, ...]) -> tuple[int, ...]:
    """Return the widths up to a share of the largest; the smallest where none is."""
    return tuple(w for w in widths if w <= ceiling * max(widths)) or (min(widths),)


def _emptied(widths: Mapping[str, int], branches: Iterable[Branch]) -> dict[str, int]:
    return {**widths, **{group: 0 for branch in branches for group in branch.groups}}


class _Space:
    """The channel counts seen so far, per kind of layer, as shares of the widest."""

    def __init__(self, layers: Sequence[Layer], seen: Iterable[LayerKey]) -> None:
        self.layers = layers
        self.kinds = {layer.name: layer.key.kind for layer in layers}
        self.touching: dict[str, list[Layer]] = {}
        self.widest: dict[Kind, npt.NDArray[np.float64]] = {}
        for layer in layers:
            full = np.array([layer.key.in_channels, layer.key.out_channels], dtype=np.float64)
            kind = self.kinds[layer.name]
            self.widest[kind] = np.maximum(self.widest.get(kind, full), np.maximum(full, 1))
            for group in layer.groups:
                self.touching.setdefault(group, []).append(layer)
        self.points: dict[Kind, list[npt.NDArray[np.float64]]] = {}
        for key in seen:
            if (kind := key.kind) in self.widest:
                counts = np.array([key.in_channels, key.out_channels], dtype=np.float64)
                self.points.setdefault(kind, []).append(counts / self.widest[kind])

    def place(self, layer: Layer, widths: Mapping[str, int]) -> npt.NDArray[np.float64]:
        """Return where a layer's channel counts lie, (2,)."""
        counts = np.array(layer.channels_at(widths), dtype=np.float64)
        return np.asarray(counts / self.widest[self.kinds[layer.name]])

    def add(self, widths: Mapping[str, int]) -> None:
        """Count a variant's pairs as seen."""
        for layer in self.layers:
            if not layer.is_emptied(widths):
                place = self.place(layer, widths)
                self.points.setdefault(self.kinds[layer.name], []).append(place)

    def gain(self, widths: Mapping[str, int], group: str, weights: Mapping[str, float]) -> float:
        """Return what a variant would tell about the layers that one group touches."""
        total = 0.0
        taken: dict[Kind, list[npt.NDArray[np.float64]]] = {}
        for layer in self.touching.get(group, ()):
            if layer.is_emptied(widths):
                continue
            kind, place = self.kinds[layer.name], self.place(layer, widths)
            known = [*self.points.get(kind, ()), *taken.get(kind, ())]
            square = 1.0
            if known:
                square = float(((np.array(known) - place) ** 2).sum(axis=1).min())
            total += weights.get(layer.name, 1.0) * (square + AGAIN)
            taken.setdefault(kind, []).append(place)
        return total

"""Integer ids of channels, and which of them go together: a union-find over arrays."""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Ids = npt.NDArray[np.int64]

# The role that an axis has in the layer that makes or reads channels outranks what else is done
# with it: a weight that is standardised is a filter, not a constant of the norm.
RANKS = {"filter": 3, "input": 3, "depthwise": 2, "bias": 1, "norm": 1, "other": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """The ids of one axis of one parameter: `start`, `start + 1`, ..., one per position."""

    parameter: str
    axis: int
    start: int
    extent: int


@dataclass(slots=True)
class Unions:
    """A growing set of ids, the pairs of them that go together, and what is known of them."""

    count: int = 1
    blocks: list[Block] = field(default_factory=list)
    roles: dict[int, str] = field(default_factory=dict)  # by index of the block
    same_role: list[set[int]] = field(default_factory=list)  # sets of blocks
    reasons: dict[str, int] = field(default_factory=dict)  # why frozen -> the id that stands for it
    mixed: list[tuple[Ids, tuple[int, ...], str]] = field(default_factory=list)
    _pairs: list[tuple[Ids, Ids]] = field(default_factory=list)

    def fresh(self, extent: int) -> Ids:
        """Return `extent` new ids."""
        ids = np.arange(self.count, self.count + extent, dtype=np.int64)
        self.count += extent
        return ids

    def block(self, parameter: str, axis: int, extent: int) -> Ids:
        """Return fresh ids for one axis of a parameter."""
        block = Block(parameter=parameter, axis=axis, start=self.count, extent=extent)
        self.blocks.append(block)
        return self.fresh(extent)

    def unite(self, one: Ids, other: Ids) -> None:
        """Record that ids at the same place of two arrays, broadcast, go together."""
        if one is other:
            return
        a, b = np.broadcast_arrays(one, other)
        differ = a != b
        if differ.any():
            self._pairs.append((a[differ], b[differ]))

    def freeze(self, ids: Ids, reason: str) -> None:
        """Record that these ids may not be removed, and why."""
        if reason not in self.reasons:
            self.reasons[reason] = int(self.fresh(1)[0])
        self.unite(np.unique(ids), np.array(self.reasons[reason]))

    def mix(self, labels: Ids, axes: tuple[int, ...], operator: str) -> None:
        """Record that an operator mixes what lies along these axes: removing differs from masking.

        Nothing is mixed if in the end the labels do not vary along the axes.
        """
        self.mixed.append((labels, axes, operator))

    def mark(self, ids: Ids, role: str) -> None:
        """Record the role of the parameter axes behind these ids in the layer that reads them."""
        for index in self._with_same_role(self.blocks_of(ids)):
            if RANKS[role] > RANKS[self.roles.get(index, "other")]:
                self.roles[index] = role

    def blocks_of(self, ids: Ids) -> list[int]:
        """Return the index of every block that some of these ids belong to."""
        starts = np.array([block.start for block in self.blocks], dtype=np.int64)
        known = np.unique(ids)
        places = np.searchsorted(starts, known, side="right") - 1
        found: dict[int, None] = {}
        for index, identity in zip(places.tolist(), known.tolist(), strict=True):
            if index >= 0 and identity < self.blocks[index].start + self.blocks[index].extent:
                found[index] = None
        return list(found)

    def share_roles(self, ids: Ids) -> None:
        """Record that the axes behind these ids have one role, as those of w1 and w2 in w1 + w2."""
        self.same_role.append(set(self.blocks_of(ids)))

    def _with_same_role(self, indices: list[int]) -> set[int]:
        """Return blocks and all that have the same role as one of them."""
        found = set(indices)
        before = 0
        while len(found) > before:
            before = len(found)
            for some in self.same_role:
                if some & found:
                    found |= some
        return found

    def roots(self) -> Ids:
        """Return for every id the smallest id that goes with it; frozen ids have root 0."""
        pairs = list(self._pairs)
        if self.reasons:
            frozen = np.array(sorted(self.reasons.values()), dtype=np.int64)
            pairs.append((frozen, np.zeros_like(frozen)))
        return components(pairs, self.count)

    def frozen_reasons(self) -> dict[int, str]:
        """Return for every frozen id the reason, its own or that of an id that it goes with."""
        label = components(self._pairs, self.count)
        by_label: dict[int, str] = {}
        for reason, number in self.reasons.items():
            by_label.setdefault(int(label[number]), reason)
        frozen = np.flatnonzero(np.isin(label, list(by_label)))
        return {int(i): by_label[int(label[i])] for i in frozen}

    def mixers(self, roots: Ids) -> dict[int, str]:
        """Return by root the operators that mix it."""
        found: dict[int, list[str]] = defaultdict(list)
        for labels, axes, operator in self.mixed:
            mine = roots[labels]
            if all((mine == mine.take([0], axis=axis)).all() for axis in axes):
                continue
            for root in np.unique(mine):
                if operator not in found[int(root)]:
                    found[int(root)].append(operator)
        return {root: ", ".join(operators) for root, operators in found.items()}


def components(pairs: list[tuple[Ids, Ids]], count: int) -> Ids:
    """Return for each of `count` ids the smallest id of its connected component."""
    if not pairs:
        return np.arange(count, dtype=np.int64)
    rows = np.concatenate([a.reshape(-1) for a, _ in pairs])
    columns = np.concatenate([b.reshape(-1) for _, b in pairs])
    ones = np.ones(rows.size, dtype=np.int8)
    graph = coo_matrix((ones, (rows, columns)), shape=(count, count))
    number, label = connected_components(graph, directed=False)
    smallest = np.full(number, count, dtype=np.int64)
    np.minimum.at(smallest, label, np.arange(count, dtype=np.int64))
    return smallest[label]

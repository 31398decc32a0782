"""Ties that can be made in more than one way, and the choice among them.

What is left of a value must be rectangular. A channel axis that is split in two, `(groups, rest)`,
can lose the same positions of every group, or whole groups; a grouped convolution likewise. Which
way is better often shows only once the whole graph is known, so such ties wait, and then each is
made the way that leaves most to remove.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.channels.labels import axes_of
from pipeline.channels.unions import Ids, Unions, components


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to tie."""

    unions: tuple[tuple[Ids, Ids], ...] = ()
    frozen: tuple[tuple[Ids, str], ...] = ()
    mixed: tuple[tuple[Ids, tuple[int, ...], str], ...] = ()


Choice = tuple[Option, ...]


def tie(labels: Ids, axis: int) -> tuple[Ids, Ids]:
    """Return the pair to unite so that labels become equal along an axis."""
    return labels.take([0], axis=axis), labels


def rectangle(labels: Ids) -> Choice:
    """Return the ways to make labels vary along one axis only."""
    axes = axes_of(labels)
    return tuple(
        Option(unions=tuple(tie(labels, axis) for axis in axes if axis != kept)) for kept in axes
    )


def resolve(unions: Unions, choices: Sequence[Choice]) -> None:
    """Make every choice, the first in the sequence first.

    A round makes all choices that do not touch one another; then the unions are taken anew.
    """
    pending = list(choices)
    while pending:
        roots = unions.roots()
        touched = np.zeros(unions.count, dtype=bool)
        postponed: list[Choice] = []
        for choice in pending:
            involved = np.unique(roots[_ids(choice)])
            if touched[involved].any():
                postponed.append(choice)
                continue
            scores = [_score(option, involved, roots) for option in choice]
            best = choice[int(np.argmax(scores))]
            if _apply(unions, best, roots):
                involved = involved[involved != 0]
                touched[involved] = True
        pending = postponed


def _ids(choice: Choice) -> Ids:
    """Return every id that a choice touches."""
    parts = [np.zeros(1, dtype=np.int64)]
    for option in choice:
        parts += [ids.reshape(-1) for pair in option.unions for ids in pair]
        parts += [ids.reshape(-1) for ids, _ in option.frozen]
    return np.unique(np.concatenate(parts))


def _score(option: Option, involved: Ids, roots: Ids) -> float:
    """Return how much stays removable; a way that mixes channels counts a quarter."""
    pairs = []
    for one, other in option.unions:
        a, b = np.broadcast_arrays(roots[one], roots[other])
        pairs.append((np.searchsorted(involved, a), np.searchsorted(involved, b)))
    for ids, _ in option.frozen:
        place = np.searchsorted(involved, roots[ids])
        pairs.append((place, np.full_like(place, np.searchsorted(involved, 0))))
    label = components(pairs, involved.size)
    return (np.unique(label).size - 1) * (0.25 if option.mixed else 1.0)


def _apply(unions: Unions, option: Option, roots: Ids) -> bool:
    """Make the ties of an option; return whether that changed anything."""
    changed = False
    for one, other in option.unions:
        changed |= bool((roots[one] != roots[other]).any())
        unions.unite(one, other)
    for ids, reason in option.frozen:
        changed |= bool(roots[ids].any())
        unions.freeze(ids, reason)
    for ids, axes, operator in option.mixed:
        unions.mix(ids, axes, operator)
    return changed

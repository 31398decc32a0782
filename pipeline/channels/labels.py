"""Label arrays: which channel every element of a value belongs to.

A label array has one axis per axis of its value, and size 1 along an axis on which all labels are
equal, so that an activation of a million elements costs as many labels as it has channels.
A value can have several label arrays (*fields*): a convolution's weight has one for its output
axis and one for its input axis. An axis on which no field varies is fixed: nothing along it can be
removed.
"""

import math
from dataclasses import dataclass

import numpy as np

from pipeline.channels.unions import Ids

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """What is known of one value of the graph."""

    shape: Shape
    fields: tuple[Ids, ...] = ()
    is_constant: bool = False  # depends on parameters only, not on the network's input


def axes_of(labels: Ids) -> tuple[int, ...]:
    """Return the axes along which the labels vary."""
    return tuple(axis for axis, extent in enumerate(labels.shape) if extent > 1)


def squash(labels: Ids) -> Ids:
    """Return the labels with size 1 along every axis on which they are all equal."""
    for axis in axes_of(labels):
        first = labels.take([0], axis=axis)
        if (labels == first).all():
            labels = first
    return labels


def along(ids: Ids, rank: int, axis: int) -> Ids:
    """Return a vector of ids as a label array of that rank which varies along one axis."""
    return ids.reshape([-1 if place == axis else 1 for place in range(rank)])


def labels_along(labels: Ids, axis: int) -> Ids:
    """Return labels with their axis `axis` first, the others flattened behind it."""
    return np.moveaxis(labels, axis, 0).reshape(labels.shape[axis], -1)


def reshaped(labels: Ids, old: Shape, new: Shape) -> Ids:
    """Return the labels of a value that is reshaped from `old` to `new`.

    Runs of axes that are reshaped among themselves are handled together; runs on which the labels
    do not vary stay at size 1, so no array larger than needed is made.
    """
    if math.prod(old) != math.prod(new) or 0 in old:
        raise ValueError(f"A value of shape {old} cannot be reshaped to {new}.")
    spread: list[int] = []
    result: list[int] = []
    for old_run, new_run in runs(old, new):
        varies = any(labels.shape[axis] > 1 for axis in old_run)
        spread += [old[axis] if varies else 1 for axis in old_run]
        result += [new[axis] if varies else 1 for axis in new_run]
    return squash(np.broadcast_to(labels, spread).reshape(result))


def runs(old: Shape, new: Shape) -> list[tuple[range, range]]:
    """Return the smallest runs of axes of equal product that a reshape maps to one another."""
    found: list[tuple[range, range]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        first_i, first_j = i, j
        left = right = 1
        if i < len(old):
            left, i = old[i], i + 1
        if j < len(new):
            right, j = new[j], j + 1
        while left != right:
            if left < right and i < len(old):
                left, i = left * old[i], i + 1
            elif right < left and j < len(new):
                right, j = right * new[j], j + 1
            else:
                break
        found.append((range(first_i, i), range(first_j, j)))
    return found

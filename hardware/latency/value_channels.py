"""Where the channels of a value lie, and which pruning groups they belong to.

Channels are the second axis of an image and the last axis of tokens; a transpose moves them, a
reshape splits them over several axes (heads, a shuffle's parts) or joins pixels to them (a
flatten). They are followed from node to node, because a shape alone does not tell them from pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy.typing as npt
import onnx

from hardware.graph.model import Shape, attributes
from hardware.graph.operators import REDUCTIONS, RESHAPES

Constants = Mapping[str, npt.NDArray[Any]]  # Any: of whatever type they are
SEARCHES = frozenset({"ArgMax", "ArgMin"})  # reductions over one axis


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """What is known of a value of the graph.

    `parts` maps a group's name to the number of channels that each of its units gives; the other
    channels belong to no group.
    """

    shape: Shape
    axes: tuple[int, ...]  # that hold the channels, ascending
    parts: Mapping[str, int] = field(default_factory=dict)
    before: "Value | None" = None  # what a reshape made it of

    @property
    def channels(self) -> int:
        """The number of channels."""
        return prod(self.shape[axis] for axis in self.axes)

    @property
    def batch(self) -> int:
        """The size of the first axis without channels."""
        return next(iter(self._others), 1)

    @property
    def size(self) -> tuple[int, ...]:
        """The sizes of the other axes without channels: height and width, or tokens."""
        return self._others[1:]

    @property
    def unmixed(self) -> "Value":
        """The value before a reshape joined pixels to its channels, as for a group norm."""
        before = self.before
        return before if before is not None and before.channels < self.channels else self

    @property
    def _others(self) -> tuple[int, ...]:
        return tuple(n for axis, n in enumerate(self.shape) if axis not in self.axes)


def image_like(shape: Shape) -> Value:
    """Return a value whose channels are on the second axis and belong to no group."""
    return Value(shape=shape, axes=(1,) if len(shape) > 1 else ())


def rescaled(parts: Mapping[str, int], old: int, new: int) -> dict[str, int]:
    """Return the parts of `new` channels that were made of `old`: several of each, or joined.

    Empty where it cannot be told which groups the new channels belong to.
    """
    is_whole = old and new and (new % old == 0 or old % new == 0)
    if not is_whole or any(count * new % old for count in parts.values()):
        return {}
    return {group: count * new // old for group, count in parts.items()}


def passed(
    node: onnx.NodeProto, inputs: Sequence[Value], shape: Shape, constants: Constants
) -> Value:
    """Return what comes out of a node that is no product.

    Args:
        node: of any operator but convolutions, Gemm and MatMul.
        inputs: what is known of its inputs that are not constant, at least one.
        shape: of the output.
        constants: the small ones by name, which may say axes.
    """
    # Of a gate and what it scales, the latter: it has the shape of the result.
    source = next((value for value in inputs if value.shape == shape), inputs[0])
    if node.op_type == "Concat":
        return _joined(node, inputs, shape)
    if node.op_type in RESHAPES and source.before is not None and source.before.shape == shape:
        return source.before
    if source.shape == shape and node.op_type != "Transpose":
        return source
    axes = _axes_after(node, source, shape, constants)
    after = Value(shape=shape, axes=axes)
    return replace(
        after,
        parts=rescaled(source.parts, source.channels, after.channels),
        before=source if node.op_type in RESHAPES else None,
    )


def _joined(node: onnx.NodeProto, inputs: Sequence[Value], shape: Shape) -> Value:
    """Return the concatenation: on an axis of channels the groups of all inputs come together."""
    after = Value(shape=shape, axes=inputs[0].axes)
    if int(attributes(node)["axis"]) % len(shape) not in after.axes:
        return replace(after, parts=inputs[0].parts)
    parts: dict[str, int] = {}
    for value in inputs:
        for group, count in value.parts.items() if value.axes == after.axes else ():
            parts[group] = parts.get(group, 0) + count
    return replace(after, parts=parts)


def _axes_after(
    node: onnx.NodeProto, source: Value, shape: Shape, constants: Constants
) -> tuple[int, ...]:
    """Return the axes that hold the channels of a node's output."""
    rank = len(source.shape)
    if node.op_type == "Transpose":
        order = list(attributes(node).get("perm", range(rank)[::-1]))
        return tuple(sorted(order.index(axis) for axis in source.axes))
    if node.op_type in RESHAPES:
        return _regrouped(source.shape, shape, source.axes)
    if len(shape) >= rank:  # broadcasting puts new axes in front
        return tuple(axis + len(shape) - rank for axis in source.axes)
    gone = {axis % rank for axis in _named_axes(node, constants)} or set(range(rank))
    if len(gone) != rank - len(shape):
        return image_like(shape).axes
    kept = [axis for axis in range(rank) if axis not in gone]
    return tuple(kept.index(axis) for axis in source.axes if axis in kept)


def _named_axes(node: onnx.NodeProto, constants: Constants) -> tuple[int, ...]:
    """Return the axes that a node takes away; () where it names none."""
    stated = attributes(node)
    if node.op_type == "Gather" or node.op_type in SEARCHES:
        return (int(stated.get("axis", 0)),)
    if node.op_type in REDUCTIONS and len(node.input) > 1 and node.input[1] in constants:
        return tuple(int(axis) for axis in constants[node.input[1]].reshape(-1))
    return tuple(stated.get("axes", ()))


def _regrouped(old: Shape, new: Shape, axes: Sequence[int]) -> tuple[int, ...]:
    """Return the axes of a reshaped value that hold what some axes held before.

    Row-major order cuts both shapes into the same blocks, as short as possible: (8, 49, 96) and
    (8, 7, 7, 96) into 8, 49 and 96. What was in a block is in it afterwards.
    """
    found: list[int] = []
    left = right = 0  # where the next block starts
    while left < len(old) and right < len(new):
        ends = [left + 1, right + 1]
        sizes = [old[left], new[right]]
        while sizes[0] != sizes[1]:
            side = int(sizes[0] > sizes[1])
            if ends[side] == len((old, new)[side]):
                break
            sizes[side] *= (old, new)[side][ends[side]]
            ends[side] += 1
        held = [old[axis] for axis in axes if left <= axis < ends[0]]
        if held and (ends[0] - left == ends[1] - right == 1):
            found.append(right)
        elif max(held, default=1) > 1:
            found += [axis for axis in range(right, ends[1]) if new[axis] > 1]
        left, right = ends
    return tuple(found)

"""What a run of the graph on labels carries along, and the few ways in which labels meet."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from hardware.graph.model import attributes
from pipeline.channels.choices import Choice, rectangle, tie
from pipeline.channels.labels import Shape, Value, along, axes_of, squash
from pipeline.channels.unions import Ids, Unions

Inputs = Sequence[Value | None]  # of a node; None where it is left out, or its shape is unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Sized:
    """A constant of the graph that says how many positions along an axis there are.

    It is element `index` of the node's input `input`, or of its attribute `attribute`, and counts
    the positions that `ids` stand for.
    """

    node: str
    input: int | None = None
    attribute: str | None = None
    index: int = 0
    ids: Ids  # a vector, or labels that vary along one axis once all ties are made


@dataclass(slots=True)
class Trace:
    """A run of the graph on labels."""

    shapes: dict[str, Shape]
    constants: dict[str, npt.NDArray[Any]]  # Any: of whatever dtype; small ones only
    initializers: frozenset[str]
    opset: int
    grouped: frozenset[str] = frozenset()  # kernels of grouped convolutions, however narrow by now
    unions: Unions = field(default_factory=Unions)
    values: dict[str, Value] = field(default_factory=dict)
    choices: list[Choice] = field(default_factory=list)
    rectangles: list[Choice] = field(default_factory=list)
    sizes: list[Sized] = field(default_factory=list)
    unknown: Counter[str] = field(default_factory=Counter)

    def value(self, name: str) -> Value:
        """Return what is known of a value; a parameter gets its ids when it is first read."""
        if name not in self.values:
            shape = self.shapes[name]
            fields: tuple[Ids, ...] = ()
            if name in self.initializers:
                fields = tuple(
                    along(self.unions.block(name, axis, extent), len(shape), axis)
                    for axis, extent in enumerate(shape)
                    if extent > 1
                )
            self.values[name] = Value(
                shape=shape, fields=fields, is_constant=name in self.initializers
            )
        return self.values[name]

    def constant(self, node: NodeProto, index: int) -> npt.NDArray[Any] | None:
        """Return the constant value of a node's input, None where it has none or it is computed."""
        if index >= len(node.input) or not node.input[index]:
            return None
        return self.constants.get(node.input[index])

    def axes(self, node: NodeProto, index: int, default: Sequence[int] = ()) -> tuple[int, ...]:
        """Return the axes that a node names in an input or in its attribute `axes`."""
        given = self.constant(node, index)
        if given is not None:
            return tuple(int(axis) for axis in given.reshape(-1))
        return tuple(attributes(node).get("axes", default))

    def fix(self, fields: Sequence[Ids], axis: int, reason: str) -> list[Ids]:
        """Return fields that do not vary along an axis on which nothing can be removed.

        A field that varies along other axes too is made equal along this one; one that varies
        along this axis alone is frozen.
        """
        kept: list[Ids] = []
        for labels in fields:
            if labels.shape[axis] == 1:
                kept.append(labels)
            elif len(axes_of(labels)) > 1:
                self.unions.unite(*tie(labels, axis))
                kept.append(squash(labels.take([0], axis=axis)))
            else:
                self.unions.freeze(labels, reason)
        return kept

    def freeze(self, value: Value, reason: str) -> None:
        """Freeze everything about a value."""
        for labels in value.fields:
            self.unions.freeze(labels, reason)

    def channels(self, fields: Sequence[Ids], axis: int, reason: str) -> Ids | None:
        """Return one id per position of an axis, None where the axis is fixed.

        All other axes become fixed.
        """
        mine = list(fields)
        for other in range(fields[0].ndim if fields else 0):
            if other != axis:
                mine = self.fix(mine, other, reason)
        if not mine:
            return None
        first = mine[0].reshape(-1)
        for labels in mine[1:]:
            self.unions.unite(first, labels.reshape(-1))
        return first

    def join(self, operands: Sequence[Value], shape: Shape, reason: str) -> tuple[Ids, ...]:
        """Return the fields of an element-wise result: what meets in one element is united.

        Args:
            operands: broadcast against one another as numpy does.
            shape: of the result.
            reason: why labels freeze that meet an axis on which nothing can be removed.
        """
        rank = len(shape)
        shapes = [(1,) * (rank - len(v.shape)) + v.shape for v in operands]
        fields = [
            [labels.reshape((1,) * (rank - labels.ndim) + labels.shape) for labels in v.fields]
            for v in operands
        ]
        for axis in range(rank):
            present = [place for place, extents in enumerate(shapes) if extents[axis] > 1]
            varying = [place for place in present if any(f.shape[axis] > 1 for f in fields[place])]
            if varying and len(varying) < len(present):
                for place in varying:
                    fields[place] = self.fix(fields[place], axis, reason)
        # What was fixed along a later axis may have left an earlier one without a field.
        for axis in range(rank):
            present = [place for place, extents in enumerate(shapes) if extents[axis] > 1]
            if any(not any(f.shape[axis] > 1 for f in fields[place]) for place in present):
                for place in present:
                    fields[place] = self.fix(fields[place], axis, reason)
        return self._clusters([labels for mine in fields for labels in mine])

    def _clusters(self, fields: Sequence[Ids]) -> tuple[Ids, ...]:
        """Unite fields that share an axis; return one field of each cluster, the simplest."""
        clusters: list[list[Ids]] = []
        for labels in fields:
            axes = set(axes_of(labels))
            mine = [c for c in clusters if any(axes & set(axes_of(other)) for other in c)]
            merged = [labels, *(other for cluster in mine for other in cluster)]
            clusters = [c for c in clusters if not any(c is m for m in mine)] + [merged]
        result = []
        for cluster in clusters:
            simplest = min(cluster, key=lambda labels: len(axes_of(labels)))
            for labels in cluster:
                self.unions.unite(simplest, labels)
            result.append(simplest)
        return tuple(result)

    def distinct(self, fields: Sequence[Ids], reason: str) -> tuple[Ids, ...]:
        """Return fields of which no two vary along one axis; what stands in the way is frozen."""
        kept: list[Ids] = []
        taken: set[int] = set()
        for labels in fields:
            axes = set(axes_of(labels))
            if not axes or axes & taken:
                self.unions.freeze(labels, reason)
            else:
                kept.append(labels)
                taken |= axes
        return tuple(kept)

    def expect_rectangles(self, value: Value, known: Sequence[Ids]) -> None:
        """Note the labels of a value that vary along several axes, unless they are known."""
        for labels in value.fields:
            if len(axes_of(labels)) > 1 and not any(labels is other for other in known):
                self.rectangles.append(rectangle(labels))

    def count(self, node: NodeProto, place: int, index: int, labels: Ids) -> None:
        """Note that element `index` of the node's input `place` counts what `labels` stand for."""
        if np.any(labels):
            self.sizes.append(Sized(node=node.name, input=place, index=index, ids=labels))


def where(node: NodeProto) -> str:
    """Return how messages name a node."""
    return f"{node.op_type} {node.name}"


def output_shapes(trace: Trace, node: NodeProto) -> list[Shape]:
    """Return the shapes of a node's outputs; an output left out has shape ()."""
    return [trace.shapes[name] if name else () for name in node.output]


def present(inputs: Inputs) -> list[Value]:
    """Return the inputs that are there."""
    return [value for value in inputs if value is not None]


def source(inputs: Inputs) -> Value:
    """Return the first input, which every rule's operator has."""
    value = inputs[0]
    assert value is not None
    return value

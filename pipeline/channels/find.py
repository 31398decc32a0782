"""From an ONNX graph to its pruning groups.

`find_groups` is the whole way: run the graph on labels with one rule per operator, make the ties
that were left open, and gather the labels that go together into groups. A *unit* below is what
goes together at least: one channel of a group, in all layers that it runs through.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import NodeProto

from hardware.graph.channel_map import ChannelMap, FrozenAxis, Group, ParameterSlice, Resize
from hardware.graph.model import complete_shapes, constant_values, initializers, opset, shapes, uses
from hardware.graph.operators import is_standard
from pipeline.channels.branches import find_branches
from pipeline.channels.choices import resolve
from pipeline.channels.labels import Value
from pipeline.channels.propagation import Sized, Trace, where
from pipeline.channels.rules import RULES
from pipeline.channels.rules_channelwise import freeze_all
from pipeline.channels.unions import Ids


def find_groups(graph: onnx.ModelProto) -> ChannelMap:
    """Return which slices of which parameters can only be removed together.

    Every index of every parameter axis gets an id, and the graph is run once on ids instead of
    numbers. What an operator makes meet is united; what meets something that cannot be removed, an
    operator without a rule, or a network output is frozen, with the reason.

    Args:
        graph: with static shapes, as `export_graph` or `simplify` leave it.

    Raises:
        ModelError: the shapes of the graph contradict one another.
    """
    trace = run_on_labels(graph)
    resolve(trace.unions, [*trace.choices, *trace.rectangles])
    return _Assembly(trace, graph).channel_map()


def run_on_labels(graph: onnx.ModelProto, grouped: frozenset[str] = frozenset()) -> Trace:
    """Run every node of the graph on labels by its operator's rule; return the trace of that run.

    Args:
        graph: simplified.
        grouped: parameters of convolutions that are grouped, not depthwise, even where carving has
            left them one input channel per group.
    """
    known = _all_shapes(graph)
    trace = Trace(
        shapes=known,
        constants=constant_values(graph),
        initializers=frozenset(initializers(graph)),
        opset=opset(graph),
        grouped=grouped,
    )
    for tensor in graph.graph.input:
        if tensor.name not in trace.initializers:
            trace.values[tensor.name] = Value(shape=known.get(tensor.name, ()))
    for node in graph.graph.node:
        _apply_rule(trace, node)
    for output in graph.graph.output:
        if output.name in trace.values:
            trace.freeze(trace.values[output.name], "is an output of the network")
    return trace


def _all_shapes(graph: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Return the shapes by value name, inferred where the file does not say them."""
    known = shapes(graph)
    if all(name in known for node in graph.graph.node for name in node.output if name):
        return known
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    complete_shapes(copy)
    return shapes(copy)


def _apply_rule(trace: Trace, node: NodeProto) -> None:
    """Run one node on labels, or freeze what it touches where it has no rule."""
    inputs = [_read(trace, name) for name in node.input]
    complete = all(name in trace.shapes for name in node.output if name) and all(
        value is not None for value, name in zip(inputs, node.input, strict=True) if name
    )
    rule = RULES.get(node.op_type) if is_standard(node) else None
    if rule is None:
        operator = node.op_type if is_standard(node) else f"{node.domain}::{node.op_type}"
        trace.unknown[operator] += 1
        captured = [_read(trace, name) for name in uses([node]) if name not in node.input]
        outputs = freeze_all(
            trace, node, [*inputs, *captured], f"operator without a rule: {operator} {node.name}"
        )
    elif not complete:
        outputs = freeze_all(trace, node, inputs, f"the shapes are not static at {where(node)}")
    else:
        outputs = rule(trace, node, inputs)
    known = [labels for value in inputs if value is not None for labels in value.fields]
    for name, value in zip(node.output, outputs, strict=False):
        if name:
            trace.expect_rectangles(value, known)
            trace.values[name] = value


def _read(trace: Trace, name: str) -> Value | None:
    """Return what is known of an input, None where it is left out or its shape is unknown."""
    if not name or (name not in trace.values and name not in trace.shapes):
        return None
    return trace.value(name)


class _Assembly:
    """The labels after all ties, as they become groups, resizes and reasons."""

    def __init__(self, trace: Trace, graph: onnx.ModelProto) -> None:
        self.trace = trace
        self.graph = graph
        self.blocks = trace.unions.blocks
        self.roots: Ids = trace.unions.roots()
        self.by_block: list[Ids] = [
            self.roots[block.start : block.start + block.extent] for block in self.blocks
        ]
        self.mixers = trace.unions.mixers(self.roots)
        self.group_of: Ids = np.full(trace.unions.count, -1, dtype=np.int64)
        self.unit_of: Ids = np.full(trace.unions.count, -1, dtype=np.int64)
        self.groups: tuple[Group, ...] = ()

    def channel_map(self) -> ChannelMap:
        """Return the groups, the branches, the sizes that follow them, and what is frozen."""
        members = self._members()
        self.groups = self._make_groups(members)
        return ChannelMap(
            groups=self.groups,
            branches=find_branches(self.graph, self.groups, self.trace.shapes),
            resizes=self._resizes(),
            frozen=self._frozen(),
            unknown_operators=dict(sorted(self.trace.unknown.items())),
        )

    def _members(self) -> list[list[int]]:
        """Return the units (as roots) of every group, in the order of the first producer."""
        producers = {index for index, role in self.trace.unions.roles.items() if role == "filter"}
        footprints: dict[int, list[tuple[int, int]]] = defaultdict(list)
        live: dict[int, None] = {}
        for index, roots in enumerate(self.by_block):
            for root, count in zip(*np.unique(roots, return_counts=True), strict=True):
                footprints[int(root)].append((index, int(count)))
            if index in producers:
                live.update(dict.fromkeys(int(r) for r in roots if r))
        found: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
        for root in live:
            found[tuple(footprints[root])].append(root)
        return [units for units in found.values() if len(units) > 1]

    def _make_groups(self, members: list[list[int]]) -> tuple[Group, ...]:
        """Return the groups with their slices; every root's group and unit are known afterwards."""
        for number, units in enumerate(members):
            self.group_of[units] = number
            self.unit_of[units] = np.arange(len(units))
        slices: list[list[ParameterSlice]] = [[] for _ in members]
        for index, roots in enumerate(self.by_block):
            for number in np.unique(self.group_of[roots]):
                if number >= 0:
                    slices[number].append(self._slice(index, roots, int(number)))
        names = self._names(slices)
        return tuple(
            Group(
                name=names[number],
                width=len(units),
                slices=tuple(slices[number]),
                mixes=self._mixed(units),
            )
            for number, units in enumerate(members)
        )

    def _slice(self, index: int, roots: Ids, number: int) -> ParameterSlice:
        """Return where the units of a group sit in one block."""
        block = self.blocks[index]
        units = np.where(self.group_of[roots] == number, self.unit_of[roots], -1)
        return ParameterSlice(
            parameter=block.parameter,
            axis=block.axis,
            role=self.trace.unions.roles.get(index, "other"),
            units=tuple(int(unit) for unit in units),
        )

    def _names(self, slices: list[list[ParameterSlice]]) -> list[str]:
        """Return a name for every group: its first producer's, numbered where several share it."""
        taken: Counter[str] = Counter()
        names = []
        for mine in slices:
            first = next(s.parameter for s in mine if s.role == "filter")
            base = first.removesuffix(".weight")
            taken[base] += 1
            names.append(base if taken[base] == 1 else f"{base}#{taken[base]}")
        return names

    def _mixed(self, units: list[int]) -> str | None:
        """Return the operators that mix these units, None where there are none."""
        operators = {self.mixers[root] for root in units if root in self.mixers}
        return ", ".join(sorted(operators)) or None

    def _resizes(self) -> tuple[Resize, ...]:
        """Return the sizes that change with the groups' widths."""
        found = (self._resize(sized) for sized in self.trace.sizes)
        return tuple(resize for resize in found if resize is not None)

    def _resize(self, sized: Sized) -> Resize | None:
        """Return how one size follows the groups, None where none of them touches it."""
        roots = self.roots[sized.ids].reshape(sized.ids.shape[0], -1)
        vector = roots[:, 0]
        if (roots != roots[:, :1]).any():  # the units lie along another axis; this one stays
            return None
        parts: dict[str, tuple[int, ...]] = {}
        for number in np.unique(self.group_of[vector]):
            if number >= 0:
                units = self.unit_of[vector[self.group_of[vector] == number]]
                parts[self.groups[number].name] = tuple(int(unit) for unit in units)
        if not parts:
            return None
        return Resize(
            node=sized.node,
            input=sized.input,
            attribute=sized.attribute,
            index=sized.index,
            fixed=int((self.group_of[vector] < 0).sum()),
            parts=parts,
        )

    def _frozen(self) -> tuple[FrozenAxis, ...]:
        """Return the output channels that belong to no group, and why."""
        reasons: Mapping[int, str] = self.trace.unions.frozen_reasons()
        found = []
        for index, role in sorted(self.trace.unions.roles.items()):
            if role not in ("filter", "depthwise"):
                continue
            block = self.blocks[index]
            why: Counter[str] = Counter()
            for place, root in enumerate(self.by_block[index]):
                if self.group_of[root] < 0:
                    why[self._reason(block.start + place, int(root), reasons)] += 1
            found += [
                FrozenAxis(parameter=block.parameter, channels=count, reason=reason)
                for reason, count in why.items()
            ]
        return tuple(found)

    def _reason(self, identity: int, root: int, reasons: Mapping[int, str]) -> str:
        """Return why one position of an axis belongs to no group."""
        if root:
            return "all of its channels are tied together"
        return reasons.get(identity, "tied to channels that are frozen")

"""The layers of an ONNX model as a latency table keys them: by what is executed, not by name.

A *layer* is a head node and the nodes that follow it for free or nearly so. The rule, in words:

1. Convolutions, Gemm and MatMul are heads, and so is every node that none of the rules below
   gives to another layer (pooling, Concat, Resize, Transpose, ReduceMean, ...).
2. An element-wise node joins the last layer among its inputs whose output has the node's own
   shape: runtimes fuse these behind a convolution, as far as they can.
3. A view (Reshape, Flatten, Cast, ...) joins the layer of its first input.
4. Nodes that are computed from constants alone belong to no layer: runtimes fold them.

Whether a runtime really fuses a layer's nodes is its own affair: the time of all of them is the
layer's time (see `hardware.latency.layers.attribute`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import onnx

from hardware.errors import ModelError
from hardware.graph.channel_map import Branch, ChannelMap
from hardware.graph.model import Shape, attributes, initializers, shapes
from hardware.graph.operators import CONVOLUTIONS, PIXELWISE, PRODUCTS, SIZES, VIEWS
from hardware.latency.layers import Layer, LayerKey


def layers_of(template: onnx.ModelProto, channels: ChannelMap) -> tuple[Layer, ...]:
    """Return the layers of a template in graph order, at full width.

    Args:
        template: a graph whose values have static shapes, or shapes that can be inferred.
        channels: the map that says which group owns which channels of which parameter.

    Raises:
        ModelError: shapes are not known.
    """
    return _Reading(template, channels).layers()


@dataclass(frozen=True, slots=True)
class _Content:
    """What the channel axis of a value holds: channels per unit of each group, and others."""

    parts: Mapping[str, int]
    fixed: int

    def scaled(self, old: int, new: int) -> "_Content":
        """Return the content after a view or a split changed the channel axis."""
        if old and new % old == 0:
            return _Content(
                {g: n * (new // old) for g, n in self.parts.items()}, self.fixed * new // old
            )
        counts = {g: n * new // old for g, n in self.parts.items()}
        if new and old % new == 0 and all(n * new % old == 0 for n in self.parts.values()):
            return _Content(counts, self.fixed * new // old)
        return _Content({}, new)


@dataclass(slots=True)
class _Draft:
    """A layer while the graph is read."""

    node: onnx.NodeProto
    nodes: list[onnx.NodeProto]
    content_in: _Content
    content_out: _Content


class _Reading:
    """One pass over a graph; holds what is known of the nodes read so far."""

    def __init__(self, template: onnx.ModelProto, channels: ChannelMap) -> None:
        self.graph = template.graph
        self.channels = channels
        self.readers = readers_of(template)
        self.shapes = _static_shapes(template)
        # constant value -> parameters that it is computed from
        self.constants = {i.name: frozenset({i.name}) for i in template.graph.initializer}
        self.content: dict[str, _Content] = {}
        self.owner: dict[str, _Draft] = {}
        self.drafts: list[_Draft] = []
        self.slices: dict[str, list[tuple[str, str, int]]] = {}  # -> (role, group, per unit)
        self.full = {group.name: group.width for group in channels.groups}
        for group in channels.groups:
            for cut in group.slices:
                per_unit = sum(unit >= 0 for unit in cut.units) // max(group.width, 1)
                self.slices.setdefault(cut.parameter, []).append((cut.role, group.name, per_unit))

    def layers(self) -> tuple[Layer, ...]:
        """Return the layers of the graph."""
        for value in self.graph.input:
            if value.name not in self.constants:
                self.content[value.name] = _Content({}, _channels(self.shape(value.name)))
        for node in self.graph.node:
            self._read(node)
        return tuple(self._layer(draft) for draft in self.drafts)

    def shape(self, value: str) -> Shape:
        """Return a value's shape.

        Raises:
            ModelError: it is not known.
        """
        if value not in self.shapes:
            raise ModelError(
                f"The shape of value {value!r} is not known. Export the network with fixed input "
                "sizes, so that shape inference can tell every value's shape."
            )
        return self.shapes[value]

    def _read(self, node: onnx.NodeProto) -> None:
        inputs = [name for name in node.input if name and name not in self.constants]
        if not inputs or node.op_type in SIZES:
            sources = frozenset().union(*(self.constants.get(name, ()) for name in node.input))
            self.constants.update(dict.fromkeys(node.output, sources))
            return
        before = self.content.get(inputs[0], _Content({}, 0))
        if node.op_type in PRODUCTS:
            draft = self._product(node, inputs[0], before)
        else:
            after = self._passed(node, inputs, before)
            home = self._home(node, inputs)
            draft = home or _Draft(node, [], before, after)
            self.content.update(dict.fromkeys(node.output, after))
        if not draft.nodes:
            self.drafts.append(draft)
        draft.nodes.append(node)
        self.owner.update(dict.fromkeys(node.output, draft))

    def _home(self, node: onnx.NodeProto, inputs: Sequence[str]) -> _Draft | None:
        """Return the layer that a node joins; None where it is a head itself."""
        if node.op_type in VIEWS:
            return self.owner.get(inputs[0])
        if node.op_type not in PIXELWISE:
            return None
        shape = self.shape(node.output[0])
        fits = [
            self.owner[name] for name in inputs if name in self.owner and self.shape(name) == shape
        ]
        return max(fits, key=self.drafts.index, default=None)

    def _passed(self, node: onnx.NodeProto, inputs: Sequence[str], before: _Content) -> _Content:
        """Return what comes out of a node without weights."""
        if node.op_type == "Concat" and len(self.shape(inputs[0])) > 1:
            contents = [self.content.get(name, _Content({}, 0)) for name in inputs]
            parts: dict[str, int] = {}
            for content in contents:
                for group, count in content.parts.items():
                    parts[group] = parts.get(group, 0) + count
            return _Content(parts, sum(content.fixed for content in contents))
        if node.op_type == "Transpose" or not node.output:
            return before
        old, new = self.shapes.get(inputs[0], ()), self.shapes.get(node.output[0], ())
        if old == new or _is_split(old, new) or _is_split(new, old):
            return before
        return before.scaled(_channels(old), _channels(new))

    def _product(self, node: onnx.NodeProto, value: str, before: _Content) -> _Draft:
        """Return the draft of a convolution, Gemm or MatMul."""
        axis = 1 if node.op_type in CONVOLUTIONS else -1
        inputs, outputs = self.shape(value)[axis], self.shape(node.output[0])[axis]
        groups = _groups(node)
        parameters = frozenset().union(*(self.constants.get(n, ()) for n in node.input[1:2]))
        if groups > 1 and groups == inputs:
            out = self._sliced(parameters, "depthwise", 1, outputs) or before
            into = out.scaled(outputs, inputs)
        else:
            into = self._sliced(parameters, "input", groups, inputs) or _Content({}, inputs)
            out = self._sliced(parameters, "filter", 1, outputs) or _Content({}, outputs)
            if not parameters:  # a product of two activations
                into = out = before
        self.content[node.output[0]] = out
        return _Draft(node, [], into, out)

    def _sliced(
        self, parameters: Iterable[str], role: str, factor: int, total: int
    ) -> _Content | None:
        parts: dict[str, int] = {}
        for parameter in parameters:
            for known, group, per_unit in self.slices.get(parameter, ()):
                if known == role and per_unit:
                    parts[group] = parts.get(group, 0) + per_unit * factor
        fixed = total - sum(count * self.full[group] for group, count in parts.items())
        return _Content(parts, fixed) if parts and fixed >= 0 else None

    def _layer(self, draft: _Draft) -> Layer:
        """Return the finished layer of a draft."""
        node = draft.node
        name = node.name or node.output[0]
        into, out = draft.content_in, draft.content_out
        emptied = [b for b in self.channels.branches if name in b.layers]
        dead = {n for branch in emptied for n in (*branch.layers, branch.join)}
        rest = [n.op_type for n in draft.nodes if n.name not in dead] if emptied else []
        full = [*into.parts, *out.parts]
        return Layer(
            name=name,
            key=self._key(draft),
            in_parts=dict(into.parts),
            in_fixed=into.fixed,
            out_parts=dict(out.parts),
            out_fixed=out.fixed,
            macs=self._macs(draft),
            branches=tuple(b.name for b in emptied),
            vanishes_with=self._triggers(emptied),
            nodes=tuple(n.name or n.output[0] for n in draft.nodes),
            rest=tuple(operator for operator in rest if operator not in VIEWS),
            thinned_with=self._thinned_with(draft),
            full={group: self.full[group] for group in full},
        )

    def _triggers(self, emptied: Sequence[Branch]) -> tuple[str, ...]:
        """Return the groups that are at width 0 exactly when one of these branches is emptied."""
        triggers: dict[str, None] = {}
        for branch in emptied:
            own = set(branch.groups)
            for other in self.channels.branches:
                if set(other.groups) < set(branch.groups):
                    own -= set(other.groups)  # these may be emptied without this branch
            triggers.update(dict.fromkeys(g for g in branch.groups if g in (own or branch.groups)))
        return tuple(triggers)

    def _thinned_with(self, draft: _Draft) -> tuple[str, ...] | None:
        """Return the groups that are all at width 0 when only strided 1x1 convolutions read it."""
        if draft.node.op_type not in CONVOLUTIONS:
            return None
        branches = strided_readers(draft.node.output[0], self.readers, self.channels.branches)
        if branches is None:
            return None
        return tuple(self._triggers([branch])[0] for branch in branches)

    def _key(self, draft: _Draft) -> LayerKey:
        node, into, out = draft.node, draft.content_in, draft.content_out
        source = next(name for name in node.input if name and name not in self.constants)
        shape_in, shape_out = self.shape(source), self.shape(node.output[0])
        is_conv = node.op_type in CONVOLUTIONS
        weight = self.shapes.get(node.input[1], ()) if is_conv else ()
        stated = attributes(node)
        tail = [n.op_type for n in draft.nodes[1:] if n.op_type not in VIEWS]
        return LayerKey(
            operator=node.op_type,
            in_channels=into.fixed + sum(n * self.full[g] for g, n in into.parts.items()),
            out_channels=out.fixed + sum(n * self.full[g] for g, n in out.parts.items()),
            kernel=weight[2:] or tuple(stated.get("kernel_shape", ())),
            strides=tuple(stated.get("strides", ())),
            dilations=tuple(stated.get("dilations", ())),
            conv_groups=_groups(node),
            in_size=shape_in[2:],
            out_size=shape_out[2:],
            batch=shape_out[0] if shape_out else 1,
            tail=tuple(tail),
        )

    def _macs(self, draft: _Draft) -> int:
        node = draft.node
        if node.op_type not in PRODUCTS:
            return 0
        source = next(name for name in node.input if name and name not in self.constants)
        shape_in, shape_out = self.shape(source), self.shape(node.output[0])
        if node.op_type not in CONVOLUTIONS:
            return prod(shape_out) * shape_in[-1]
        groups = _groups(node)
        kernel = prod(self.shape(node.input[1])[2:])
        if node.op_type == "ConvTranspose":  # every input pixel meets every filter
            return prod(shape_in) * shape_out[1] // groups * kernel
        return prod(shape_out) * shape_in[1] // groups * kernel


Readers = Mapping[str, Sequence[tuple[onnx.NodeProto, bool]]]
"""Per value the nodes that read it, and whether each is a strided 1x1 convolution."""


def readers_of(model: onnx.ModelProto) -> Readers:
    """Return the readers of every value; the network's outputs are read by nobody known."""
    weights = {name: tuple(tensor.dims) for name, tensor in initializers(model).items()}
    readers: dict[str, list[tuple[onnx.NodeProto, bool]]] = {}
    for node in model.graph.node:
        strided = False
        if node.op_type == "Conv":
            stated = attributes(node)
            kernel = weights.get(node.input[1], ())[2:]
            strided = (
                set(kernel) == {1}
                and min(stated.get("strides", [1])) > 1
                and not any(stated.get("pads", ()))
            )
        for name in node.input:
            if name:
                readers.setdefault(name, []).append((node, strided))
    return readers


def strided_readers(
    value: str, readers: Readers, branches: Sequence[Branch]
) -> tuple[Branch, ...] | None:
    """Return the branches that must be emptied for strided 1x1 convolutions alone to read a value.

    Such a convolution reads every second pixel of its input. Where it is the only reader, as in a
    residual network whose downsampling block has been emptied, OpenVINO moves the stride to the
    layer before, which then takes a quarter of its time: that is another layer, and keyed so.

    Returns:
        The branches, () where none need be; None where other readers stay whatever is emptied.
    """
    needed: dict[str, Branch] = {}
    found = False
    pending, seen = [value], {value}
    while pending:
        name = pending.pop()
        if not readers.get(name):  # an output of the network: read in full
            return None
        for node, strided in readers[name]:
            inside = next((b for b in branches if node.name in b.layers), None)
            if inside is not None:
                needed[inside.name] = inside
            elif strided:
                found = True
            elif node.op_type not in PIXELWISE:
                return None
            elif node.output[0] not in seen:
                seen.add(node.output[0])
                pending.append(node.output[0])
    return tuple(needed.values()) if found else None


def _static_shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    """Return the static shapes of all values, inferring those that the file does not hold."""
    known = shapes(model)
    outputs = {name for node in model.graph.node for name in node.output if name}
    if outputs - known.keys():
        known = shapes(onnx.shape_inference.infer_shapes(model)) | known
    return known


def _channels(shape: Shape) -> int:
    return shape[1] if len(shape) > 1 else 1


def _is_split(whole: Shape, parts: Shape) -> bool:
    """Return whether the channel axis of one shape is two axes of the other, as in a shuffle."""
    return len(parts) == len(whole) + 1 and whole[1:] == (parts[1] * parts[2], *parts[3:])


def _groups(node: onnx.NodeProto) -> int:
    """Return the number of groups of a convolution."""
    return int(attributes(node).get("group", 1))

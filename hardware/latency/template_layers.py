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

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx

from hardware.errors import ModelError
from hardware.graph.channel_map import Branch, ChannelMap
from hardware.graph.model import Shape, attributes, constant_values, initializers, shapes
from hardware.graph.operators import CONVOLUTIONS, PIXELWISE, PRODUCTS, SIZES, VIEWS
from hardware.latency.layers import Layer, LayerKey
from hardware.latency.value_channels import Value, image_like, passed, rescaled


def layers_of(template: onnx.ModelProto, channels: ChannelMap) -> tuple[Layer, ...]:
    """Return the layers of a template in graph order, at full width.

    Args:
        template: a graph whose values have static shapes, or shapes that can be inferred.
        channels: the map that says which group owns which channels of which parameter.

    Raises:
        ModelError: shapes are not known.
    """
    return _Reading(template, channels).layers()


@dataclass(slots=True)
class _Draft:
    """A layer while the graph is read."""

    place: int  # among the layers
    node: onnx.NodeProto
    into: Value
    out: Value
    nodes: list[onnx.NodeProto]


class _Reading:
    """One pass over a graph; holds what is known of the nodes read so far."""

    def __init__(self, template: onnx.ModelProto, channels: ChannelMap) -> None:
        self.graph = template.graph
        self.channels = channels
        self.readers = readers_of(template)
        self.shapes = _static_shapes(template)
        self.numbers = constant_values(template)
        # constant value -> parameters that it is computed from
        self.constants = {i.name: frozenset({i.name}) for i in template.graph.initializer}
        self.values: dict[str, Value] = {}
        self.owner: dict[str, _Draft] = {}
        self.drafts: list[_Draft] = []
        self.slices: dict[str, list[tuple[str, str, int]]] = {}  # -> (role, group, per unit)
        self.full = {group.name: group.width for group in channels.groups}
        for group in channels.groups:
            for cut in group.slices:
                per_unit = sum(unit >= 0 for unit in cut.units) // max(group.width, 1)
                self.slices.setdefault(cut.parameter, []).append((cut.role, group.name, per_unit))
        # Convolutions whose groups go one by one as channels are removed.
        self.shrinking = {size.node for size in channels.resizes if size.attribute == "group"}

    def layers(self) -> tuple[Layer, ...]:
        """Return the layers of the graph."""
        for value in self.graph.input:
            if value.name not in self.constants:
                self.values[value.name] = image_like(self.shape(value.name))
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
        """Find the layer of one node, and what comes out of it."""
        inputs = [name for name in node.input if name and name not in self.constants]
        if not inputs or node.op_type in SIZES:
            sources = frozenset().union(*(self.constants.get(name, ()) for name in node.input))
            self.constants.update(dict.fromkeys(node.output, sources))
            return
        known = [self._value(name) for name in inputs]
        if node.op_type in PRODUCTS:
            into, out = self._product(node, known)
        else:
            into = known[0]
            out = passed(node, known, self.shape(node.output[0]), self.numbers)
            if node.op_type == "Pad" and out.channels >= into.channels:
                out = replace(out, parts=self._with_padding(node, into))
        draft = self._home(node, inputs)
        if draft is None:
            draft = _Draft(len(self.drafts), node, into.unmixed, out.unmixed, [])
            self.drafts.append(draft)
        draft.nodes.append(node)
        self.owner.update(dict.fromkeys(node.output, draft))
        self.values[node.output[0]] = out
        for name in node.output[1:]:
            if name in self.shapes:
                self.values[name] = passed(node, known, self.shapes[name], self.numbers)

    def _value(self, name: str) -> Value:
        """Return what is known of a value that is not constant."""
        return self.values.get(name) or image_like(self.shape(name))

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
        return max(fits, key=lambda draft: draft.place, default=None)

    def _product(self, node: onnx.NodeProto, inputs: Sequence[Value]) -> tuple[Value, Value]:
        """Return what a convolution, Gemm or MatMul reads and what it makes.

        Its channels are on the axes that it sums over and makes, wherever they were before.
        """
        source, shape = inputs[0], self.shape(node.output[0])
        if node.op_type in CONVOLUTIONS:
            reads = makes = 1
        else:
            from_end = 2 if node.input[0] in self.constants else 1  # weights on the left
            reads, makes = (max(len(each) - from_end, 0) for each in (source.shape, shape))
        into, out = Value(shape=source.shape, axes=(reads,)), Value(shape=shape, axes=(makes,))
        weights = self._parameters(node)
        if weights is None:  # a product of two activations
            other = inputs[-1]
            is_last = other.axes == (len(other.shape) - 1,)
            into = source if source.axes == into.axes else into
            return into, replace(out, parts=other.parts if is_last else {})
        if self._loses_groups(node, into.channels):
            parts = self._sliced(weights, ("depthwise", "filter"), 1, out.channels)
            if not parts and source.axes == into.axes:
                parts = rescaled(source.parts, into.channels, out.channels)
            taken = rescaled(parts, out.channels, into.channels)
        else:
            # The axis of one group's channels is that of the filters in a transposed convolution.
            groups, is_transposed = _groups(node), node.op_type == "ConvTranspose"
            parts = self._sliced(weights, ("filter",), groups if is_transposed else 1, out.channels)
            taken = self._sliced(weights, ("input",), 1 if is_transposed else groups, into.channels)
        return replace(into, parts=taken), replace(out, parts=parts)

    def _with_padding(self, node: onnx.NodeProto, into: Value) -> dict[str, int]:
        """Return the parts of a value once channels of other groups are padded to it."""
        added: Counter[str] = Counter()
        for size in self.channels.resizes:
            for name, units in size.parts.items() if size.node == node.name else ():
                added[name] += len(units)
        parts = Counter(into.parts)
        parts.update({name: count // self.full[name] for name, count in added.items()})
        return dict(parts)

    def _parameters(self, node: onnx.NodeProto) -> frozenset[str] | None:
        """Return the parameters that a product's weights are computed from; None: it has none."""
        weight = next((name for name in node.input[:2] if name in self.constants), None)
        return None if weight is None else self.constants[weight]

    def _loses_groups(self, node: onnx.NodeProto, in_channels: int) -> bool:
        """Return whether narrowing takes whole groups of a convolution away, as of a depthwise."""
        return _groups(node) > 1 and (node.name in self.shrinking or _groups(node) == in_channels)

    def _sliced(
        self, parameters: Collection[str], roles: Collection[str], factor: int, total: int
    ) -> dict[str, int]:
        """Return how many of some channels each group's units give, by slices of parameters.

        Args:
            parameters: that the weights are computed from.
            roles: of the slices that count.
            factor: channels per sliced position.
            total: how many channels there are; {} where the slices say more.
        """
        parts: dict[str, int] = {}
        for parameter in parameters:
            for role, group, per_unit in self.slices.get(parameter, ()):
                if role in roles and per_unit:
                    parts[group] = parts.get(group, 0) + per_unit * factor
        owned = sum(count * self.full[group] for group, count in parts.items())
        return parts if owned <= total else {}

    def _layer(self, draft: _Draft) -> Layer:
        """Return the finished layer of a draft."""
        node = draft.node
        name = node.name or node.output[0]
        into, out = draft.into, draft.out
        emptied = [b for b in self.channels.branches if name in b.layers]
        dead = {n for branch in emptied for n in (*branch.layers, branch.join)}
        rest = [n.op_type for n in draft.nodes if n.name not in dead] if emptied else []
        return Layer(
            name=name,
            key=self._key(draft),
            in_parts=dict(into.parts),
            in_fixed=self._fixed(into),
            out_parts=dict(out.parts),
            out_fixed=self._fixed(out),
            branches=tuple(b.name for b in emptied),
            vanishes_with=self._triggers(emptied),
            nodes=tuple(n.name or n.output[0] for n in draft.nodes),
            rest=tuple(operator for operator in rest if operator not in VIEWS),
            thinned_with=self._thinned_with(draft),
            full={group: self.full[group] for group in [*into.parts, *out.parts]},
        )

    def _fixed(self, value: Value) -> int:
        """Return how many channels of a value belong to no group."""
        return value.channels - sum(n * self.full[group] for group, n in value.parts.items())

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
        """Return the key of a layer at full width."""
        node, into, out = draft.node, draft.into, draft.out
        is_conv = node.op_type in CONVOLUTIONS
        weight = self.shapes.get(node.input[1], ()) if is_conv else ()
        stated = attributes(node)
        groups = _groups(node)
        loses_groups = is_conv and self._loses_groups(node, into.channels)
        tail = [n.op_type for n in draft.nodes[1:] if n.op_type not in VIEWS]
        return LayerKey(
            operator=node.op_type,
            in_channels=into.channels,
            out_channels=out.channels,
            kernel=weight[2:] or tuple(stated.get("kernel_shape", ())),
            strides=tuple(stated.get("strides", ())),
            dilations=tuple(stated.get("dilations", ())),
            conv_groups=groups,
            group_channels=into.channels // groups if loses_groups else None,
            in_size=into.size,
            out_size=out.size,
            batch=out.batch,
            tail=tuple(tail),
        )


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


def _groups(node: onnx.NodeProto) -> int:
    """Return the number of groups of a convolution; 1 of other operators."""
    return int(attributes(node).get("group", 1))

"""The layers of an ONNX model as a latency table keys them: by what is executed, not by name.

A *layer* is one anchor node and the nodes that follow it for free or nearly so. The rule, in words:

1. Convolutions, Gemm and MatMul are anchors, and so is every node that none of the rules below
   gives to another layer (pooling, Concat, Resize, Transpose, ReduceMean, ...).
2. An element-wise node joins the last layer among its inputs whose output has the node's own
   shape: runtimes fuse these behind a convolution, as far as they can.
3. A view (Reshape, Flatten, Cast, ...) joins the layer of its first input.
4. Nodes that are computed from constants alone belong to no layer: runtimes fold them.

Whether a runtime really fuses a layer's nodes is its own affair: the time of all of them is the
layer's time (`Owners` in `hardware.sweeping`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import onnx

from hardware.channels import Branch, ChannelMap
from hardware.errors import ModelError
from hardware.storing import Record

CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
PRODUCTS = CONVOLUTIONS | {"Gemm", "MatMul"}
VIEWS = frozenset(
    {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Cast", "CastLike", "Dropout"}
)
ELEMENTWISE = frozenset(
    {
        *("Abs", "Add", "BatchNormalization", "Ceil", "Clip", "Div", "Elu", "Erf", "Exp", "Floor"),
        *("Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Log", "Max", "Min", "Mish", "Mul"),
        *("Neg", "PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Softplus"),
        *("Sqrt", "Sub", "Swish", "Tanh", "ThresholdedRelu", "Where"),
    }
)
Shape = tuple[int, ...]
Kind = tuple[str | int | tuple[int, ...], ...]


class LayerKey(Record):
    """What was executed. Two layers with one key share their measurements, in any network."""

    operator: str  # ONNX operator of the anchor node: "Conv", "Gemm", "MaxPool", ...
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    conv_groups: int = 1
    in_size: tuple[int, ...] = ()  # spatial size of the input, pixels
    out_size: tuple[int, ...] = ()
    batch: int = 1
    tail: tuple[str, ...] = ()  # element-wise operators of the layer, behind the anchor

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__.values()))

    @property
    def is_depthwise(self) -> bool:
        """Whether every channel is convolved with a filter of its own."""
        return self.conv_groups == self.in_channels > 1

    def at(self, in_channels: int, out_channels: int) -> "LayerKey":
        """Return the key of the same layer at other channel counts; depthwise stays depthwise."""
        conv_groups = in_channels if self.is_depthwise else self.conv_groups
        return self.model_copy(
            update={
                "in_channels": in_channels,
                "out_channels": out_channels,
                "conv_groups": conv_groups,
            }
        )

    @property
    def kind(self) -> Kind:
        """The key without channel counts and tail: layers that one latency model describes."""
        conv_groups = 0 if self.is_depthwise else self.conv_groups
        shape = (self.kernel, self.strides, self.dilations, conv_groups)
        return (self.operator, *shape, self.in_size, self.out_size, self.batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One anchor node of a template, and which groups decide its channel counts.

    `in_parts` maps a group's name to the number of input channels each of its units feeds;
    `in_fixed` is the number of input channels that no group owns. The same for the output.
    """

    name: str  # ONNX node name
    key: LayerKey  # at full width
    in_parts: dict[str, int]
    in_fixed: int
    out_parts: dict[str, int]
    out_fixed: int
    macs: int  # multiply-adds at full width, whole batch
    branches: tuple[str, ...] = ()  # emptied together with any of these branches
    vanishes_with: tuple[
        str, ...
    ] = ()  # groups of those branches: any of them at width 0 empties it
    nodes: tuple[str, ...] = ()  # ONNX nodes of the layer, the anchor first
    rest: tuple[str, ...] = ()  # operators of its tail that still run once it is emptied
    full: dict[str, int] = field(default_factory=dict)  # full widths of the groups named above

    @property
    def groups(self) -> tuple[str, ...]:
        """Every group that the layer's latency depends on, input first."""
        names = tuple(dict.fromkeys([*self.in_parts, *self.out_parts]))
        if self.vanishes_with and not set(names) & set(self.vanishes_with):
            names += self.vanishes_with[:1]
        return names

    def is_emptied(self, widths: Mapping[str, int]) -> bool:
        """Return whether one of the layer's branches is emptied at these group widths."""
        return any(widths.get(name) == 0 for name in self.vanishes_with)

    def channels_at(self, widths: Mapping[str, int]) -> tuple[int, int]:
        """Return the numbers of input and output channels; groups not named are whole."""

        def total(parts: Mapping[str, int], fixed: int) -> int:
            return fixed + sum(n * widths.get(name, self.full[name]) for name, n in parts.items())

        return total(self.in_parts, self.in_fixed), total(self.out_parts, self.out_fixed)

    def key_at(self, widths: Mapping[str, int]) -> LayerKey | None:
        """Return what is executed at these group widths; None where a branch is emptied.

        Groups that are not named are whole.
        """
        return None if self.is_emptied(widths) else self.key.at(*self.channels_at(widths))

    def rest_key_at(self, widths: Mapping[str, int]) -> LayerKey | None:
        """Return what still runs of an emptied layer: its tail behind the join; None: nothing."""
        if not self.rest:
            return None
        _, channels = self.channels_at(widths)
        return LayerKey(
            operator=self.rest[0],
            in_channels=channels,
            out_channels=channels,
            in_size=self.key.out_size,
            out_size=self.key.out_size,
            batch=self.key.batch,
            tail=self.rest[1:],
        )


def macs_of(layers: Iterable[Layer], widths: Mapping[str, int]) -> int:
    """Return the multiply-adds of all layers at these group widths, whole batch."""
    total = 0
    for layer in layers:
        if layer.is_emptied(widths) or not layer.macs:
            continue
        inputs, outputs = layer.channels_at(widths)
        key = layer.key
        full = key.out_channels * (1 if key.is_depthwise else key.in_channels)
        total += layer.macs * outputs * (1 if key.is_depthwise else inputs) // full
    return total


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
    """One pass over a graph; holds what the nodes read so far have told."""

    def __init__(self, template: onnx.ModelProto, channels: ChannelMap) -> None:
        self.graph = template.graph
        self.channels = channels
        self.shapes = shapes_of(template)
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
        if not inputs or node.op_type in {"Shape", "Size"}:
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
        """Return the layer that a node joins; None where it is an anchor itself."""
        if node.op_type in VIEWS:
            return self.owner.get(inputs[0])
        if node.op_type not in ELEMENTWISE:
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
        return before.scaled(_channels(old), _channels(new)) if old != new else before

    def _product(self, node: onnx.NodeProto, value: str, before: _Content) -> _Draft:
        """Return the draft of a convolution, Gemm or MatMul."""
        axis = 1 if node.op_type in CONVOLUTIONS else -1
        inputs, outputs = self.shape(value)[axis], self.shape(node.output[0])[axis]
        groups = int(_attribute(node, "group", 1))
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
        groups = [*into.parts, *out.parts, *(g for b in emptied for g in b.groups)]
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
            full={group: self.full[group] for group in groups},
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

    def _key(self, draft: _Draft) -> LayerKey:
        node, into, out = draft.node, draft.content_in, draft.content_out
        source = next(name for name in node.input if name and name not in self.constants)
        shape_in, shape_out = self.shape(source), self.shape(node.output[0])
        is_conv = node.op_type in CONVOLUTIONS
        weight = self.shapes.get(node.input[1], ()) if is_conv else ()
        tail = [n.op_type for n in draft.nodes[1:] if n.op_type not in VIEWS]
        return LayerKey(
            operator=node.op_type,
            in_channels=into.fixed + sum(n * self.full[g] for g, n in into.parts.items()),
            out_channels=out.fixed + sum(n * self.full[g] for g, n in out.parts.items()),
            kernel=tuple(weight[2:]) or _attribute(node, "kernel_shape", ()),
            strides=_attribute(node, "strides", ()),
            dilations=_attribute(node, "dilations", ()),
            conv_groups=int(_attribute(node, "group", 1)),
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
        groups = int(_attribute(node, "group", 1))
        kernel = prod(self.shape(node.input[1])[2:])
        if node.op_type == "ConvTranspose":  # every input pixel meets every filter
            return prod(shape_in) * shape_out[1] // groups * kernel
        return prod(shape_out) * shape_in[1] // groups * kernel


def shapes_of(model: onnx.ModelProto) -> dict[str, Shape]:
    """Return the static shapes of all values, inferring those that the file does not hold."""
    known = _stated_shapes(model)
    outputs = {name for node in model.graph.node for name in node.output if name}
    if outputs - known.keys():
        known = _stated_shapes(onnx.shape_inference.infer_shapes(model)) | known
    return known


def _stated_shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    graph = model.graph
    shapes = {i.name: tuple(i.dims) for i in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
            shapes.setdefault(value.name, tuple(d.dim_value for d in kind.shape.dim))
    return shapes


def _channels(shape: Shape) -> int:
    return shape[1] if len(shape) > 1 else 1


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:  # noqa: ANN401
    # Any: an attribute is a number, a text, or a list of them.
    for attribute in node.attribute:
        if attribute.name == name:
            value = onnx.helper.get_attribute_value(attribute)
            return tuple(value) if isinstance(value, (list, tuple)) else value
    return default

"""Layers: what a latency table is keyed by, which groups decide it, and whose time a node's is.

A runtime reports executed nodes, each with the ONNX nodes that it covers. Its time belongs to the
layer of the first convolution, Gemm or MatMul among them, else to the layer of the first node that
is known. An executed node that covers none (a layout reorder) prepares the input of what runs next,
and belongs to that layer; after the last layer, to the last.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Annotated

import onnx
from pydantic import Field, ValidationInfo, field_validator

from hardware.errors import RunError
from hardware.graph.operators import PRODUCTS
from hardware.records import Record
from hardware.runtimes.base import NodeTime

Kind = tuple[str | int | tuple[int, ...], ...]


class LayerKey(Record):
    """What was executed. Two layers with one key share their measurements, in any network."""

    operator: str  # ONNX operator of the head node: "Conv", "Gemm", "MaxPool", ...
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    conv_groups: int = 1
    # Input channels of each group where narrowing takes whole groups away: 1 is depthwise, whatever
    # the width. 0 where it narrows every group and their number stays. None: it has no groups.
    group_channels: Annotated[int | None, Field(validate_default=True)] = None
    in_size: tuple[int, ...] = ()  # of the input: all its axes but the batch and the channels
    out_size: tuple[int, ...] = ()
    batch: int = 1
    tail: tuple[str, ...] = ()  # element-wise operators of the layer, behind the head node
    thinned: bool = False  # only strided 1x1 convolutions read it: a runtime may skip pixels

    @field_validator("group_channels")
    @classmethod
    def _follow_counts(cls, given: int | None, info: ValidationInfo) -> int | None:
        """Return what is said, else what the counts say: tables of earlier versions hold no more.

        A convolution of one channel without groups is an ordinary one.
        """
        groups = info.data.get("conv_groups", 1)
        if given is not None or groups == 1:
            return given
        return int(groups == info.data.get("in_channels"))

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__.values()))

    @property
    def is_depthwise(self) -> bool:
        """Whether every channel is convolved with filters of its own, be it the only one."""
        return self.group_channels == 1

    @property
    def weights(self) -> int:
        """The number of weights that it reads, biases aside; 0 of operators without any.

        Of the product of two activations, the number of elements of one matrix of the second.
        """
        if self.operator not in PRODUCTS:
            return 0
        channels = self.in_channels * self.out_channels // max(self.conv_groups, 1)
        return channels * prod(self.kernel)

    @property
    def macs(self) -> int:
        """The multiply-adds of the whole batch; 0 of operators without a product."""
        # Transposed, every pixel of the input meets every filter; else every pixel of the output.
        size = self.in_size if self.operator == "ConvTranspose" else self.out_size
        return self.batch * self.weights * prod(size)

    def at(self, in_channels: int, out_channels: int, *, thinned: bool = False) -> "LayerKey":
        """Return the key of the same layer at other channel counts; depthwise stays depthwise."""
        conv_groups = self.conv_groups
        if self.group_channels:
            conv_groups = max(in_channels // self.group_channels, 1)
        return self.model_copy(
            update={
                "in_channels": in_channels,
                "out_channels": out_channels,
                "conv_groups": conv_groups,
                "thinned": thinned,
            }
        )

    @property
    def kind(self) -> Kind:
        """The key without channel counts, tail and thinning: what one latency model describes.

        It is the same at every width of a layer.
        """
        groups = (self.group_channels,) if self.group_channels else self.conv_groups
        shape = (self.kernel, self.strides, self.dilations, groups)
        return (self.operator, *shape, self.in_size, self.out_size, self.batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The head node of a layer of a template, and which groups decide its channel counts.

    `in_parts` maps a group's name to the number of input channels each of its units feeds;
    `in_fixed` is the number of input channels that no group owns. The same for the output.
    """

    name: str  # ONNX node name
    key: LayerKey  # at full width
    in_parts: dict[str, int]
    in_fixed: int
    out_parts: dict[str, int]
    out_fixed: int
    branches: tuple[str, ...] = ()  # emptied together with any of these branches
    # Groups of those branches: any of them at width 0 empties it.
    vanishes_with: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()  # ONNX nodes of the layer, the head first
    rest: tuple[str, ...] = ()  # operators of its tail that still run once it is emptied
    thinned_with: tuple[str, ...] | None = None  # groups: all at width 0, only pixels are read
    full: dict[str, int] = field(default_factory=dict)  # full widths of the groups named above

    @property
    def macs(self) -> int:
        """The multiply-adds at full width, whole batch."""
        return self.key.macs

    @property
    def groups(self) -> tuple[str, ...]:
        """Every group that the layer's latency depends on, input first."""
        names = [*self.in_parts, *self.out_parts]
        if self.vanishes_with and not set(names) & set(self.vanishes_with):
            names.append(self.vanishes_with[0])
        return tuple(dict.fromkeys([*names, *(self.thinned_with or ())]))

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
        if self.is_emptied(widths):
            return None
        thinned = self.thinned_with is not None and all(
            widths.get(name) == 0 for name in self.thinned_with
        )
        return self.key.at(*self.channels_at(widths), thinned=thinned)

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
    keys = (layer.key_at(widths) for layer in layers)
    return sum(key.macs for key in keys if key is not None)


def attribute(
    times: Sequence[NodeTime],
    owners: Mapping[str, tuple[Layer, bool]],
    layers: Sequence[Layer],
    widths: Mapping[str, int],
) -> list[tuple[LayerKey, float]]:
    """Return what was executed and how long it took, in the order of the layers.

    A layer that is emptied appears where some of its tail may still run. What runs of a layer of
    which nothing should be left counts for the layer before it.

    Args:
        times: executed nodes in run order.
        owners: per name of a node or value its layer, and whether it is the layer's product.
        layers: of the template.
        widths: of the variant.

    Raises:
        RunError: the runtime named no node of the model.
    """
    homes = [_home(time, owners) for time in times]
    if not any(homes):
        names = ", ".join(time.name for time in times[:5])
        raise RunError(
            f"None of the {len(times)} executed nodes ({names}, ...) could be traced to the model. "
            "The runtime renamed them all: report this with the runtime's version."
        )
    spent: dict[str, float] = {}
    following: str | None = None
    last = next(home for home in reversed(homes) if home)
    for time, home in zip(reversed(times), reversed(homes), strict=True):
        following = home or following or last
        spent[following] = spent.get(following, 0.0) + time.time_us
    found: list[tuple[LayerKey, float]] = []
    for layer in layers:
        key = layer.rest_key_at(widths) if layer.is_emptied(widths) else layer.key_at(widths)
        if key is not None:
            found.append((key, spent.get(layer.name, 0.0)))
        elif layer.name in spent and found:
            before, time_us = found.pop()
            found.append((before, time_us + spent[layer.name]))
    return found


def owners_of(model: onnx.ModelProto, layers: Sequence[Layer]) -> dict[str, tuple[Layer, bool]]:
    """Return, per name of a node or value of a model, its layer and whether it is its product.

    A layer's product is its head node where that is a convolution, Gemm or MatMul.
    """
    by_node = {name: layer for layer in layers for name in layer.nodes}
    owners: dict[str, tuple[Layer, bool]] = {}
    for node in model.graph.node:
        name = node.name if node.name in by_node else node.output[0]
        if name in by_node:
            layer = by_node[name]
            is_product = name == layer.nodes[0] and layer.key.operator in PRODUCTS
            for label in (node.name, *node.output):
                owners.setdefault(label, (layer, is_product))
    return owners


def _home(time: NodeTime, owners: Mapping[str, tuple[Layer, bool]]) -> str | None:
    """Return the name of the layer that an executed node belongs to; None: it covers no node."""
    known = [owners[name] for name in time.nodes if name in owners]
    products = [layer.name for layer, is_product in known if is_product]
    return next(iter([*products, *(layer.name for layer, _ in known)]), None)

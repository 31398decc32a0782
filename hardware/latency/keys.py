"""What a latency table is keyed by, and which pruning groups decide it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod

from hardware.records import Record

Kind = tuple[str | int | tuple[int, ...], ...]
WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


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
    thinned: bool = False  # only strided 1x1 convolutions read it: a runtime may skip pixels

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__.values()))

    @property
    def is_depthwise(self) -> bool:
        """Whether every channel is convolved with a filter of its own."""
        return self.conv_groups == self.in_channels > 1

    @property
    def weights(self) -> int:
        """The number of weights that it reads, biases aside; 0 of operators without any."""
        if self.operator not in WEIGHTED:
            return 0
        channels = self.in_channels * self.out_channels // max(self.conv_groups, 1)
        return channels * prod(self.kernel)

    def at(self, in_channels: int, out_channels: int, *, thinned: bool = False) -> "LayerKey":
        """Return the key of the same layer at other channel counts; depthwise stays depthwise."""
        conv_groups = in_channels if self.is_depthwise else self.conv_groups
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
        """The key without channel counts, tail and thinning: what one latency model describes."""
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
    thinned_with: tuple[str, ...] | None = None  # groups: all at width 0, only pixels are read
    full: dict[str, int] = field(default_factory=dict)  # full widths of the groups named above

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
    total = 0
    for layer in layers:
        if layer.is_emptied(widths) or not layer.macs:
            continue
        inputs, outputs = layer.channels_at(widths)
        key = layer.key
        full = key.out_channels * (1 if key.is_depthwise else key.in_channels)
        total += layer.macs * outputs * (1 if key.is_depthwise else inputs) // full
    return total

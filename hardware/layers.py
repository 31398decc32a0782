"""The layers of an ONNX model as a latency table keys them: by what is executed, not by name."""

from dataclasses import dataclass

from hardware.storing import Record


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
    tail: tuple[str, ...] = ()  # operators that the runtime fused behind the anchor

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__.values()))


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

"""The other way to make a latency table: every layer built and timed alone, and the times added.

Reference:
    Yang et al., "NetAdapt", ECCV 2018, arXiv:1804.03230, sec. 3.4; Shen et al., "HALP: Structural
    Pruning with Latency Constraints", NeurIPS 2022, arXiv:2110.10811, sec. 3.2. Both time layers
    alone, HALP convolutions only; here convolutions and linear layers, with their bias.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hardware.graph.operators import PRODUCTS
from hardware.latency.layers import Layer, LayerKey
from hardware.runtimes.base import EngineSettings, Runtime
from hardware.timing import Protocol, time_together

PROTOCOL = Protocol(
    warmup_s=0.05, min_samples=10, max_samples=60, max_seconds=0.06, relative_width=0.01
)


class IsolatedTable:
    """What layers take alone; each key is measured once, when it is first asked for."""

    def __init__(self, runtime: Runtime, settings: EngineSettings) -> None:
        self.runtime, self.settings = runtime, settings
        self.known_ms: dict[LayerKey, float] = {}

    def sum_ms(self, layers: Sequence[Layer], widths: Mapping[str, int]) -> float:
        """Return the sum of a plan's convolutions and linear layers.

        Args:
            layers: of the network.
            widths: per group.
        """
        total_ms = 0.0
        for layer in layers:
            key = layer.key_at(widths)
            if key is None or key.operator not in PRODUCTS:
                continue
            key = key.model_copy(update={"tail": (), "thinned": False})
            if key not in self.known_ms:
                self.known_ms[key] = self._measure_ms(key)
            total_ms += self.known_ms[key]
        return total_ms

    def _measure_ms(self, key: LayerKey) -> float:
        engine = self.runtime.build(layer_model(key), self.settings)
        (series,) = time_together(
            [engine.timer(engine.random_feeds())],
            PROTOCOL,
            foreign_s=lambda: self.runtime.counters().foreign_s,
        )
        return series.latency.median_ms


def layer_model(key: LayerKey) -> onnx.ModelProto:
    """Return a network of one convolution or one linear layer, with a bias.

    Raises:
        ValueError: another operator, or sizes that no symmetric padding explains.
    """
    generator = np.random.default_rng(0)
    inputs = ["input", "weight", "bias"]
    if key.operator == "Conv":
        shapes = (key.out_channels, key.in_channels // key.conv_groups, *key.kernel)
        node = helper.make_node("Conv", inputs, ["output"], "layer", **_attributes(key))
    elif key.operator in ("Gemm", "MatMul"):
        shapes = (key.out_channels, key.in_channels)
        node = helper.make_node("Gemm", inputs, ["output"], "layer", transB=1)
    else:
        raise ValueError(f"A layer alone is a Conv or a Gemm, not a {key.operator}.")
    weight = generator.standard_normal(shapes) / np.prod(shapes[1:]) ** 0.5
    weights = {"weight": weight, "bias": generator.standard_normal(key.out_channels)}
    graph = helper.make_graph(
        [node],
        "layer",
        [_value("input", [key.batch, key.in_channels, *key.in_size])],
        [_value("output", [key.batch, key.out_channels, *key.out_size])],
        [numpy_helper.from_array(v.astype(np.float32), name) for name, v in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def _attributes(key: LayerKey) -> dict[str, Any]:  # Any: an attribute's type is its own
    """Return the attributes of a convolution; its padding follows from its sizes."""
    axes = range(len(key.kernel))
    strides = key.strides or (1,) * len(key.kernel)
    dilations = key.dilations or (1,) * len(key.kernel)
    pads = []
    for axis in axes:
        reach = dilations[axis] * (key.kernel[axis] - 1) + 1
        missing = (key.out_size[axis] - 1) * strides[axis] + reach - key.in_size[axis]
        pad = max(-(-missing // 2), 0)
        if (key.in_size[axis] + 2 * pad - reach) // strides[axis] + 1 != key.out_size[axis]:
            raise ValueError(f"No symmetric padding turns {key.in_size} into {key.out_size}.")
        pads.append(pad)
    return {
        "kernel_shape": list(key.kernel),
        "strides": list(strides),
        "dilations": list(dilations),
        "pads": [*pads, *pads],
        "group": key.conv_groups,
    }


def _value(name: str, shape: list[int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

"""The anchor: a fixed small network that is timed beside an engine in every recorded session.

The machine's clock drifts between sessions; the ratio of engine and anchor drifts much less.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

VERSION = 1  # of the network: anchors of different versions do not compare
CHANNELS, SIZE, DEPTH = 32, 32, 6
NAME = f"anchor {VERSION}"


def anchor_model() -> onnx.ModelProto:
    """Return the anchor: six 3x3 convolutions of 32 channels at 32x32, 57 million multiply-adds."""
    generator = np.random.default_rng(0)
    shape = [1, CHANNELS, SIZE, SIZE]
    nodes, weights = [], []
    for index in range(DEPTH):
        source = "input" if index == 0 else f"relu{index - 1}"
        target = "output" if index == DEPTH - 1 else f"relu{index}"
        values = generator.standard_normal((CHANNELS, CHANNELS, 3, 3)) / (3 * CHANNELS**0.5)
        weights.append(numpy_helper.from_array(values.astype(np.float32), f"weight{index}"))
        nodes.append(
            helper.make_node(
                "Conv",
                [source, f"weight{index}"],
                [f"conv{index}"],
                f"conv{index}",
                kernel_shape=[3, 3],
                pads=[1] * 4,
            )
        )
        nodes.append(helper.make_node("Relu", [f"conv{index}"], [target], f"relu{index}"))
    graph = helper.make_graph(
        nodes,
        "anchor",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, shape)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)

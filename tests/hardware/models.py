"""A small ONNX network that has every kind of node a runtime fuses."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def parameter(name: str, *shape: int) -> onnx.TensorProto:
    generator = np.random.default_rng(sum(name.encode()))
    values = generator.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    return numpy_helper.from_array(values.astype(np.float32), name)


def network(nodes, parameters, shape, out_shape) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, out_shape)],
        parameters,
    )
    opsets = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def conv(source: str, target: str, name: str, *more: str, **attributes) -> onnx.NodeProto:
    return helper.make_node("Conv", [source, f"{name}.weight", *more], [target], name, **attributes)


def residual(size: int = 32) -> onnx.ModelProto:
    """A residual network with every kind of tail: activation, addition, none, and no bias."""
    node, same = helper.make_node, {"kernel_shape": [3, 3], "pads": [1] * 4}
    nodes = [
        conv("input", "stem_out", "stem", "stem.bias", **same),
        node("Relu", ["stem_out"], ["stem_relu"], "act0"),
        node("MaxPool", ["stem_relu"], ["pooled"], "pool0", kernel_shape=[2, 2], strides=[2, 2]),
        conv("pooled", "a", "block.conv1", "block.bias1", **same),
        node("Relu", ["a"], ["a_relu"], "act1"),
        conv("a_relu", "b", "block.conv2", "block.bias2", **same),
        node("Add", ["b", "pooled"], ["sum"], "add"),
        node("Relu", ["sum"], ["sum_relu"], "act2"),
        conv("sum_relu", "c", "linear", "linear.bias", kernel_shape=[1, 1]),  # nothing behind it
        conv("c", "d", "depthwise", group=32, **same),
        node("Clip", ["d", "zero", "six"], ["d_relu6"], "act3"),
        conv("d_relu6", "e", "odd", kernel_shape=[1, 1]),
        node("GlobalAveragePool", ["e"], ["means"], "pool1"),
        node("Flatten", ["means"], ["flat"], "flatten"),
        node("Gemm", ["flat", "head.weight", "head.bias"], ["output"], "head", transB=1),
    ]
    parameters = [
        *(parameter("stem.weight", 32, 3, 3, 3), parameter("stem.bias", 32)),
        *(parameter("block.conv1.weight", 32, 32, 3, 3), parameter("block.bias1", 32)),
        *(parameter("block.conv2.weight", 32, 32, 3, 3), parameter("block.bias2", 32)),
        *(parameter("linear.weight", 32, 32, 1, 1), parameter("linear.bias", 32)),
        *(parameter("depthwise.weight", 32, 1, 3, 3), parameter("odd.weight", 13, 32, 1, 1)),
        *(parameter("head.weight", 10, 13), parameter("head.bias", 10)),
        numpy_helper.from_array(np.float32(0), "zero"),
        numpy_helper.from_array(np.float32(6), "six"),
    ]
    return network(nodes, parameters, [2, 3, size, size], [2, 10])

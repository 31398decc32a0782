from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from hardware.graph.carve import carve
from pipeline.channels.checks import mask_graph
from pipeline.channels.find import find_groups
from pipeline.networks.export import export_graph
from pipeline.networks.fold_norms import fold_norms
from pipeline.networks.simplify import simplify
from pipeline.records import Network
from tests import nets
from tests.graphs import difference, exported, operations, run


@pytest.mark.parametrize("name", ["chain", "residual", "inverted", "upsampled", "many_groups"])
def test_folding_changes_no_output(name: str) -> None:
    graph = exported(name)

    folded = fold_norms(graph)

    onnx.checker.check_model(folded, full_check=True)
    assert "BatchNormalization" not in {node.op_type for node in folded.graph.node}
    assert difference(run(folded), run(graph)) < 1e-5


def test_a_folded_layer_keeps_its_names() -> None:
    graph = exported("chain")
    norm = next(n for n in graph.graph.node if n.op_type == "BatchNormalization")
    conv = next(n for n in graph.graph.node if n.output[0] == norm.input[0])

    folded = fold_norms(graph)

    layer = next(n for n in folded.graph.node if n.name == conv.name)
    assert list(layer.input) == ["input", "conv1.weight", "bn1.bias"]
    assert layer.output[0] == norm.output[0]
    assert "bn1.weight" not in {tensor.name for tensor in folded.graph.initializer}


def test_a_norm_in_front_of_its_convolution_stays() -> None:
    folded = fold_norms(exported("dense"))

    assert [n.op_type for n in folded.graph.node].count("BatchNormalization") == 1


class Branching(nn.Module):
    """The convolution's output is read beside the norm, so the norm cannot go into it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return self.bn(x) + x


def test_a_norm_whose_convolution_others_read_stays() -> None:
    module = nets.randomise(Branching())
    network = Network(module=module, spec="b", arguments={}, input_shape=nets.INPUT_SHAPE)
    graph = export_graph(network)

    folded = fold_norms(graph)

    assert [n.op_type for n in folded.graph.node].count("BatchNormalization") == 1
    assert difference(run(folded), run(graph)) < 1e-5


def test_a_standardised_weight_is_computed_once_and_then_carved_exactly() -> None:
    graph = exported("standardised")
    channels = find_groups(graph)
    keep = {"conv1": (0, 2, 5), "conv2": (1, 2, 4, 7)}

    folded = fold_norms(graph)

    assert {node.op_type for node in folded.graph.node} == {"Conv", "Relu"}
    assert difference(run(folded), run(graph)) < 1e-5
    carved = carve(folded, channels, keep)
    assert difference(run(carved), run(mask_graph(folded, channels, keep))) < 1e-5


def test_a_network_is_nothing_but_its_layers() -> None:
    folded = fold_norms(exported("residual"))

    operators = Counter(node.op_type for node in folded.graph.node)
    assert set(operators) <= {"Conv", "Relu", "Add", "ReduceMean", "Reshape", "Gemm", "AveragePool"}
    assert operators["Conv"] == 6


def older_export() -> onnx.ModelProto:
    """Return a graph that computes its reshape from `Shape` and chunks through a sequence."""
    constants = {"axis": 1, "zero": 0, "one": 1, "two": 2}
    nodes = [
        helper.make_node("Conv", ["input", "a.weight"], ["a"], "conv_a"),
        helper.make_node("SplitToSequence", ["a", "two"], ["parts"], "chunk", axis=1),
        helper.make_node("SequenceAt", ["parts", "zero"], ["left"]),
        helper.make_node("SequenceAt", ["parts", "one"], ["right"]),
        helper.make_node("Add", ["left", "right"], ["sum"], "add"),
        helper.make_node("Shape", ["sum"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["batch"], axis=0),
        helper.make_node("Unsqueeze", ["batch", "first"], ["batches"]),
        helper.make_node("Concat", ["batches", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["sum", "target"], ["output"], "flatten"),
    ]
    initializers = [
        numpy_helper.from_array(np.array(value, dtype=np.int64), name)
        for name, value in constants.items()
    ]
    initializers += [
        numpy_helper.from_array(np.array([0], dtype=np.int64), "first"),
        numpy_helper.from_array(np.array([-1], dtype=np.int64), "rest"),
        numpy_helper.from_array(np.ones((4, 3, 1, 1), dtype=np.float32), "a.weight"),
    ]
    shapes = {"a": [1, 4, 8, 8], "left": [1, 2, 8, 8], "right": [1, 2, 8, 8], "sum": [1, 2, 8, 8]}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 128])],
        initializers,
        value_info=[
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in shapes.items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_simplifying_computes_shapes_and_unrolls_sequences() -> None:
    graph = older_export()

    simple = simplify(graph)

    assert [n.op_type for n in simple.graph.node] == ["Conv", "Split", "Add", "Reshape"]
    assert difference(run(simple), run(graph)) == 0.0
    assert len({node.name for node in simple.graph.node}) == 4


def test_a_folded_scalar_stays_a_scalar() -> None:
    nodes = [
        helper.make_node("Constant", [], ["first"], "pick", value_int=0),
        helper.make_node("Gather", ["input", "first"], ["output"], "gather", axis=1),
    ]
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 4])]
    outputs = [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 4])]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)

    simple = simplify(model)

    assert [list(t.dims) for t in simple.graph.initializer] == [[]]
    assert run(simple)[0].shape == (1, 4)


def test_a_dropout_stays_for_the_graph_form_to_train_with() -> None:
    nodes = [
        helper.make_node("Dropout", ["v0", "ratio"], ["v1"], "dropout"),
        helper.make_node("Relu", ["v1"], ["v2"], "relu"),
    ]
    ratio = numpy_helper.from_array(np.array(0.3, dtype=np.float32), "ratio")

    simple = simplify(unary(nodes, "v0", "v2", [ratio]))

    assert [(n.op_type, n.domain) for n in simple.graph.node] == [("Dropout", ""), ("Relu", "")]


def test_what_is_computed_from_a_parameter_is_left_alone() -> None:
    simple = simplify(scaled(1))

    assert [node.op_type for node in simple.graph.node] == ["Mul", "Conv"]
    assert [tensor.name for tensor in simple.graph.initializer] == ["c0.weight", "c0.gain"]


def idle(count: int) -> onnx.ModelProto:
    """Return a chain of Identity nodes."""
    nodes = [helper.make_node("Identity", [f"v{i}"], [f"v{i + 1}"], f"n{i}") for i in range(count)]
    return unary(nodes, "v0", f"v{count}", [])


def scaled(count: int) -> onnx.ModelProto:
    """Return a chain of convolutions whose weights are computed, as standardised ones are."""
    nodes, weights = [], []
    for i in range(count):
        nodes += [
            helper.make_node("Mul", [f"c{i}.weight", f"c{i}.gain"], [f"w{i}"], f"mul{i}"),
            helper.make_node("Conv", [f"v{i}", f"w{i}"], [f"v{i + 1}"], f"c{i}"),
        ]
        weight, gain = np.ones((1, 1, 1, 1), np.float32), np.ones(1, np.float32)
        weights.append(numpy_helper.from_array(weight, f"c{i}.weight"))
        weights.append(numpy_helper.from_array(gain, f"c{i}.gain"))
    return unary(nodes, "v0", f"v{count}", weights)


def unary(nodes, first: str, last: str, weights) -> onnx.ModelProto:
    """Return a model of these nodes, from one image of one pixel to another."""
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 1, 1, 1]) for n in (first, last)
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.mark.parametrize("network", [idle, scaled])
def test_the_work_of_folding_grows_in_proportion_to_the_nodes(network) -> None:
    def work(count: int) -> int:
        model = network(count)
        return operations(lambda: fold_norms(model))

    assert work(64) < 2.5 * work(32)

import io

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from hardware.errors import ModelError
from pipeline.networks.prepare import prepare
from tests.graphs import difference, run


def chain(batch: object = "N", height: object = 8, opset: int = 17) -> onnx.ModelProto:
    """Return conv -> relu -> reshape to (its own batch, everything) -> gemm, without shapes."""
    nodes = [
        helper.make_node("Conv", ["input", "a.weight"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Shape", ["b"], ["sizes"]),
        helper.make_node("Gather", ["sizes", "first"], ["batch"]),
        helper.make_node("Concat", ["batch", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["b", "target"], ["flat"]),
        helper.make_node("Gemm", ["flat", "c.weight"], ["output"], transB=1),
    ]
    random = np.random.default_rng(0)
    weights = {
        "a.weight": random.standard_normal((4, 3, 1, 1)).astype(np.float32),
        "c.weight": random.standard_normal((2, 4 * 8 * 8)).astype(np.float32),
        "first": np.array([0]),
        "rest": np.array([-1]),
    }
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, height, 8])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, 2])],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


@pytest.mark.parametrize("opset", range(13, 24))
def test_an_open_batch_becomes_one(opset: int) -> None:
    prepared, notes = prepare(chain(opset=opset))

    assert notes == ("batch N of input input fixed to 1",)
    assert [node.op_type for node in prepared.graph.node] == ["Conv", "Relu", "Reshape", "Gemm"]
    (output,) = prepared.graph.output
    assert [dim.dim_value for dim in output.type.tensor_type.shape.dim] == [1, 2]


def test_a_model_with_fixed_sizes_computes_the_same() -> None:
    model = chain(batch=1)

    prepared, notes = prepare(model)

    assert notes == ()
    assert difference(run(prepared), run(model)) == 0


def test_other_open_sizes_are_refused() -> None:
    with pytest.raises(ModelError, match=r"'input' has shape \(N, 3, height, 8\)"):
        prepare(chain(height="height"))


def test_an_input_of_unknown_rank_is_refused() -> None:
    model = chain()
    model.graph.input[0].type.tensor_type.ClearField("shape")

    with pytest.raises(ModelError, match="how many axes input 'input' has"):
        prepare(model)


def test_weights_that_are_no_numbers_are_refused() -> None:
    model = chain()
    values = numpy_helper.to_array(model.graph.initializer[0]).copy()
    values[1, 2] = np.nan
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, "a.weight"))

    with pytest.raises(ModelError, match=r"a\.weight holds 1 values that are NaN, of 12"):
        prepare(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_the_older_exporter_writes_is_prepared() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    image, file = torch.randn(2, 3, 8, 8), io.BytesIO()
    axes = {"input": {0: "batch"}}
    names = {"input_names": ["input"], "dynamic_axes": axes}
    torch.onnx.export(module.eval(), (image,), file, dynamo=False, opset_version=15, **names)

    prepared, notes = prepare(onnx.load_from_string(file.getvalue()))

    assert notes == ("batch batch of input input fixed to 1",)
    (output,) = prepared.graph.output
    assert [dim.dim_value for dim in output.type.tensor_type.shape.dim] == [1, 144]


def test_what_is_folded_stands_in_the_order_of_the_graph() -> None:
    # In the order of a set of names, one network would be another file in every process, and a
    # table of it would not be found again.
    names = [f"extent_{index}" for index in range(8)]
    nodes = [helper.make_node("Shape", ["input"], [name]) for name in names]
    nodes.append(helper.make_node("Concat", ["input_size", *names], ["output"], axis=0))
    graph = helper.make_graph(
        nodes,
        "shapes",
        [
            helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3]),
            helper.make_tensor_value_info("input_size", TensorProto.INT64, [1]),
        ],
        [helper.make_tensor_value_info("output", TensorProto.INT64, [17])],
    )
    prepared, _ = prepare(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    )
    assert [tensor.name for tensor in prepared.graph.initializer] == names

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from pipeline.networks.graphform.module import GraphForm, Roles
from tests.graphs import difference, run

SHAPE = (2, 3, 4, 5)


def gathering(indices: np.ndarray, batch_dims: int, result: tuple[int, ...]) -> onnx.ModelProto:
    node = helper.make_node("GatherND", ["input", "places"], ["output"], batch_dims=batch_dims)
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, result)],
        [numpy_helper.from_array(indices, "places")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(
    ("indices", "batch_dims", "result"),
    [
        (np.array([[1], [0], [1]]), 0, (3, 3, 4, 5)),
        (np.array([[[1, 2], [0, -1]]]), 0, (1, 2, 4, 5)),
        (np.array([[[2]], [[0]]]), 1, (2, 1, 4, 5)),
        (np.array([[[2, 3], [1, 0]], [[0, 1], [-1, 2]]]), 1, (2, 2, 5)),
    ],
)
def test_places_are_gathered_as_onnx_says(indices, batch_dims, result) -> None:
    model = gathering(indices, batch_dims, result)
    images = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)

    found = GraphForm(model, Roles(parameters=()))(torch.from_numpy(images))

    assert tuple(found.shape) == result
    assert difference([found.numpy()], run(model)) == 0

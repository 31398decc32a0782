import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import NetworkError
from pipeline.networks.export import export_graph
from pipeline.records import Network
from tests import nets
from tests.graphs import run


def network(module: nn.Module) -> Network:
    return Network(module=module, spec="tests.nets:net", arguments={}, input_shape=nets.INPUT_SHAPE)


def test_every_parameter_keeps_its_name_and_values() -> None:
    module = nets.build("inverted")

    graph = export_graph(network(module))

    found = {t.name: onnx.numpy_helper.to_array(t) for t in graph.graph.initializer}
    for name, tensor in module.state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(torch.tensor(found[name]), tensor)


def test_the_graph_computes_what_the_network_computes() -> None:
    module = nets.build("residual")
    graph = export_graph(network(module), batch=2)

    (found,) = run(graph, seed=5)

    generator = np.random.default_rng(5)
    images = torch.tensor(generator.standard_normal((2, 3, 16, 16)).astype("float32"))
    with torch.no_grad():
        expected = module(images)
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-4)


def test_inputs_and_outputs_have_plain_names() -> None:
    one = export_graph(network(nets.build("chain"))).graph
    two = export_graph(network(nets.build("two_heads"))).graph

    assert [i.name for i in one.input] == ["input"]
    assert [o.name for o in one.output] == ["output"]
    assert [o.name for o in two.output] == ["output_0", "output_1"]


class Echo(nn.Module):
    """Gives its input and one value twice."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x.relu()
        return x, y, y


def test_outputs_that_repeat_or_are_the_input_are_named_too() -> None:
    graph = export_graph(network(Echo()))

    onnx.checker.check_model(graph, full_check=True)
    image, one, two = run(graph)
    assert [o.name for o in graph.graph.output] == ["output_0", "output_1", "output_2"]
    assert (one == two).all() and (image.clip(0) == one).all()


def test_every_shape_is_static_and_nothing_is_dead() -> None:
    graph = export_graph(network(nets.build("shuffle")), batch=3)

    onnx.checker.check_model(graph, full_check=True)
    shapes = {i.name: i.type.tensor_type.shape.dim for i in graph.graph.value_info}
    produced = [n for node in graph.graph.node for n in node.output]
    assert all(
        name == "output" or all(dim.dim_value > 0 for dim in shapes[name]) for name in produced
    )
    read = {n for node in graph.graph.node for n in node.input} | {"output"}
    assert set(produced) <= read
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 3


def test_no_local_file_is_named_in_the_graph() -> None:
    graph = export_graph(network(nets.build("chain")))

    assert b".py" not in graph.SerializeToString()


def test_exporting_prints_nothing_and_restores_the_mode(capfd, caplog) -> None:
    module = nets.build("chain")
    module.train()
    module.bn1.eval()

    export_graph(network(module))

    assert module.training and module.conv1.training and not module.bn1.training
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert not [entry for entry in caplog.records if entry.levelname != "DEBUG"]


class DataDependent(nn.Module):
    """Decides by its input what to do, which a graph cannot."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


def test_what_cannot_be_exported_is_refused_with_the_reason() -> None:
    module = DataDependent().train()

    with pytest.raises(NetworkError, match=r"tests\.nets:net cannot be exported.*data-dependent"):
        export_graph(network(module))
    assert module.training

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hardware.graph.carve import carve
from hardware.graph.channel_map import ChannelMap
from pipeline.channels.checks import check_carved, mask_graph, random_keep
from pipeline.channels.find import find_groups
from pipeline.errors import ProofError
from tests import nets
from tests.graphs import difference, exported, run, widths

MIXING = {"layer_normed", "standardised"}  # removing is not masking there, by nature


@pytest.fixture(scope="module")
def graphs() -> dict[str, onnx.ModelProto]:
    return {name: exported(name) for name in nets.NETS}


@pytest.fixture(scope="module")
def maps(graphs: dict[str, onnx.ModelProto]) -> dict[str, ChannelMap]:
    return {name: find_groups(graph) for name, graph in graphs.items()}


@pytest.mark.parametrize("name", nets.NETS)
def test_the_groups_are_those_written_beside_the_network(maps, name) -> None:
    assert widths(maps[name]) == nets.WIDTHS[name]


@pytest.mark.parametrize("name", nets.NETS)
def test_the_branches_are_those_written_beside_the_network(maps, name) -> None:
    found = {branch.name: branch.groups for branch in maps[name].branches}

    assert found == nets.BRANCHES.get(name, {})


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", sorted(set(nets.NETS) - MIXING))
def test_removed_is_masked(graphs, maps, name, seed) -> None:
    keep = random_keep(maps[name], seed)
    whole = run(graphs[name])
    silenced = run(mask_graph(graphs[name], maps[name], keep))

    removed = run(carve(graphs[name], maps[name], keep))

    assert difference(removed, silenced) < 1e-5
    assert difference(silenced, whole) > 1e-3  # something was silenced at all


@pytest.mark.parametrize("name", nets.NETS)
def test_a_carved_graph_has_the_labels_that_were_kept(graphs, maps, name) -> None:
    keep = random_keep(maps[name], seed=3)

    check_carved(maps[name], keep, carve(graphs[name], maps[name], keep))


def test_channels_that_are_out_of_step_are_noticed(graphs, maps) -> None:
    keep = {"conv1": (0, 1), "conv1#2": (0, 1)}
    carved = carve(graphs["split"], maps["split"], keep)
    split = next(node for node in carved.graph.node if node.op_type == "Split")
    split.output[:] = reversed(split.output)

    with pytest.raises(ProofError, match="meets channel"):
        check_carved(maps["split"], keep, carved)


@pytest.mark.parametrize("name", sorted(MIXING))
def test_groups_whose_channels_are_mixed_say_by_which_operator(maps, name) -> None:
    mixed = {group.name: group.mixes for group in maps[name].groups if group.mixes}

    expected = {
        "layer_normed": {"stem": "LayerNormalization"},
        "standardised": {"conv1": "ReduceMean"},
    }
    assert mixed == expected[name]


def test_every_position_of_a_group_belongs_to_one_of_its_units(maps) -> None:
    for channels in maps.values():
        for group in channels.groups:
            for part in group.slices:
                assert set(part.units) - {-1} == set(range(group.width))


def test_roles_say_what_an_axis_is_to_its_layer(maps) -> None:
    group = maps["inverted"].group("expand")

    roles = {(part.parameter, part.axis): part.role for part in group.slices}
    assert roles == {
        ("expand.weight", 0): "filter",
        ("bn1.weight", 0): "norm",
        ("bn1.bias", 0): "norm",
        ("bn1.running_mean", 0): "norm",
        ("bn1.running_var", 0): "norm",
        ("depthwise.weight", 0): "depthwise",
        ("bn2.weight", 0): "norm",
        ("bn2.bias", 0): "norm",
        ("bn2.running_mean", 0): "norm",
        ("bn2.running_var", 0): "norm",
        ("squeeze.weight", 1): "input",
        ("excite.weight", 0): "filter",
        ("excite.bias", 0): "bias",
        ("project.weight", 1): "input",
    }


def test_outputs_are_frozen_and_say_so(maps) -> None:
    frozen = {axis.parameter: axis for axis in maps["two_heads"].frozen}

    assert frozen["conv2.weight"].channels == 4
    assert "output of the network" in frozen["conv2.weight"].reason


def chain_with(operator: onnx.NodeProto, domain: str = "") -> onnx.ModelProto:
    """Return conv -> operator -> conv."""
    weights = {"a.weight": (4, 3, 1, 1), "b.weight": (5, 4, 1, 1), "c.weight": (2, 5, 1, 1)}
    nodes = [
        helper.make_node("Conv", ["input", "a.weight"], ["a"], "conv_a"),
        operator,
        helper.make_node("Conv", ["x", "b.weight"], ["b"], "conv_b"),
        helper.make_node("Conv", ["b", "c.weight"], ["output"], "conv_c"),
    ]
    floats = [
        numpy_helper.from_array(np.ones(shape, dtype=np.float32), name)
        for name, shape in weights.items()
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 2, 8, 8])],
        floats,
        value_info=[helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8])],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("acme", 1)]
    return helper.make_model(graph, opset_imports=opsets)


def test_an_operator_without_a_rule_freezes_what_it_touches_and_is_named() -> None:
    graph = chain_with(helper.make_node("Twirl", ["a"], ["x"], "twirl_1", domain="acme"))

    channels = find_groups(graph)

    assert widths(channels) == {"b": 5}
    assert channels.unknown_operators == {"acme::Twirl": 1}
    reasons = {axis.parameter: axis.reason for axis in channels.frozen}
    assert "acme::Twirl twirl_1" in reasons["a.weight"]


def test_an_operator_with_a_rule_in_its_place_freezes_nothing() -> None:
    graph = chain_with(helper.make_node("Relu", ["a"], ["x"], "relu_1"))

    assert widths(find_groups(graph)) == {"a": 4, "b": 5}


def test_the_map_survives_its_own_json(maps) -> None:
    for channels in maps.values():
        assert ChannelMap.model_validate_json(channels.model_dump_json()) == channels


def test_what_control_flow_reads_is_frozen_even_where_only_its_body_names_it() -> None:
    body = [
        helper.make_graph(
            [helper.make_node(kind, ["a"], ["inner"], f"{kind}_inner")],
            kind,
            [],
            [helper.make_tensor_value_info("inner", TensorProto.FLOAT, [1, 4, 8, 8])],
        )
        for kind in ("Relu", "Neg")
    ]
    graph = chain_with(
        helper.make_node("If", ["yes"], ["x"], "if_1", then_branch=body[0], else_branch=body[1])
    )
    graph.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))

    channels = find_groups(graph)

    assert widths(channels) == {"b": 5}
    reasons = {axis.parameter: axis.reason for axis in channels.frozen}
    assert "operator without a rule: If if_1" in reasons["a.weight"]


def test_channels_whose_shapes_nothing_tells_are_frozen() -> None:
    graph = chain_with(helper.make_node("Twirl", ["a"], ["x"], "twirl_1", domain="acme"))
    del graph.graph.value_info[:]
    graph.graph.output[0].type.tensor_type.ClearField("shape")

    channels = find_groups(graph)

    assert widths(channels) == {}
    reasons = {axis.parameter: axis.reason for axis in channels.frozen}
    assert "operator without a rule" in reasons["a.weight"]

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from hardware.errors import CarveError, ModelError
from hardware.graph.carve import carve, keep_first
from hardware.graph.channel_map import ChannelMap, Resize
from hardware.graph.model import load_model
from pipeline.channels.checks import random_keep
from pipeline.channels.find import find_groups
from pipeline.networks.fold_norms import fold_norms
from tests import nets
from tests.graphs import difference, exported, operations, run
from tests.hardware.templates import Builder, residual

NAMES = ["inverted", "residual", "shuffle", "flattened", "many_groups", "padded_shortcut"]


@pytest.fixture(scope="module")
def graphs() -> dict[str, onnx.ModelProto]:
    return {name: exported(name) for name in NAMES}


@pytest.fixture(scope="module")
def maps(graphs: dict[str, onnx.ModelProto]) -> dict[str, ChannelMap]:
    return {name: find_groups(graph) for name, graph in graphs.items()}


def shape_of(model: onnx.ModelProto, parameter: str) -> tuple[int, ...]:
    return next(tuple(t.dims) for t in model.graph.initializer if t.name == parameter)


def test_carving_cuts_every_coupled_parameter(graphs, maps) -> None:
    carved = carve(graphs["inverted"], maps["inverted"], {"expand": (1, 4, 7), "squeeze": (0,)})

    assert shape_of(carved, "expand.weight") == (3, 4, 1, 1)
    assert shape_of(carved, "bn1.running_var") == (3,)
    assert shape_of(carved, "depthwise.weight") == (3, 1, 3, 3)
    assert shape_of(carved, "squeeze.weight") == (1, 3, 1, 1)
    assert shape_of(carved, "excite.weight") == (3, 1, 1, 1)
    assert shape_of(carved, "project.weight") == (4, 3, 1, 1)


def test_what_stays_keeps_its_values(graphs, maps) -> None:
    def values(model: onnx.ModelProto) -> np.ndarray:
        return numpy_helper.to_array(
            next(t for t in model.graph.initializer if t.name == "bn1.weight")
        )

    carved = carve(graphs["inverted"], maps["inverted"], {"expand": (1, 4, 7)})

    np.testing.assert_array_equal(values(carved), values(graphs["inverted"])[[1, 4, 7]])


def test_the_conv_groups_follow_the_channels(graphs, maps) -> None:
    carved = carve(graphs["many_groups"], maps["many_groups"], {"conv1": (0, 5)})

    groups = {a.i for n in carved.graph.node for a in n.attribute if a.name == "group" and a.i > 1}
    assert groups == {2}
    assert shape_of(carved, "conv2.weight") == (4, 2, 3, 3)


@pytest.mark.parametrize("name", NAMES)
def test_the_template_carves_to_the_same_function(graphs, maps, name) -> None:
    keep = random_keep(maps[name], seed=1)
    template = fold_norms(graphs[name])

    from_template = carve(template, maps[name], keep)

    onnx.checker.check_model(from_template, full_check=True)
    from_graph = carve(graphs[name], maps[name], keep)
    assert difference(run(from_template), run(from_graph)) < 1e-5


@pytest.mark.parametrize("folded", [False, True])
def test_an_emptied_branch_adds_nothing_and_is_gone(graphs, maps, folded) -> None:
    graph, channels = graphs["residual"], maps["residual"]
    template = fold_norms(graph) if folded else graph

    emptied = carve(template, channels, {"conv1": (), "conv3": ()})

    onnx.checker.check_model(emptied, full_check=True)
    names = {tensor.name for tensor in emptied.graph.initializer}
    assert not [name for name in names if name.startswith(("conv", "bn"))]
    assert "Add" not in {node.op_type for node in emptied.graph.node}
    assert difference(run(emptied), run(_with_silent_branches(graph))) < 1e-5


def _with_silent_branches(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return the whole graph with all that a branch adds set to zero."""
    silent = onnx.ModelProto()
    silent.CopyFrom(graph)
    for tensor in silent.graph.initializer:
        if tensor.name in ("bn2.weight", "bn2.bias", "conv4.weight", "conv4.bias"):
            zeros = np.zeros(tuple(tensor.dims), dtype=np.float32)
            tensor.CopyFrom(numpy_helper.from_array(zeros, tensor.name))
    return silent


def test_one_branch_is_emptied_while_the_rest_is_narrowed(graphs, maps) -> None:
    keep = {"conv1": (), "conv3": (0, 2), "stem": (1, 3, 5)}

    carved = carve(graphs["residual"], maps["residual"], keep)

    assert shape_of(carved, "conv3.weight") == (2, 3, 3, 3)
    assert [node.op_type for node in carved.graph.node].count("Add") == 1
    run(carved)


def test_carving_leaves_the_model_alone(graphs, maps) -> None:
    before = graphs["residual"].SerializeToString()

    carve(graphs["residual"], maps["residual"], keep_first(maps["residual"], {"stem": 1}))

    assert graphs["residual"].SerializeToString() == before


def test_keeping_the_first_units(maps) -> None:
    assert keep_first(maps["residual"], {"stem": 2, "conv1": 0}) == {"stem": (0, 1), "conv1": ()}
    with pytest.raises(CarveError, match="has 6 channels; a width of 7"):
        keep_first(maps["residual"], {"stem": 7})


@pytest.mark.parametrize(
    ("name", "keep", "message"),
    [
        ("residual", {"conv9": (0,)}, "No pruning group 'conv9'"),
        ("residual", {"stem": (0, 6)}, "channel 6 is out of range"),
        ("residual", {"stem": (2, 1)}, "must ascend"),
        ("residual", {"stem": ()}, "belongs to no residual branch"),
        ("inverted", {"expand": ()}, "emptied as a whole or not at all"),
    ],
)
def test_what_cannot_be_kept_is_refused(graphs, maps, name, keep, message) -> None:
    with pytest.raises(CarveError, match=message):
        carve(graphs[name], maps[name], keep)


def test_a_frozen_group_is_not_narrowed(graphs, maps) -> None:
    channels = maps["residual"]
    frozen = channels.model_copy(
        update={
            "groups": tuple(
                g.model_copy(update={"frozen": "its forward says 6"}) if g.name == "stem" else g
                for g in channels.groups
            )
        }
    )

    with pytest.raises(CarveError, match="cannot be narrowed: its forward says 6"):
        carve(graphs["residual"], frozen, {"stem": (0,)})


def test_the_map_of_another_network_is_refused(graphs, maps) -> None:
    wrong = maps["residual"].model_copy(
        update={
            "groups": tuple(
                g.model_copy(
                    update={
                        "slices": tuple(
                            s.model_copy(update={"units": (*s.units, 0)}) for s in g.slices
                        )
                    }
                )
                for g in maps["residual"].groups
            )
        }
    )

    with pytest.raises(CarveError, match="belongs to another network"):
        carve(graphs["residual"], wrong, {"stem": (0,)})


class Counted(tuple[int, ...]):
    """A tuple whose elements are handed out one by one, so that reading them is counted."""

    def __iter__(self):
        for index in range(len(self)):
            yield self[index]


def reshaped(width: int) -> tuple[onnx.ModelProto, ChannelMap]:
    """Return convolution -> reshape that says the width -> convolution, and its map."""
    builder = Builder(4)
    value = builder.conv("input", "wide", (None, 3), ("wide", width), kernel=1)
    target = np.array([1, width, 2, 8], dtype=np.int64)
    builder.weights.append(numpy_helper.from_array(target, "target"))
    value = builder.add("Reshape", [value, "target"], "reshape")
    model, channels = builder.finish(
        builder.conv(value, "last", ("wide", width), (None, 4), kernel=1)
    )
    size = Resize(node="reshape", input=1, index=1, parts={"wide": tuple(range(width))})
    return model, channels.model_copy(update={"resizes": (size,)})


def test_the_work_of_carving_grows_in_proportion_to_the_channels() -> None:
    def work(width: int) -> int:
        model, channels = reshaped(width)
        return operations(lambda: carve(model, channels, {"wide": Counted(range(0, width, 2))}))

    assert work(512) < 2.5 * work(256)


def test_the_work_of_carving_grows_in_proportion_to_groups_and_branches() -> None:
    def work(blocks: int) -> int:
        model, channels = residual(size=8, blocks=blocks)
        keep = {group.name: () for group in channels.groups if group.name.startswith("inner")}
        return operations(lambda: carve(model, channels, keep))

    assert work(64) < 2.5 * work(32)


def test_a_model_is_loaded_as_it_was_saved(graphs, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(graphs["residual"], path)

    assert load_model(path).SerializeToString() == graphs["residual"].SerializeToString()


def test_a_file_that_is_no_model_is_refused(graphs, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(ModelError, match="there is no such file"):
        load_model(path)

    path.write_bytes(b"this is not a model")
    with pytest.raises(ModelError, match=r"not a sound ONNX model|holds no ONNX graph"):
        load_model(path)

    path.write_bytes(graphs["residual"].SerializeToString()[:-400])
    with pytest.raises(ModelError, match=r"model\.onnx"):
        load_model(path)


def test_absent_external_data_is_refused(graphs, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = onnx.ModelProto()
    model.CopyFrom(graphs["residual"])  # saving moves the weights out of the object, too
    onnx.save(model, path, save_as_external_data=True, location="weights", size_threshold=0)
    (tmp_path / "weights").unlink()

    with pytest.raises(ModelError, match="external data"):
        load_model(path)


def test_all_tiny_networks_are_known_here() -> None:
    assert set(NAMES) <= set(nets.NETS)

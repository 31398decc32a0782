import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hardware.errors import StorageError
from hardware.records import Record
from pipeline.errors import RecipeError
from pipeline.recipe import Recipe
from pipeline.workspace import Workspace


class Note(Record):
    text: str


def recipe(folder, **changes) -> Recipe:
    body = {
        "model": {"name": "timm:resnet18", "input_shape": [3, 32, 32]},
        "data": {"source": "digits"},
        "target": {"runtime": "fake", "latency_ratio": 0.5},
        "out": folder,
    }
    return Recipe.model_validate(body | changes)


def test_a_finished_stage_is_found_again(tmp_path):
    Workspace(recipe(tmp_path)).save(Note(text="done"), "plan")

    assert Workspace(recipe(tmp_path)).load(Note, "plan") == Note(text="done")


def test_a_stage_that_is_not_finished_is_none(tmp_path):
    assert Workspace(recipe(tmp_path)).load(Note, "plan") is None


def test_the_folder_of_another_recipe_is_refused(tmp_path):
    Workspace(recipe(tmp_path))

    with pytest.raises(RecipeError, match="holds a run of another recipe"):
        Workspace(recipe(tmp_path, seed=1))


def test_restart_discards_what_an_earlier_run_left(tmp_path):
    Workspace(recipe(tmp_path)).save(Note(text="old"), "plan")

    place = Workspace(recipe(tmp_path, seed=1), restart=True)

    assert place.load(Note, "plan") is None


def test_an_output_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(StorageError, match=r"Cannot write .* choose another output folder"):
        Workspace(recipe(tmp_path / "file" / "out"))


def test_a_damaged_record_is_named(tmp_path):
    place = Workspace(recipe(tmp_path))
    (place.state / "plan.json").write_text("{")

    with pytest.raises(StorageError, match=r"plan\.json is damaged"):
        place.load(Note, "plan")


def test_weights_that_are_not_there_are_named(tmp_path):
    model = {"name": "timm:resnet18", "input_shape": [3, 32, 32]}

    with pytest.raises(StorageError, match=r"Cannot read .*none\.safetensors"):
        Workspace(recipe(tmp_path, model={**model, "weights": tmp_path / "none.safetensors"}))


def test_other_weights_in_a_side_file_of_the_network_are_noticed(tmp_path):
    network = tmp_path / "net.onnx"
    save_product(network, weight=1.0)
    asked = recipe(tmp_path / "out", model={"name": str(network), "input_shape": [1, 4, 4]})
    Workspace(asked)
    before = network.read_bytes()

    save_product(network, weight=2.0)

    assert network.read_bytes() == before
    with pytest.raises(RecipeError, match="of other weights"):
        Workspace(asked)


def save_product(path, weight: float) -> None:
    """Save a network that multiplies by a tensor, which lies in a file of its own."""
    values = numpy_helper.from_array(np.full((4, 4), weight, np.float32), "weight")
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 1, 4, 4]) for n in "xy"]
    node = helper.make_node("Mul", ["x", "weight"], ["y"])
    graph = helper.make_graph([node], "product", [ends[0]], [ends[1]], [values])
    (path.parent / "weights.bin").unlink(missing_ok=True)
    onnx.save(
        helper.make_model(graph),
        path,
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )

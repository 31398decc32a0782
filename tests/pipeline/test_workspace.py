import pytest

from hardware.errors import StorageError
from hardware.records import Record
from pipeline.errors import RecipeError
from pipeline.recipe import Recipe
from pipeline.workspace import Workspace, file_digest


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
    with pytest.raises(StorageError, match=r"Cannot read .*none\.safetensors"):
        file_digest(tmp_path / "none.safetensors")

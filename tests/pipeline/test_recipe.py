from pathlib import Path

import pytest

from pipeline.errors import RecipeError
from pipeline.recipe import dump_recipe, read_recipe

GOOD = """
model: {name: "timm:resnet18", input_shape: [3, 32, 32]}
data: {source: digits}
target: {runtime: fake, latency_ratio: 0.5}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_defaults_fill_what_a_recipe_leaves_out(tmp_path):
    recipe = read_recipe(write(tmp_path, GOOD))

    assert recipe.plan.rounds == 1 and recipe.target.batch == 1


def test_set_overrides_nested_keys_with_their_yaml_type(tmp_path):
    changes = ("target.latency_ratio=0.25", "model.arguments.depth=20", "data.augment=[flip]")

    recipe = read_recipe(write(tmp_path, GOOD), changes)

    assert recipe.target.latency_ratio == 0.25
    assert recipe.model.arguments == {"depth": 20}
    assert recipe.data.augment == ("flip",)


def test_a_written_out_recipe_reads_back_the_same(tmp_path):
    recipe = read_recipe(write(tmp_path, GOOD))

    assert read_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


def test_an_unknown_key_is_named_with_those_that_exist(tmp_path):
    with pytest.raises(RecipeError, match=r"plan\.epoch: unknown key\. Known here: .*objective"):
        read_recipe(write(tmp_path, GOOD + "plan: {epoch: 3}"))


def test_a_missing_section_is_named(tmp_path):
    with pytest.raises(RecipeError, match="target: missing"):
        read_recipe(write(tmp_path, GOOD.replace("target", "#")))


def test_a_value_out_of_range_is_named_with_what_was_given(tmp_path):
    with pytest.raises(RecipeError, match=r"latency_ratio: .*less than or equal to 1 \(got 1\.5\)"):
        read_recipe(write(tmp_path, GOOD), ("target.latency_ratio=1.5",))


def test_exactly_one_kind_of_target_is_demanded(tmp_path):
    with pytest.raises(RecipeError, match="exactly one of latency_ms and latency_ratio"):
        read_recipe(write(tmp_path, GOOD), ("target.latency_ms=3",))


def test_an_override_without_a_value_shows_how_to_write_one(tmp_path):
    with pytest.raises(RecipeError, match="--set takes key=value"):
        read_recipe(write(tmp_path, GOOD), ("target.latency_ratio",))


def test_an_override_below_a_value_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="'runtime' is a value, not a section"):
        read_recipe(write(tmp_path, GOOD), ("target.runtime.name=ov",))


def test_a_recipe_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"Cannot read the recipe .*none\.yaml"):
        read_recipe(tmp_path / "none.yaml")


def test_a_file_that_is_not_yaml_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="is not YAML"):
        read_recipe(write(tmp_path, "a: [1"))


def test_a_yaml_list_is_not_a_recipe(tmp_path):
    with pytest.raises(RecipeError, match="must hold sections"):
        read_recipe(write(tmp_path, "- a"))


def test_a_form_that_does_not_exist_is_named_with_those_that_do(tmp_path):
    with pytest.raises(RecipeError, match=r"surgery: .*'auto', 'class' or 'graph' \(got 'onnx'\)"):
        read_recipe(write(tmp_path, GOOD), ("surgery=onnx",))


def test_an_onnx_file_has_no_class_to_prune(tmp_path):
    with pytest.raises(RecipeError, match=r"net\.onnx has no class: say auto or graph"):
        read_recipe(write(tmp_path, GOOD), ("surgery=class", "model.name=net.onnx"))

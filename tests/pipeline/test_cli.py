"""What a user sees: exit codes and messages. Every bad input ends in code 2 and one clear text."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
import yaml
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from pipeline.cli import app
from tests.pipeline.test_run import PLAN

RECIPE = {
    "model": {
        "name": "benchmarks.networks:digits_resnet",
        "arguments": {"blocks": 1},
        "input_shape": [1, 16, 16],
    },
    "data": {"source": "digits", "batch": 128},
    "target": {"runtime": "fake", "latency_ratio": 0.6, "table_minutes": 0.001},
    "plan": PLAN,
    "finetune": {"epochs": 1, "bf16": False},
}


def espalier(folder: Path, command: str, *overrides: str) -> tuple[int, str]:
    """Run a command on the recipe above; returns exit code and everything that was said."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    places = (f"out={folder / 'out'}", f"profiles={folder / 'profiles'}")
    words = [command, str(path)]
    for override in (*places, *overrides):
        words += ["--set", override]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture
def images(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for index in range(8):
                place = tmp_path / "images" / split / name / f"{index}.png"
                Image.new("L", (16, 16), index).save(place)
    return tmp_path / "images"


def commands(group, *words: str) -> list[tuple[str, ...]]:
    """Return the words of every command, those of groups of commands included."""
    if not hasattr(group, "commands"):
        return [words]
    return [
        found for name, command in group.commands.items()
        for found in commands(command, *words, name)
    ]  # fmt: skip


@pytest.mark.parametrize("words", commands(typer.main.get_group(app)), ids=" ".join)
def test_the_help_of_every_command_has_an_example_and_the_exit_codes(words):
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200"})
    said = " ".join(result.output.split())

    assert result.exit_code == 0
    assert f"espalier {' '.join(words)} ".replace("profile run ", "profile ") in f"{said} "
    assert "Exit codes:" in said and "130" in said


def test_plan_shows_the_plan_of_the_first_round_and_changes_nothing(tmp_path):
    code, said = espalier(tmp_path, "plan", "plan.rounds=2")

    assert code == 0 and "The first of 2 rounds" in said
    assert "layer1.0.conv1" in said and "Plan:" in said
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_verdict_that_passes_ends_with_code_0(tmp_path):
    code, said = espalier(tmp_path, "compress", "limits.accuracy_drop_points=100")

    assert code == 0
    assert "Verdict: passed" in said


def test_a_verdict_that_fails_ends_with_code_1(tmp_path):
    code, said = espalier(tmp_path, "compress", "finetune.epochs=0", "limits.parity=1e-30")

    assert code == 1
    assert "Verdict: missed" in said


def test_an_unknown_key_ends_with_code_2(tmp_path):
    code, said = espalier(tmp_path, "compress", "plan.epoch=3")

    assert code == 2
    assert "plan.epoch: unknown key. Known here:" in said


def test_an_unknown_criterion_ends_with_code_2(tmp_path):
    code, said = espalier(tmp_path, "plan", "plan.criterion=l7")

    assert code == 2
    assert "plan.criterion is 'l7'; there are l1, l2, fpgm" in said


def test_a_plan_by_responses_and_effective_filters_is_made(tmp_path):
    code, said = espalier(
        tmp_path, "plan", "plan.criterion=thinet", "plan.redundancy=effective_entropy"
    )

    assert code == 0, said
    assert "Plan:" in said


def test_a_runtime_that_is_not_installed_ends_with_code_2(tmp_path, monkeypatch):
    find_spec = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name == "openvino" else find_spec(name, *rest),
    )

    code, said = espalier(tmp_path, "compress", "target.runtime=ov")

    assert code == 2
    assert "OpenVINO is not installed. Install it: pip install openvino" in said


def test_a_target_that_cannot_be_met_says_what_can_be(tmp_path):
    code, said = espalier(tmp_path, "plan", "target.latency_ratio=0.05", "plan.redundancy=graph")

    assert code == 2
    assert "The least that can be met above the redundancy floors is" in said
    assert "At their narrowest there:" in said and "floor" in said


def test_weights_that_do_not_fit_end_with_code_2(tmp_path):
    save_file({"conv1.weight": torch.zeros(3, 1, 3, 3)}, tmp_path / "w.safetensors")

    code, said = espalier(tmp_path, "compress", f"model.weights={tmp_path / 'w.safetensors'}")

    assert code == 2
    assert "NetworkError" in said and "conv1.weight" in said


def test_a_folder_without_images_ends_with_code_2(tmp_path, images):
    for image in (images / "train" / "dog").iterdir():
        image.unlink()

    code, said = espalier(tmp_path, "compress", f"data.source={images}")

    assert code == 2
    assert "DataError" in said and "dog" in said


def test_a_class_missing_in_val_ends_with_code_2(tmp_path, images):
    for image in (images / "val" / "dog").iterdir():
        image.unlink()
    (images / "val" / "dog").rmdir()

    code, said = espalier(tmp_path, "compress", f"data.source={images}")

    assert code == 2
    assert "DataError" in said and "dog" in said


def test_a_corrupt_onnx_file_ends_with_code_2(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"not a model")

    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "model.onnx")])

    assert result.exit_code == 2
    assert "is not a sound ONNX model" in " ".join(result.output.split())


def test_a_table_of_another_device_ends_with_code_2(tmp_path):
    assert espalier(tmp_path, "profile")[0] == 0
    [table] = (tmp_path / "profiles").rglob("*.json")
    body = json.loads(table.read_text())
    body["key"]["fingerprint"] = "0" * len(body["key"]["fingerprint"])
    table.write_text(json.dumps(body))

    code, said = espalier(tmp_path, "plan", f"target.table={table}")

    assert code == 2
    assert "was measured elsewhere: fingerprint" in said


def test_an_output_folder_that_cannot_be_written_ends_with_code_2(tmp_path):
    (tmp_path / "file").write_text("in the way")

    code, said = espalier(tmp_path, "compress", f"out={tmp_path / 'file' / 'out'}")

    assert code == 2
    assert "Cannot write" in said and "choose another output folder" in said


def test_inspect_shows_groups_and_writes_a_page(tmp_path):
    words = ["inspect", "torchvision:resnet18", "--input-shape", "3,64,64"]

    result = CliRunner().invoke(
        app, [*words, "--html", str(tmp_path / "page.html")], env={"COLUMNS": "160"}
    )

    assert result.exit_code == 0, result.output
    assert "layer1.0.conv1" in result.output
    assert "Class form: the class can lose all that the graph can." in result.output
    assert "layer1.0.conv1" in (tmp_path / "page.html").read_text()


def test_inspect_prints_json_that_parses():
    words = ["inspect", "torchvision:resnet18", "--input-shape", "3,64,64", "--json"]

    body = json.loads(CliRunner().invoke(app, words).stdout)

    assert body["prunable_channel_share"] == body["form"]["class_share"] > 0.9
    assert {group["name"] for group in body["groups"]} >= {"layer1.0.conv1"}
    assert all(len(g["replaceable"]) in (0, g["width"]) for g in body["groups"])


def test_inspect_compares_criteria_on_images(tmp_path):
    words = ["inspect", "benchmarks.networks:digits_resnet", "--input-shape", "1,16,16"]
    words += ["--diagnose", "--data", "digits", "--images", "64"]

    page = tmp_path / "page.html"

    shown = CliRunner().invoke(app, words, env={"COLUMNS": "160"})
    printed = CliRunner().invoke(app, [*words, "--json", "--html", str(page)]).stdout
    body = json.loads(printed)["diagnosis"]

    assert shown.exit_code == 0, shown.output
    assert "Applicability:" in shown.output and "18 criteria on 64 images" in shown.output
    assert "Maximum compression" in shown.output and "linear CKA" in shown.output
    assert len(json.loads(printed)["network"]["similarity"]) == len(body["groups"])
    assert "What criteria mean here" in page.read_text()
    assert body["images"] == 64 and "thinet" in body["criteria"]
    assert len(body["groups"][0]["agreements"]) == len(body["network"]) == 18 * 17 / 2


def test_diagnose_without_images_is_refused():
    result = CliRunner().invoke(app, ["inspect", "timm:resnet18", "--diagnose"])

    assert result.exit_code == 2
    assert "--diagnose needs images" in " ".join(result.output.split())


def test_inspect_takes_the_model_and_the_surgery_of_a_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "surgery": "graph"}))
    words = ["inspect", str(path), "--set", "model.arguments.blocks=2", "--json"]

    body = json.loads(CliRunner().invoke(app, words).stdout)

    assert body["form"]["taken"] == "graph"
    assert any("layer1.1." in group["name"] for group in body["groups"])


def test_what_a_recipe_says_of_its_model_is_not_said_again(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    shape = ["--input-shape", "1,16,16"]

    twice = CliRunner().invoke(app, ["inspect", str(path), *shape])
    no_recipe = CliRunner().invoke(app, ["inspect", "timm:resnet18", "--set", "seed=1"])

    assert (twice.exit_code, no_recipe.exit_code) == (2, 2)
    assert "is a recipe and names its own weights" in " ".join(twice.output.split())
    assert "--set changes a recipe" in " ".join(no_recipe.output.split())


def test_an_input_shape_of_two_numbers_is_refused():
    result = CliRunner().invoke(app, ["inspect", "timm:resnet18", "--input-shape", "64,64"])

    assert result.exit_code == 2
    assert "An input shape is channels,height,width" in " ".join(result.output.split())


def test_devices_names_every_runtime():
    result = CliRunner().invoke(app, ["devices"], env={"COLUMNS": "160"})

    assert result.exit_code == 0
    assert all(name in result.output for name in ("ort", "ov", "fake"))


def test_devices_works_where_torch_is_absent():
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'torch':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from pipeline.cli import app\n"
        "app(['devices'], standalone_mode=False)\n"
    )

    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert "ov" in done.stdout and "ort" in done.stdout


def test_compress_without_torch_says_what_to_install(tmp_path):
    code = (
        "import sys\n"
        "from importlib import util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
        "from pipeline.cli import app\n"
        "app(['compress', 'recipe.yaml'])\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert "needs torch, which is not installed" in " ".join(done.stderr.split())

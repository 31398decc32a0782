"""A network measured elsewhere: bundle there, table back, and a plan that rests on the table."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from hardware.bundle import read_bundle
from hardware.errors import MissingLatencyError
from hardware.latency.table import load_table
from hardware.remote import measure_bundle
from hardware.runtimes.base import EngineSettings
from hardware.runtimes.fake import FakeRuntime
from hardware.runtimes.trt import TensorRt
from pipeline.cli import app
from pipeline.errors import RecipeError
from pipeline.planning.away import import_table, make_bundle
from pipeline.recipe import Recipe
from pipeline.run import compress, make_plan, make_table, quiet
from tests.pipeline.test_run import recipe

FAR = "far-board-abcdef"


def away(folder: Path, **target: object) -> Recipe:
    return recipe(folder, target={"runtime": "fake", "latency_ratio": 0.6, "device": FAR, **target})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    make_bundle(recipe(folder), folder / "bundle.zip", quiet)
    return folder / "bundle.zip"


@pytest.fixture(scope="module")
def far_table(bundle, tmp_path_factory):
    """A table as another device would have measured it: half as fast as this one's imagination."""
    folder = tmp_path_factory.mktemp("device")
    path = folder / "table.json"
    runtime = FakeRuntime(us_per_mac=2e-4)
    table = measure_bundle(read_bundle(bundle), runtime, path, builds=10)
    key = table.key.model_copy(update={"device": "Far board", "fingerprint": "f", "folder": FAR})
    table.model_copy(update={"key": key}).save(path)
    return path


@pytest.fixture(scope="module")
def host(far_table, tmp_path_factory):
    """A host that has taken in the far device's table."""
    folder = tmp_path_factory.mktemp("home")
    place, _ = import_table(recipe(folder), far_table, quiet)
    assert place == folder / "profiles" / FAR / "fake-fp32-b1-t1.json"
    return folder


def test_a_plan_for_a_device_elsewhere_rests_on_its_table(host):
    table = load_table(host / "profiles" / FAR / "fake-fp32-b1-t1.json")

    fitted = make_plan(away(host))

    (full_ms,) = table.full_networks_ms.values()
    assert fitted.plan.baseline_ms == full_ms
    assert fitted.plan.target_ms == pytest.approx(0.6 * full_ms)
    assert 0.5 * full_ms < fitted.plan.predicted_ms <= 0.6 * full_ms
    assert fitted.loop == ()
    assert make_plan(away(host)) == fitted


def test_an_absolute_target_is_held_against_the_devices_own_baseline(host):
    table = load_table(host / "profiles" / FAR / "fake-fp32-b1-t1.json")
    (full_ms,) = table.full_networks_ms.values()
    asked = away(host, latency_ratio=None, latency_ms=0.7 * full_ms)

    fitted = make_plan(asked.model_copy(update={"out": host / "absolute"}))

    assert 0.6 * full_ms < fitted.plan.predicted_ms <= 0.7 * full_ms


def test_delivering_to_a_device_elsewhere_is_refused_with_what_can_be_done(host):
    with pytest.raises(RecipeError, match=r"the engine has to be measured there.*espalier plan"):
        compress(away(host))
    with pytest.raises(RecipeError, match=r"its latency table has to be measured there.*--bundle"):
        make_table(away(host))


def test_a_device_without_a_table_is_named_with_those_that_have_one(host):
    with pytest.raises(MissingLatencyError, match=rf"Devices with such a table .*: {FAR}\."):
        make_plan(away(host, device="oak-board-123456"))


def espalier(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    return result.exit_code, " ".join(result.output.split())


def test_the_commands_lead_from_a_bundle_to_a_plan(far_table, host, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(host).model_dump(mode="json")))

    code, said = espalier("profile", path, "--bundle", tmp_path / "bundle.zip")
    assert code == 0, said
    assert "espalier measure bundle.zip --runtime fake -o table.json" in said
    assert read_bundle(tmp_path / "bundle.zip").manifest.digest in load_table(far_table).bundles

    code, said = espalier("profile", path, "--import", far_table)
    assert code == 0, said
    assert f"--set target.device={FAR}" in said

    code, said = espalier("plan", path, "--set", f"target.device={FAR}")
    assert code == 0, said
    assert "the planned network was not measured" in said

    code, said = espalier("compress", path, "--set", f"target.device={FAR}")
    assert code == 2
    assert "has to be measured there" in said


def test_the_networks_engine_is_built_for_two_gpus_that_are_not_here(bundle):
    runtimes = [TensorRt(capability=chip, package="tensorrt_rtx") for chip in ("8.9", "12.0")]
    if (missing := runtimes[0].missing()) is not None:
        pytest.skip(missing)
    template = read_bundle(bundle).template

    first, second = (runtime.build(template, EngineSettings()) for runtime in runtimes)

    assert first.plan != second.plan
    assert dict(first.inputs) == {"input": (1, 1, 16, 16)}


def test_options_that_contradict_one_another_are_refused(tmp_path):
    code, said = espalier("profile", "r.yaml", "--bundle", "b.zip", "--import", "t.json")
    assert (code, "give one of them" in said) == (2, True)
    code, said = espalier("profile", "r.yaml", "--with-weights")
    assert (code, "give --bundle FILE" in said) == (2, True)

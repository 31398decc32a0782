"""The whole flow, on the fake runtime: its times are arithmetic, everything else is real."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hardware.device import Device, this_device
from hardware.errors import BuildError, RuntimeMissingError
from hardware.records import load_record
from hardware.runtimes.fake import FakeRuntime
from pipeline.delivery.manifest import Manifest
from pipeline.errors import PlanError
from pipeline.networks.graphform.module import GraphForm
from pipeline.networks.store import load_pruned
from pipeline.planning import fit as targeting
from pipeline.recipe import Recipe
from pipeline.records import Verdict
from pipeline.run import compose, compress, make_plan, make_table, quiet

# On a network without training, filters are not redundant, and measured damage says nothing.
PLAN = {
    "objective": "saliency",
    "criterion": "l2",
    "redundancy": "none",
    "calibration_images": 64,
}


def recipe(folder: Path, **changes: object) -> Recipe:
    body = {
        "model": {
            "name": "benchmarks.networks:digits_resnet",
            "arguments": {"blocks": 1},
            "input_shape": [1, 16, 16],
        },
        "data": {"source": "digits", "batch": 128},
        "target": {"runtime": "fake", "latency_ratio": 0.6},
        "plan": PLAN,
        "finetune": {"epochs": 2, "bf16": False},
        "limits": {"accuracy_drop_points": 100},
        "out": folder / "out",
        "profiles": folder / "profiles",
    }
    return Recipe.model_validate(body | changes)


def accelerator(runtime: FakeRuntime) -> Device:
    """A device in this machine that is not its processor."""
    return this_device().model_copy(update={"name": "Imagined GPU", "processor": "Imagined GPU"})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeRuntime, "machine", accelerator)
        return folder, compress(recipe(folder))


def test_the_delivered_engine_meets_its_target_and_uses_it(finished):
    _, verdict = finished

    assert verdict.passed, verdict.reasons
    assert 0.9 * verdict.target_ms <= verdict.measured_ms <= verdict.target_ms
    assert verdict.proof_error < 1e-6


def test_a_runtime_without_node_times_is_refused_before_the_first_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(FakeRuntime, "tells_node_times", False)
    begun = []

    with pytest.raises(BuildError, match=r"fake does not tell .* one that does: ort, ov, trt"):
        compress(recipe(tmp_path), lambda stage: begun.append(stage) or quiet(stage))

    assert begun == []


def test_a_run_leaves_everything_that_it_promises(finished):
    folder, verdict = finished
    names = {path.name for path in (folder / "out").iterdir()}

    assert {
        "verdict.json",
        "manifest.json",
        "report.html",
        "model.safetensors",
        "architecture.json",
        "model.onnx",
        "engine",
    } <= names
    manifest = load_record(Manifest, folder / "out" / "manifest.json")
    assert manifest.verdict == verdict == load_record(Verdict, folder / "out" / "verdict.json")
    assert Path(verdict.engine).exists()


def test_report_and_manifest_name_the_device_that_the_engine_runs_on(finished):
    folder, _ = finished

    manifest = load_record(Manifest, folder / "out" / "manifest.json")
    assert manifest.device.processor == "Imagined GPU"
    assert "Measured on Imagined GPU with" in (folder / "out" / "report.html").read_text()


def test_the_verdict_has_the_keys_that_scripts_read(finished):
    folder, _ = finished
    body = json.loads((folder / "out" / "verdict.json").read_text())

    assert {
        "baseline_ms",
        "target_ms",
        "measured_ms",
        "predicted_ms",
        "speedup",
        "baseline_accuracy_pct",
        "accuracy_pct",
        "proof_error",
        "passed",
    } <= body.keys()


def test_the_saved_network_is_rebuilt_narrower(finished):
    folder, verdict = finished
    network = load_pruned(folder / "out")

    parameters = sum(parameter.numel() for parameter in network.module.parameters())
    assert parameters == verdict.parameters[1] < verdict.parameters[0]
    assert network.module(torch.zeros(2, 1, 16, 16)).shape == (2, 10)


def test_a_finished_run_answers_at_once(finished):
    folder, verdict = finished

    assert compress(recipe(folder)) == verdict


def test_no_plan_goes_below_a_floor_or_removes_what_is_frozen(finished):
    folder, _ = finished
    plan = load_record(Manifest, folder / "out" / "manifest.json").plan

    assert plan.measured
    for choice in plan.choices:
        assert choice.width == 0 or choice.width >= choice.floor
        assert choice.width == choice.full or not choice.reason.startswith("frozen")


def test_rounds_share_the_way_to_the_target(tmp_path):
    plan = {**PLAN, "rounds": 2, "objective": "redundancy"}  # the one that needs no saliency
    sparsify = {"method": "admm", "epochs": 1, "bf16": False}
    verdict = compress(recipe(tmp_path, plan=plan, sparsify=sparsify))

    assert "of sparsifying" in (tmp_path / "out" / "report.html").read_text()
    assert verdict.measured_ms <= verdict.target_ms
    assert load_pruned(tmp_path / "out").module(torch.zeros(1, 1, 16, 16)).shape == (1, 10)


def test_a_network_is_pruned_in_graph_form_over_two_rounds(tmp_path):
    asked = recipe(tmp_path, surgery="graph", plan={**PLAN, "rounds": 2})

    verdict = compress(asked)

    assert verdict.passed, verdict.reasons
    assert verdict.form.taken == "graph" and verdict.proof_error < 1e-6
    assert load_record(Manifest, asked.out / "manifest.json").verdict.form == verdict.form
    assert "Graph form: surgery=graph asks for it." in (asked.out / "report.html").read_text()
    network = load_pruned(asked.out)
    assert isinstance(network.module, GraphForm)
    assert sum(p.numel() for p in network.module.parameters()) == verdict.parameters[1]


def test_a_killed_run_ends_as_if_it_had_not_been_killed(finished, tmp_path):
    _, expected = finished
    script = tmp_path / "job.py"
    script.write_text(
        "import sys; from pathlib import Path\n"
        "from tests.pipeline.test_run import recipe\n"
        "from pipeline.run import compress\n"
        "print(compress(recipe(Path(sys.argv[1]))).model_dump_json())\n"
    )
    command = [sys.executable, str(script), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    trained = tmp_path / "out" / "state" / "attempt-1-round-1"

    job = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any(trained.glob("*")) and time.monotonic() < deadline and job.poll() is None:
        time.sleep(0.05)
    job.send_signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL  # killed in the middle, not finished
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout

    resumed = Verdict.model_validate_json(done.splitlines()[-1])
    same = {"engine", "report"}
    assert resumed.model_dump(exclude=same) == expected.model_dump(exclude=same)


def test_a_target_that_cannot_be_met_says_what_can(tmp_path):
    impossible = recipe(tmp_path, target={"runtime": "fake", "latency_ratio": 0.01})

    with pytest.raises(PlanError, match="No widths meet the target"):
        make_plan(impossible)


def test_a_runtime_that_does_not_exist_is_named_with_those_that_do(tmp_path):
    with pytest.raises(
        RuntimeMissingError, match=r"Unknown runtime 'npu'\. Known: fake, ort, .*ov"
    ):
        compress(recipe(tmp_path, target={"runtime": "npu", "latency_ratio": 0.5}))


def test_a_plan_that_was_fast_by_chance_is_not_trained_for(tmp_path, monkeypatch):
    confirmed, plans = targeting._confirmed, []

    def slower_than_seen(subject, plan, bench):
        plans.append(plan)
        return confirmed(subject, plan, bench) * (1.05 if plan.keep == plans[0].keep else 1)

    monkeypatch.setattr(targeting, "_confirmed", slower_than_seen)

    fitted = make_plan(recipe(tmp_path))

    assert len(plans) > 1 and fitted.plan.keep != plans[0].keep
    measured = [turn.measured_ms for turn in fitted.loop]
    assert min(measured) <= fitted.plan.target_ms < measured[0]


def test_profile_makes_a_table_that_a_second_call_reuses(tmp_path):
    path, table = make_table(recipe(tmp_path))
    before = path.read_bytes()

    make_table(recipe(tmp_path))

    assert len(table.variants) > 1
    assert path.read_bytes() == before


def test_two_rounds_are_one_choice_among_the_original_units():
    first = {"a": (0, 2, 4, 6), "b": (1,)}

    assert compose(first, {"a": (1, 3)}) == {"a": (2, 6), "b": (1,)}
    assert compose(first, {"a": ()}) == {"a": (), "b": (1,)}

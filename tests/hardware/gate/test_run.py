"""`espalier bench` as its users meet it: exit codes, messages, and what it leaves behind."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import count
from pathlib import Path
from xml.etree import ElementTree

import onnx
import pytest
import yaml
from typer.testing import CliRunner

from hardware.device import this_device
from hardware.gate import bench as benching
from hardware.gate import run as gating
from hardware.gate.history import read_history
from hardware.gate.run import parse_seconds
from hardware.gate.sample import sample_units
from hardware.runtimes import get_runtime
from hardware.runtimes.base import EngineSettings
from hardware.runtimes.fake import FakeRuntime
from pipeline.cli import app
from tests.hardware.holder import holder
from tests.hardware.models import conv, network, parameter, residual


def chain(width: int, size: int = 8) -> onnx.ModelProto:
    nodes = [conv("input", "a", "first", kernel_shape=[1, 1])]
    nodes.append(conv("a", "output", "second", kernel_shape=[1, 1]))
    parameters = [parameter("first.weight", width, 16, 1, 1)]
    parameters.append(parameter("second.weight", 16, width, 1, 1))
    return network(nodes, parameters, [1, 16, size, size], [1, 16, size, size])


@pytest.fixture(autouse=True)
def _imagined_clock(monkeypatch):
    """A clock that goes on by 10 ms whenever somebody looks at it."""
    ticks = count()
    simulated = partial(sample_units, clock=lambda: next(ticks) / 100)
    monkeypatch.setattr(benching, "sample_units", simulated)


@pytest.fixture
def engines(tmp_path):
    for name, width in (("base", 64), ("same", 64), ("slow", 128), ("fast", 16)):
        onnx.save(chain(width), tmp_path / f"{name}.onnx")
    return tmp_path


def bench(folder, *words: str) -> tuple[int, str]:
    """Run `bench` on the imagined device, whose times are exact."""
    more = ["--runtime", "fake", "--budget", "2s", "--history", str(folder / "history")]
    paths = [str(folder / w) if re.search(r"\.(onnx|json|xml|html|md)$", w) else w for w in words]
    result = CliRunner().invoke(app, ["bench", *more, *paths], env={"COLUMNS": "300"})
    return result.exit_code, " ".join(result.output.split())


def past(folder):
    [path] = (folder / "history").iterdir()
    return read_history(path)


def test_equal_engines_pass(engines):
    code, said = bench(engines, "same.onnx", "--baseline", "base.onnx")

    assert code == 0
    assert "pass: " in said and "p50 +0.0 %" in said and "limit 2 %" in said
    # Without noise the interval is a point: a slow-down just above the limit would have been seen.
    assert "a slow-down of 2.0 % would have been seen" in said


def test_a_slower_engine_is_a_regression_and_a_faster_one_passes(engines):
    assert bench(engines, "slow.onnx", "--baseline", "base.onnx")[0] == 1
    assert bench(engines, "fast.onnx", "--baseline", "base.onnx")[0] == 0
    assert bench(engines, "fast.onnx", "slow.onnx", "--baseline", "base.onnx")[0] == 1


def test_a_slow_down_within_the_limit_passes(engines):
    assert bench(engines, "slow.onnx", "--baseline", "base.onnx", "--limit", "p50:200%")[0] == 0


def test_a_budget_that_is_too_short_is_not_sure(engines):
    code, said = bench(engines, "same.onnx", "--baseline", "base.onnx", "--limit", "p99:2%")

    # 40 units of 5 rounds of 8 samples: 200 samples, as p99 needs, are 5 units; 8 are too few.
    assert code == 3
    assert "too few units for an interval" in said
    assert "no slow-down could have been seen in this run" in said


def test_an_engine_alone_is_measured_and_saved(engines):
    code, said = bench(engines, "base.onnx", "--save", "base.json")

    assert code == 0
    assert "alone" in said
    assert json.loads((engines / "base.json").read_text())["subject"]["runtime"] == "fake"


def test_thread_counts_are_compared_on_one_engine(engines):
    words = ["base.onnx", "--baseline", "base.onnx"]

    assert bench(engines, *words, "--baseline-threads", "2")[0] == 1
    assert bench(engines, *words, "--threads", "2", "--baseline-threads", "1")[0] == 0


def test_the_workflow_of_the_readme_runs(engines, monkeypatch):
    text = (Path(__file__).parents[3] / "hardware" / "gate" / "README.md").read_text()
    [block] = [b for b in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "runs-on" in b]
    steps = yaml.safe_load(block)["jobs"]["latency"]["steps"]
    [gate] = [s["run"] for s in steps if s.get("run", "").startswith("espalier bench")]
    [upload] = [s["with"]["path"] for s in steps if "upload-artifact" in s.get("uses", "")]
    for folder, name in (("build", "same"), ("released", "base")):
        (engines / folder).mkdir()
        (engines / f"{name}.onnx").rename(engines / folder / "model.onnx")
    monkeypatch.chdir(engines)

    words = [*shlex.split(gate)[1:], "--runtime", "fake", "--history", "history"]
    result = CliRunner().invoke(app, words)

    assert result.exit_code == 0, result.output
    assert result.output.count("::notice file=build/model.onnx,") == 2
    assert Path(upload).read_text().startswith("<?xml")
    [summary] = [s["run"] for s in steps if "GITHUB_STEP_SUMMARY" in s.get("run", "")]
    assert Path(shlex.split(summary)[1]).read_text().startswith("### espalier bench: pass")


def test_a_record_is_compared_with_where_its_engine_is_gone(engines):
    assert bench(engines, "base.onnx", "--save", "base.json")[0] == 0
    (engines / "base.onnx").unlink()

    code, said = bench(engines, "same.onnx", "--baseline", "base.json")
    assert code == 0 and "recorded" in said
    assert bench(engines, "slow.onnx", "--baseline", "base.json")[0] == 1


def test_what_a_paired_bench_saved_is_a_baseline_later(engines):
    assert bench(engines, "same.onnx", "--baseline", "base.onnx", "--save", "same.json")[0] == 0

    code, said = bench(engines, "base.onnx", "--baseline", "same.json", "--recorded")

    assert code == 0 and "recorded" in said


def test_what_sessions_may_differ_is_assumed_until_the_history_tells_it(engines):
    def said(*more: str) -> str:
        return bench(engines, "same.onnx", "--baseline", "base.json", "--recorded", *more)[1]

    bench(engines, "base.onnx", "--save", "base.json")
    assert "limit 2 % and 3.0 % allowed between sessions;" in said()
    assert "limit 2 % and 1.5 % allowed between sessions;" in said("--allowance", "1.5%")
    for _ in range(4):
        bench(engines, "base.onnx")

    # Five sessions of one engine and two of another, whose ratios to the reference never moved.
    found = said()
    assert "limit 2 %; a slow-down of 2.0 % would have been seen" in found
    [check] = past(engines)[-1].outcome.rows[0].checks
    assert check.drift_sessions == 7 and check.drift_pct < 1e-9


def test_a_record_whose_engine_is_at_hand_is_measured_anew(engines):
    assert bench(engines, "base.onnx", "--save", "base.json")[0] == 0

    assert "paired" in bench(engines, "same.onnx", "--baseline", "base.json")[1]
    assert "recorded" in bench(engines, "same.onnx", "--baseline", "base.json", "--recorded")[1]


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("device", "processor"), "Other CPU", "processor: "),
        (("subject", "threads"), 2, "threads: 1 against 2"),
        (("subject", "version"), "0", "version: 1 against 0"),
        (("reference_version",), 0, "reference model: 2 against none"),
    ],
)
def test_a_record_made_otherwise_is_refused(engines, place, value, words):
    assert bench(engines, "base.onnx", "--save", "base.json")[0] == 0
    body = json.loads((engines / "base.json").read_text())
    holder = body
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    (engines / "base.json").write_text(json.dumps(body))

    code, said = bench(
        engines, "same.onnx", "--baseline", "base.json", "--recorded", "--junit", "out.xml"
    )

    assert code == 3
    assert "Not comparable" in said and words in said
    [error] = ElementTree.parse(engines / "out.xml").iter("error")
    assert words in error.get("message", "")


def test_a_record_of_an_older_version_is_refused(engines):
    """Before, engines were timed after a single untimed inference: another ratio."""
    assert bench(engines, "base.onnx", "--save", "base.json")[0] == 0
    body = json.loads((engines / "base.json").read_text())
    (engines / "base.json").write_text(json.dumps({**body, "schema": 1}))

    code, said = bench(engines, "same.onnx", "--baseline", "base.json", "--recorded")

    assert code == 2
    assert "reads schema 2 of Measurement" in said and "make the file anew" in said


@pytest.fixture
def plug_in(monkeypatch):
    """Let the imagined runtime run on an accelerator of that name, as those of GPUs do."""

    def plugged(name: str) -> None:
        def machine(self):
            return this_device().model_copy(update={"name": name, "processor": name})

        monkeypatch.setattr(FakeRuntime, "machine", machine)

    return plugged


def test_what_is_recorded_and_reported_names_the_device_that_the_engine_runs_on(engines, plug_in):
    plug_in("Imagined GPU")
    code, _ = bench(engines, "base.onnx", "--save", "base.json", "--html", "page.html")

    assert code == 0
    recorded = json.loads((engines / "base.json").read_text())
    assert recorded["device"]["processor"] == "Imagined GPU"
    [session] = past(engines)
    assert session.outcome.device == "Imagined GPU"
    assert session.outcome.fingerprint != this_device().fingerprint
    assert "Latency on Imagined GPU" in (engines / "page.html").read_text()


def test_a_record_of_another_accelerator_in_the_same_machine_is_refused(engines, plug_in):
    plug_in("Imagined GPU")
    assert bench(engines, "base.onnx", "--save", "base.json")[0] == 0
    plug_in("Other GPU")

    code, said = bench(engines, "same.onnx", "--baseline", "base.json", "--recorded")

    assert code == 3
    assert "processor: Other GPU against Imagined GPU" in said


def test_two_accelerators_in_one_machine_have_a_history_each(engines, plug_in):
    for name in ("Imagined GPU", "Other GPU"):
        plug_in(name)
        assert bench(engines, "base.onnx", "--html", "page.html")[0] == 0

    assert (engines / "page.html").read_text().count("<circle") == 1
    files = sorted((engines / "history").iterdir())
    assert [file.name[:6] for file in files] == ["imagin", "other-"]
    assert [len(read_history(file)) for file in files] == [1, 1]


def test_engines_of_other_inputs_are_not_comparable(engines):
    onnx.save(chain(64, size=16), engines / "large.onnx")

    code, said = bench(engines, "large.onnx", "--baseline", "base.onnx")

    assert code == 3
    assert "Not comparable" in said and "(1, 16, 16, 16)" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone.onnx"], "There is no file"),
        (["base.onnx", "--limit", "p95:2%"], "Unknown metric 'p95'"),
        (["base.onnx", "--budget", "soon"], "like 60s"),
        (["base.onnx", "--budget", "0s"], "positive time"),
        (["base.onnx", "--confidence", "100"], "between 0 and 1"),
        (["base.onnx", "--threads", "0"], "1 thread or more"),
        (["base.onnx", "--allowance", "-1%"], "An allowance is a slow-down of 0 % or more"),
        (["base.onnx", "--limit", "throughput:5%"], "A limit of throughput needs --concurrency N"),
        (["base.onnx", "same.onnx", "--save", "x.json"], "A record holds one engine"),
        (["same.onnx", "--baseline", "none.json"], "Make it with: espalier bench"),
    ],
)
def test_bad_input_ends_with_code_2(engines, words, message):
    code, said = bench(engines, *words)

    assert code == 2
    assert message in re.sub(r"\W*│\W*", " ", said)


def test_a_record_cannot_tell_throughput_or_memory(engines):
    assert bench(engines, "base.onnx", "--save", "base.json")[0] == 0

    words = ["--baseline", "base.json", "--recorded", "--limit", "memory:5%"]
    code, said = bench(engines, "same.onnx", *words)

    assert code == 3 and "a record has no samples of memory" in said


def test_ctrl_c_while_throughput_is_measured_keeps_the_latencies(engines, monkeypatch):
    def interrupted(*words, **more):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(gating, "sample_rates", interrupted)

    code, said = bench(engines, "same.onnx", "--baseline", "base.onnx", "--concurrency", "1")

    assert code == 130 and "paired" in said and "interrupted" in said
    [session] = past(engines)
    assert session.outcome is not None and not session.outcome.is_complete
    assert session.outcome.rows[0].checks


@pytest.mark.runtime
def test_an_engine_that_serves_fewer_images_is_a_regression(tmp_path):
    for name, width in (("small", 16), ("large", 2048)):
        onnx.save(chain(width, size=16), tmp_path / f"{name}.onnx")
    # The latency is not what fails: its limit tolerates a thousand times as long.
    words = ["--limit", "p50:100000%", "--limit", "throughput:20%", "--concurrency", "2"]
    words += ["--budget", "4s", "--history", str(tmp_path / "history")]

    def done(new: str, old: str):
        paths = [str(tmp_path / new), "--baseline", str(tmp_path / old)]
        return CliRunner().invoke(app, ["bench", *paths, *words], env={"COLUMNS": "300"})

    slower = done("large.onnx", "small.onnx")
    assert slower.exit_code == 1, slower.output
    assert "regression: " in slower.output and "throughput: time per image +" in slower.output
    assert done("small.onnx", "large.onnx").exit_code == 0


def test_another_process_that_measures_on_the_machine_is_noticed(engines):
    with holder("machine") as other:
        code, said = bench(engines, "base.onnx")

    assert code == 3
    assert f"Another process measures on this machine: process {other.pid}, holding it" in said
    assert bench(engines, "same.onnx", "--baseline", "base.onnx")[0] == 0


def test_every_session_is_in_the_history_and_on_its_page(engines):
    bench(engines, "same.onnx", "--baseline", "base.onnx")
    onnx.save(chain(128), engines / "same.onnx")
    bench(engines, "same.onnx", "--baseline", "base.onnx", "--html", "page.html")

    first, second = past(engines)

    assert first.outcome is not None and second.outcome is not None
    assert (first.outcome.verdict, second.outcome.verdict) == ("pass", "regression")
    # Noise-free: the line's second point is the ratio of the two arithmetics.
    change = 100 * (second.units[0].p50_ms / first.units[0].p50_ms - 1)
    page = (engines / "page.html").read_text()
    assert f"{change:+.1f} %" in page
    assert page.count("<circle") == 2
    ElementTree.fromstring(
        page.partition("\n")[2]
        .replace('<meta charset="utf-8">', "")
        .replace('<meta name="viewport" content="width=device-width, initial-scale=1">', "")
    )


CHILD = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from pipeline.cli import app
app()
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_bench_that_is_ended_loses_nothing(engines, how):
    words = ["bench", str(engines / "base.onnx"), "--runtime", "fake", "--budget", "20s"]
    words += ["--history", str(engines / "history")]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while (
            not list(engines.glob("history/*")) or not past(engines) or not past(engines)[0].units
        ):
            assert child.poll() is None
            time.sleep(0.05)
        child.send_signal(how)
        code = child.wait()
    finally:
        child.kill()

    [session] = past(engines)
    assert session.units
    if how is signal.SIGINT:
        assert code == 130
        assert session.outcome is not None and not session.outcome.is_complete
    else:
        assert session.outcome is None
    assert bench(engines, "same.onnx", "--baseline", "base.onnx")[0] == 0  # the lock is free
    assert len(past(engines)) == 2


@pytest.mark.runtime
@pytest.mark.parametrize("suffix", [".onnx", ".ort", ".xml"])
def test_engine_files_of_every_kind_are_benched(tmp_path, suffix):
    more = ["--memory", "--concurrency", "2"] if suffix == ".ort" else []
    runtime = get_runtime("ov" if suffix == ".xml" else "ort")
    path = runtime.build(residual(16), EngineSettings()).save(tmp_path)
    if suffix == ".ort":
        path = in_own_format(path)
    words = ["--baseline", str(path), "--budget", "0.1s", "--history", str(tmp_path / "history")]

    result = CliRunner().invoke(app, ["bench", str(path), *words, *more])

    # On a busy machine that need not be enough to be sure; equal engines do not fail.
    assert result.exit_code in (0, 3), result.output
    [session] = past(tmp_path)
    assert session.outcome is not None
    [row] = session.outcome.rows
    assert row.figures.p50_ms > 0
    assert (row.figures.images_per_s is not None) == bool(more)
    assert (row.figures.peak_bytes or 0) > 0 or not more


def in_own_format(path):
    """Convert by ONNX Runtime itself, as its users do."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".ort"))
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return path.with_suffix(".ort")


def test_times_are_read_with_their_units():
    found = [parse_seconds(text) for text in ("60s", "2m", "1.5 min", "500ms", "3")]

    assert found == [60, 120, 90, 0.5, 3]

"""What every runtime must do; a new one is picked up from RUNTIMES."""

import gc
import tempfile

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from hardware.errors import BuildError, HardwareError, RunError, RuntimeMissingError
from hardware.runtimes import RUNTIMES, check_measurable, get_runtime
from hardware.runtimes.base import EngineSettings, Runtime
from hardware.runtimes.fake import FakeRuntime
from hardware.runtimes.fusion import HEADS
from hardware.timing import Protocol, time_together
from tests.hardware.models import residual

pytestmark = pytest.mark.runtime

SETTINGS = EngineSettings(threads=1)


def runtime_or_skip(name: str) -> Runtime:
    try:
        return get_runtime(name)
    except RuntimeMissingError as error:
        pytest.skip(str(error).partition(": ")[0])


def is_here(name: str) -> bool:
    try:
        return bool(get_runtime(name))
    except RuntimeMissingError:
        return False


# ONNX Runtime's TensorRT provider does not promise float32, which the tests below ask for.
HERE = [name for name in sorted(RUNTIMES) if is_here(name) and name != "ort-trt"]


@pytest.fixture(params=HERE, scope="module")
def runtime(request) -> Runtime:
    return get_runtime(request.param)


@pytest.fixture
def profiling(runtime) -> Runtime:
    """A runtime that tells what its nodes take."""
    if not runtime.tells_node_times:
        pytest.skip(f"{runtime.name} tells no node times")
    return runtime


@pytest.mark.parametrize("name", [name for name in sorted(RUNTIMES) if name not in HERE])
def test_a_runtime_that_is_not_here_says_what_to_do(name):
    if is_here(name):
        pytest.skip(f"{name} is here, and takes too long to be held to its contract")
    with pytest.raises(RuntimeMissingError, match=r"pip install|machine with"):
        get_runtime(name)


def test_outputs_are_those_of_the_reference(runtime):
    model = residual(16)
    engine = runtime.build(model, SETTINGS)
    feeds = engine.random_feeds(seed=1)
    (expected,) = ReferenceEvaluator(model).run(None, feeds)

    found = engine.run(feeds)

    assert list(found) == ["output"]
    np.testing.assert_allclose(found["output"], expected, rtol=1e-4, atol=1e-4)


def test_an_output_is_not_overwritten_by_the_next_inference(runtime):
    engine = runtime.build(residual(16), SETTINGS)
    first = engine.run(engine.random_feeds(seed=1))["output"]
    kept = first.copy()

    engine.run(engine.random_feeds(seed=2))

    np.testing.assert_array_equal(first, kept)


def test_the_engine_says_what_it_is(runtime):
    engine = runtime.build(residual(16), SETTINGS)

    assert dict(engine.inputs) == {"input": (2, 3, 16, 16)}
    assert engine.precision == "fp32"
    assert runtime.version() and runtime.device()


def test_every_head_is_attributed_to_its_onnx_node_once(profiling):
    model = residual(16)
    engine = profiling.build(model, SETTINGS, profile=True)

    owned = [node for time in engine.node_times(engine.random_feeds(), 30) for node in time.nodes]

    assert len(owned) == len(set(owned))
    assert {n.name for n in model.graph.node if n.op_type in HEADS} <= set(owned)


def test_a_fused_tail_belongs_to_the_node_before_it(profiling):
    engine = profiling.build(residual(16), SETTINGS, profile=True)

    owner = {
        node: time.nodes[0]
        for time in engine.node_times(engine.random_feeds(), 30)
        for node in time.nodes
    }

    assert owner["act0"] == "stem"
    assert owner["act1"] == "block.conv1"
    assert owner["act2"] == owner["add"]
    assert owner["act3"] == "depthwise"


def test_node_times_add_up_to_about_the_whole(profiling):
    profiled = profiling.build(residual(96), SETTINGS, profile=True)
    plain = profiling.build(residual(96), SETTINGS)
    feeds = plain.random_feeds()

    total_ms = sum(time.time_us for time in profiled.node_times(feeds, 40)) / 1e3
    (series,) = time_together([plain.timer(feeds)], Protocol(max_seconds=2.0))

    # Both are medians of quiet inferences of one engine; a wrong unit or a lost node is far off.
    fastest_ms = min(series.samples_ms)
    assert 0.6 * fastest_ms < total_ms < 1.7 * max(series.latency.median_ms, fastest_ms)


def test_node_times_can_be_asked_for_again(profiling):
    engine = profiling.build(residual(16), SETTINGS, profile=True)
    feeds = engine.random_feeds()
    engine.run(feeds)

    first, second = (engine.node_times(feeds, 20) for _ in range(2))

    assert [time.nodes for time in first] == [time.nodes for time in second]
    assert all(time.time_us > 0 for time in (*first, *second))


def test_a_plain_engine_has_no_node_times(profiling):
    engine = profiling.build(residual(16), SETTINGS)

    with pytest.raises(RunError, match="built without profiling; build it with profile=True"):
        engine.node_times(engine.random_feeds(), 5)


def test_a_saved_engine_computes_the_same(runtime, tmp_path):
    engine = runtime.build(residual(16), SETTINGS)
    feeds = engine.random_feeds()

    path = engine.save(tmp_path / "engine")
    loaded = runtime.load(path, SETTINGS)

    assert path.is_file() and path.parent == tmp_path / "engine"
    assert dict(loaded.inputs) == dict(engine.inputs)
    np.testing.assert_allclose(
        loaded.run(feeds)["output"], engine.run(feeds)["output"], rtol=1e-5, atol=1e-5
    )


def test_a_saved_engine_leaves_nothing_else_behind(runtime, tmp_path):
    path = runtime.build(residual(16), SETTINGS).save(tmp_path)

    assert {file.stem for file in tmp_path.iterdir()} == {path.stem}


def test_an_engine_in_a_read_only_place_is_refused(runtime, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    engine = runtime.build(residual(16), SETTINGS)

    with pytest.raises(HardwareError, match="Cannot write"):
        engine.save(blocked / "engine")


def test_profiling_leaves_no_files(profiling, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    engine = profiling.build(residual(16), SETTINGS, profile=True)
    engine.node_times(engine.random_feeds(), 5)
    unread = profiling.build(residual(16), SETTINGS, profile=True)

    del engine, unread
    gc.collect()

    assert list(tmp_path.iterdir()) == []


def test_building_and_running_say_nothing(profiling, capfd):
    engine = profiling.build(residual(16), SETTINGS, profile=True)
    engine.run(engine.random_feeds())
    engine.node_times(engine.random_feeds(), 5)
    with pytest.raises(BuildError):
        profiling.build(corrupt(), SETTINGS)

    assert capfd.readouterr() == ("", "")


def test_two_threads_compute_the_same(runtime):
    model = residual(16)
    one, two = (runtime.build(model, EngineSettings(threads=n)) for n in (1, 2))
    feeds = one.random_feeds()

    np.testing.assert_allclose(
        one.run(feeds)["output"], two.run(feeds)["output"], rtol=1e-4, atol=1e-4
    )


def corrupt() -> onnx.ModelProto:
    """A model that reads a value nobody writes."""
    model = residual(16)
    model.graph.node[3].input[0] = "nowhere"
    return model


def test_a_corrupt_model_is_refused(runtime):
    with pytest.raises(BuildError, match="nowhere"):
        runtime.build(corrupt(), SETTINGS)


def test_a_model_with_an_open_size_is_refused(runtime):
    model = residual(16)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"

    with pytest.raises(BuildError, match="'input' has an open size in its shape"):
        runtime.build(model, SETTINGS)


def test_a_damaged_file_is_refused(runtime, tmp_path):
    path = runtime.build(residual(16), SETTINGS).save(tmp_path)
    path.write_bytes(path.read_bytes()[:100])

    with pytest.raises(BuildError, match=path.name):
        runtime.load(path, SETTINGS)


def test_a_missing_file_is_refused(runtime, tmp_path):
    with pytest.raises(BuildError, match=r"engine\.onnx"):
        runtime.load(tmp_path / "engine.onnx", SETTINGS)


def test_a_precision_that_is_not_there_is_refused(runtime):
    with pytest.raises(BuildError, match=r"fp32.*not in int4"):
        runtime.build(residual(16), EngineSettings(precision="int4"))


@pytest.mark.parametrize("use", ["run", "timer", "node_times"])
def test_an_input_of_another_name_is_refused(profiling, use):
    engine = profiling.build(residual(16), SETTINGS, profile=True)
    feeds = {"image": engine.random_feeds()["input"]}

    with pytest.raises(RunError, match=r"takes the inputs \['input'\]; got \['image'\]"):
        engine.node_times(feeds, 5) if use == "node_times" else getattr(engine, use)(feeds)


@pytest.mark.parametrize("use", ["run", "timer", "node_times"])
def test_an_input_of_another_shape_is_refused(profiling, use):
    engine = profiling.build(residual(16), SETTINGS, profile=True)
    feeds = {"input": np.zeros((1, 3, 16, 16), np.float32)}

    with pytest.raises(RunError, match=r"takes the shape \(2, 3, 16, 16\); got \(1, 3, 16, 16\)"):
        engine.node_times(feeds, 5) if use == "node_times" else getattr(engine, use)(feeds)


def test_an_input_of_another_type_is_refused(runtime):
    engine = runtime.build(residual(16), SETTINGS)
    feeds = {"input": np.zeros((2, 3, 16, 16), np.int64)}

    with pytest.raises(RunError, match="takes float32; got int64"):
        engine.run(feeds)


def test_two_timers_of_one_engine_keep_their_own_inputs(runtime):
    engine = runtime.build(residual(16), SETTINGS)
    timers = [engine.timer(engine.random_feeds(seed)) for seed in (1, 2)]

    a, b = time_together(timers, Protocol(max_samples=30, max_seconds=1.0))

    assert a.latency.median_ms > 0 and b.latency.median_ms > 0


def test_a_thread_count_that_leaves_the_choice_to_the_runtime_is_refused():
    with pytest.raises(ValueError, match="1 thread or more, not on 0"):
        EngineSettings(threads=0)


def test_an_unknown_runtime_is_refused():
    with pytest.raises(
        RuntimeMissingError,
        match=r"Unknown runtime 'tflite'\. Known: fake, ort, ort-cuda, ort-trt, ov, trt",
    ):
        get_runtime("tflite")


# ---- what can be known before anything is built


class Silent(FakeRuntime):
    """An imagined device that does not tell what its nodes take."""

    name = "silent"
    tells_node_times = False


def test_a_runtime_without_node_times_is_refused_with_those_that_have_them():
    with pytest.raises(
        BuildError, match=r"silent does not tell .* Choose one that does: ort, ov, trt "
    ):
        check_measurable(Silent(), SETTINGS)


def test_a_precision_that_is_not_there_is_refused_before_anything_is_built(runtime):
    if not runtime.tells_node_times:
        pytest.skip(f"{runtime.name} is refused anyhow")
    check_measurable(runtime, SETTINGS)

    with pytest.raises(BuildError, match=r"fp32.*not in int4"):
        check_measurable(runtime, EngineSettings(precision="int4"))


def test_every_precision_that_a_runtime_names_can_be_built(runtime):
    for precision in runtime.precisions():
        engine = runtime.build(residual(16), EngineSettings(precision=precision))

        assert engine.precision == precision


# ---- OpenVINO


def test_an_openvino_engine_without_its_weights_is_refused(tmp_path):
    runtime = runtime_or_skip("ov")
    path = runtime.build(residual(16), SETTINGS).save(tmp_path)
    path.with_suffix(".bin").unlink()

    with pytest.raises(BuildError, match=r"(?s)cannot read .*model\.xml.*bin file"):
        runtime.load(path, SETTINGS)


def test_openvino_runs_bf16_only_where_the_processor_has_it():
    runtime = runtime_or_skip("ov")
    import openvino

    offered = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    bf16 = EngineSettings(precision="bf16")

    if "BF16" in offered:
        assert runtime.build(residual(16), bf16).precision == "bf16"
    else:
        with pytest.raises(BuildError, match="runs this model in fp32, not in bf16"):
            runtime.build(residual(16), bf16)


# ---- the imagined device


def staircase_of(**properties: float) -> dict[str, float]:
    engine = FakeRuntime(**properties).build(residual(16), SETTINGS, profile=True)
    return {time.nodes[0]: time.time_us for time in engine.node_times(engine.random_feeds(), 5)}


def test_the_fake_staircase_is_arithmetic():
    times = staircase_of(node_us=2.0, us_per_mac=1e-4)

    # 2 images, 16 x 16 pixels, 3 x 3 kernel; 3 inputs padded to 8, 32 outputs are two tiles of 16.
    assert times["stem"] == pytest.approx(2.0 + 2 * 16 * 16 * 9 * 8 * 32 * 1e-4)
    # 13 outputs are padded to 16: 8 x 8 pixels, 1 x 1 kernel, 32 inputs.
    assert times["odd"] == pytest.approx(2.0 + 2 * 8 * 8 * 32 * 16 * 1e-4)


def test_the_fake_takes_longer_end_to_end_than_its_nodes():
    runtime = FakeRuntime(outside_us=7.0)
    engine = runtime.build(residual(16), SETTINGS)

    whole_us = 1e3 * engine.timer(engine.random_feeds())(1)

    assert whole_us - sum(staircase_of().values()) == pytest.approx(7.0)


def test_the_fakes_noise_repeats_with_its_seed():
    first, again, other = (staircase_of(noise=0.1, seed=seed) for seed in (1, 1, 2))

    assert first == again
    assert first != other

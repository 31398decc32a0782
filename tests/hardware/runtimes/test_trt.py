"""TensorRT: building for chips that are not here, and what is said where nothing can be timed."""

import json

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from typer.testing import CliRunner

from hardware.errors import BuildError, RunError, RuntimeMissingError, StorageError
from hardware.graph.precision import as_fp16
from hardware.runtimes import get_runtime
from hardware.runtimes.base import EngineSettings
from hardware.runtimes.cuda import gpu_absent, this_gpu
from hardware.runtimes.fusion import HEADS, nodes_behind
from hardware.runtimes.trt import TensorRt
from hardware.runtimes.trt_building import read_cache, write_cache
from hardware.runtimes.trt_sessions import parse_layers
from pipeline.cli import app
from tests.hardware.models import residual

SETTINGS = EngineSettings()
without_gpu = pytest.mark.skipif(gpu_absent() is None, reason="there is a GPU here")


def rtx(capability: str | None = None) -> TensorRt:
    runtime = TensorRt(capability=capability, package="tensorrt_rtx")
    if "not installed" in (runtime.missing() or ""):
        pytest.skip("TensorRT for RTX is not installed")
    return runtime


@pytest.fixture(scope="module")
def engines():
    """The same network for two chips, in two precisions."""
    model = residual(16)
    return {
        (chip, precision): rtx(chip).build(model, EngineSettings(precision=precision))
        for chip in ("8.0", "8.9")
        for precision in ("fp32", "fp16")
    }


def test_engines_are_built_for_two_chips_without_a_gpu(engines):
    plans = [engine.plan for engine in engines.values()]

    assert len(set(plans)) == 4
    assert {e.precision for e in engines.values()} == {"fp32", "fp16"}
    assert dict(engines["8.9", "fp32"].inputs) == {"input": (2, 3, 16, 16)}


def test_half_precision_halves_the_weights_in_the_engine(engines):
    weights = sum(4 * int(np.prod(tensor.dims)) for tensor in residual(16).graph.initializer)

    saved = len(engines["8.9", "fp32"].plan) - len(engines["8.9", "fp16"].plan)

    assert 0.3 * weights < saved < 0.7 * weights


@without_gpu
@pytest.mark.parametrize("use", ["run", "timer"])
def test_running_without_a_gpu_says_what_to_do(engines, use):
    engine = engines["8.9", "fp32"]

    with pytest.raises(RunError, match=r"needs an NVIDIA GPU: .*capability 8\.9.*espalier bench"):
        getattr(engine, use)(engine.random_feeds())


@without_gpu
def test_the_runtime_is_missing_without_a_gpu_with_what_can_be_done():
    rtx()

    with pytest.raises(RuntimeMissingError, match=r"needs an NVIDIA GPU.*--capability 8\.9"):
        get_runtime("trt")


def test_where_no_package_is_installed_both_are_named():
    assert "pip install tensorrt;" in (TensorRt(package="tensorrt_absent").missing() or "")


def test_a_chip_that_cannot_be_built_for_is_refused_with_those_that_can():
    with pytest.raises(BuildError, match=r"capability 9\.0\. It knows 7\.5, 8\.0, 8\.6, 8\.9, 12"):
        rtx("9.0").build(residual(16), SETTINGS)


def test_a_model_that_cannot_be_parsed_is_refused_by_its_node():
    model = residual(16)
    model.graph.node[3].input[0] = "nowhere"

    with pytest.raises(BuildError, match=r"cannot read the model: block\.conv1"):
        rtx("8.9").build(model, SETTINGS)


def test_what_the_compiler_cannot_do_is_said_in_its_words():
    # Turing has no single-precision matrix product in TensorRT for RTX.
    with pytest.raises(BuildError, match=r"cannot build the model: .*Turing"):
        rtx("7.5").build(residual(16), SETTINGS)


def test_a_precision_that_is_not_there_is_refused():
    with pytest.raises(BuildError, match=r"fp32, tf32, fp16, not in int8"):
        rtx("8.9").build(residual(16), EngineSettings(precision="int8"))


def test_an_open_size_is_refused():
    model = residual(16)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"

    with pytest.raises(BuildError, match="'input' has an open size"):
        rtx("8.9").build(model, SETTINGS)


def test_building_says_nothing(capfd):
    rtx("8.9").build(residual(16), SETTINGS, profile=True)

    assert capfd.readouterr() == ("", "")


def espalier(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    return result.exit_code, " ".join(result.output.split())


@without_gpu
def test_the_command_builds_and_refuses_to_time(tmp_path):
    rtx()
    onnx.save(residual(16), tmp_path / "net.onnx")
    words = ("build", tmp_path / "net.onnx", "--runtime", "trt", "-o", tmp_path / "engine")

    code, said = espalier(*words, "--capability", "8.9", "--precision", "fp16")
    assert (code, "fp16, trt rtx-" in said) == (0, True), said
    assert (tmp_path / "engine" / "model.engine").is_file()

    code, said = espalier(*words)
    assert (code, "running and timing an engine needs an NVIDIA GPU" in said) == (2, True), said
    code, said = espalier("bench", tmp_path / "engine" / "model.engine")
    assert (code, "Run this on a machine with one" in said) == (2, True), said
    code, said = espalier(*words[:2], "--runtime", "ov", "--capability", "8.9", "-o", tmp_path)
    assert (code, "ov builds for none" in said) == (2, True), said


@without_gpu
def test_a_gpu_that_is_not_there_cannot_be_described():
    with pytest.raises(RuntimeMissingError, match="no GPU to describe: "):
        this_gpu()


# ---- precision in the ONNX


def test_half_precision_computes_the_same_to_its_own_accuracy():
    model = residual(16)
    feeds = {"input": np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)}

    half = as_fp16(model)

    onnx.checker.check_model(half, full_check=True)
    (expected,) = ReferenceEvaluator(model).run(None, feeds)
    (found,) = ReferenceEvaluator(half).run(None, feeds)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-2)


def test_half_precision_keeps_every_nodes_name_and_halves_every_weight():
    model = residual(16)

    half = as_fp16(model)

    assert [n.name for n in half.graph.node][1:-1] == [n.name for n in model.graph.node]
    assert {t.data_type for t in half.graph.initializer} == {onnx.TensorProto.FLOAT16}
    assert model.graph.initializer[0].data_type == onnx.TensorProto.FLOAT


def test_a_weight_beyond_half_precision_is_refused():
    model = residual(16)
    big = np.full((32, 3, 3, 3), 1e5, np.float32)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(big, "stem.weight"))

    with pytest.raises(BuildError, match=r"stem\.weight holds values beyond 65504"):
        as_fp16(model)


# ---- what the engine's inspector tells


def test_layers_are_traced_to_nodes_by_the_inspectors_details():
    model = residual(16)
    text = json.dumps(
        {
            "Layers": [
                {
                    "Name": "__myl_Conv_0",
                    "LayerType": "CaskConvolution",
                    "Metadata": "[ONNX Layer: stem]\x1e[ONNX Layer: act0]",
                },
                {"Name": "reorder", "LayerType": "Reformat", "Metadata": ""},
                {"Name": "block.conv2 + add + act2", "LayerType": "CaskConvolution"},
            ]
        }
    )

    layers = parse_layers(text)

    assert layers["__myl_Conv_0"] == ("CaskConvolution", ("stem", "act0"))
    owned = nodes_behind(model, [nodes for _, nodes in layers.values()])
    assert owned[0][:2] == ("stem", "act0")
    assert owned[1] == ()
    assert owned[2] == ("block.conv2", "add", "act2")
    assert {n.name for n in model.graph.node if n.op_type in HEADS} >= {"stem", "block.conv2"}


def test_layers_without_details_are_traced_by_their_own_names():
    layers = parse_layers(json.dumps({"Layers": ["stem + act0", "{ForeignNode[pool1...head]}"]}))

    assert [nodes for _, nodes in layers.values()] == [("stem", "act0"), ("pool1", "head")]


def test_an_inspector_that_tells_nothing_is_an_error():
    with pytest.raises(RunError, match="named no layers"):
        parse_layers("")


# ---- the timing cache


def test_a_timing_cache_survives_and_its_damage_is_noticed(tmp_path):
    path = tmp_path / "cache" / "x.timing"
    assert read_cache(path) == b""
    write_cache(path, b"timings")

    assert read_cache(path) == b"timings"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(StorageError, match=r"timing cache .* is damaged"):
        read_cache(path)

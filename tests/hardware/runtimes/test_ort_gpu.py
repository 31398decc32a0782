"""ONNX Runtime's other providers: never silently replaced by the processor."""

import pytest

from hardware.errors import BuildError, RuntimeMissingError
from hardware.runtimes import check_measurable, get_runtime
from hardware.runtimes.base import EngineSettings
from hardware.runtimes.ort import open_session, session_options
from hardware.runtimes.ort_gpu import OrtCuda, OrtTensorRt
from tests.hardware.models import residual

pytestmark = pytest.mark.runtime
onnxruntime = pytest.importorskip("onnxruntime")
SETTINGS = EngineSettings()
absent = [
    runtime
    for runtime in (OrtCuda, OrtTensorRt)
    if runtime.provider not in onnxruntime.get_available_providers()
]


@pytest.mark.parametrize("runtime", absent)
def test_a_provider_that_is_absent_is_named_with_what_is_there(runtime):
    with pytest.raises(
        RuntimeMissingError, match=rf"has no {runtime.provider}, only .*CPUExecutionProvider"
    ):
        get_runtime(runtime.name)


@pytest.mark.parametrize("runtime", absent)
def test_a_model_never_falls_back_to_the_processor(runtime, tmp_path):
    with pytest.raises(BuildError, match=f"has no {runtime.provider}"):
        runtime().build(residual(16), EngineSettings(precision="fp16"))


def test_a_session_without_a_provider_of_its_own_runs_on_the_processor():
    session = open_session(residual(16).SerializeToString(), session_options(SETTINGS))

    assert session.get_providers() == ["CPUExecutionProvider"]


def test_no_latency_table_is_promised_on_a_gpu():
    with pytest.raises(BuildError, match="no latency table can be measured with it"):
        OrtCuda().build(residual(16), SETTINGS, profile=True)


@pytest.mark.parametrize("runtime", [OrtCuda, OrtTensorRt])
def test_a_latency_table_on_a_gpu_is_refused_before_anything_is_built(runtime):
    with pytest.raises(BuildError, match=rf"{runtime.name} does not tell .* one that does: .*trt"):
        check_measurable(runtime(), SETTINGS)


@pytest.mark.parametrize(
    ("runtime", "precision", "known"),
    [(OrtCuda, "int8", "fp32, tf32, fp16"), (OrtTensorRt, "fp32", "tf32, fp16")],
)
def test_a_precision_that_cannot_be_promised_is_refused(runtime, precision, known):
    with pytest.raises(BuildError, match=f"runs this model in {known}, not in {precision}"):
        runtime().build(residual(16), EngineSettings(precision=precision))

"""The check of a GPU runs anywhere, and names what it could not do."""

from types import SimpleNamespace

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import Findings, attempt, main
from hardware.errors import BuildError
from hardware.latency.template_layers import layers_of
from hardware.records import load_record
from hardware.runtimes import RUNTIMES
from hardware.runtimes.cuda import gpu_absent
from tests.hardware.templates import residual
from tests.hardware.test_bundle import CANDIDATES

pytest.importorskip("onnxruntime")


@pytest.mark.skipif(gpu_absent() is None, reason="there is a GPU here: run it by hand")
def test_without_a_gpu_everything_is_named_with_its_reason(tmp_path, capsys, monkeypatch):
    template, channels = residual()
    layers = layers_of(template, channels)
    subject = SimpleNamespace(template=template, channels=channels, layers=layers)
    monkeypatch.setattr(gpu_check, "subject_of", lambda name: (subject, CANDIDATES))

    code = main(["--json", str(tmp_path / "gpu.json")])

    found = {f.name: f for f in load_record(Findings, tmp_path / "gpu.json").findings}
    assert code == 0
    assert found.keys() >= {"torch, eager", "ort-cuda fp32", "ort-trt fp16", "trt fp32"}
    for name, finding in found.items():
        if name.startswith("build for"):
            assert finding.state in ("done", "cannot run")
        else:
            assert finding.state == "cannot run" and finding.detail
    assert {name.split(" ")[0].rstrip(",") for name in found} <= {*RUNTIMES, "torch", "build"}
    assert "trt, latency table" in capsys.readouterr().out


def test_what_should_work_and_does_not_is_a_failure():
    def check():
        raise BuildError("refused")

    found = attempt("trt fp32", check)

    assert (found.state, found.detail) == ("failed", "BuildError: refused")

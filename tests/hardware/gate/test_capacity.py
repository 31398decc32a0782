"""Throughput and memory: what is compared, when it is sure, and that real engines are measured."""

import math

import onnx
import pytest

from hardware.errors import RunError
from hardware.gate.capacity import (
    compare_until_sure,
    inferences_per_s,
    measure_peak_bytes,
    sample_peaks,
    sample_rates,
)
from hardware.gate.engines import engine_file
from hardware.gate.sequential_test import Limit, SequentialTest, Verdict
from hardware.runtimes.base import EngineSettings
from tests.hardware.models import residual


def compared(metric: str, baseline: float, candidate: float, units: int = 40):
    tests = [SequentialTest(Limit(metric, 0.05), 0.99)]
    taken = []

    def source():
        for index in range(units):
            taken.append(index)
            noise = 1 + 0.001 * (-1) ** index
            yield baseline, candidate * noise

    medians, [found] = compare_until_sure(source(), tests, enough=3)
    return found, medians, len(taken)


def test_fewer_images_a_second_are_a_regression_and_more_are_not():
    found, medians, taken = compared("throughput", 100.0, 80.0)

    assert found.verdict is Verdict.REGRESSION
    assert found.ratio.estimate == pytest.approx(1.25, rel=0.002)  # the time per image
    assert medians == (100.0, pytest.approx(80.0, rel=0.002))
    assert taken == 9  # the fewest that can be sure at 99 %
    assert compared("throughput", 100.0, 130.0)[0].verdict is Verdict.PASS


def test_more_memory_is_a_regression_and_less_is_not():
    assert compared("memory", 100e6, 120e6)[0].verdict is Verdict.REGRESSION
    assert compared("memory", 100e6, 80e6)[0].verdict is Verdict.PASS
    assert compared("memory", 0.0, 0.0)[0].verdict is Verdict.PASS  # nothing was added by either
    assert compared("memory", 100e6, 105e6, units=20)[0].verdict is Verdict.INCONCLUSIVE


def test_without_a_comparison_a_few_units_are_enough():
    medians, found = compare_until_sure(iter([(1.0,), (9.0,), (2.0,), (100.0,)]), [], enough=3)

    assert medians == (2.0,) and found == ()


@pytest.mark.runtime
def test_rates_and_peaks_of_real_engines_are_positive(tmp_path):
    onnx.save(residual(8), tmp_path / "net.onnx")
    engine = engine_file(tmp_path / "net.onnx", None, EngineSettings())

    [rates, *_] = list(sample_rates([engine, engine], 2, 0.1))
    [peaks] = list(sample_peaks([engine], 1e-6))

    assert len(rates) == 2 and all(math.isfinite(rate) and rate > 0 for rate in rates)
    assert len(peaks) == 1 and peaks[0] > 0


def test_a_process_that_fails_while_memory_is_measured_says_why(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"no network")
    engine = engine_file(tmp_path / "net.onnx", "fake", EngineSettings())

    with pytest.raises(RunError, match=r"cannot be measured: .*is not an ONNX file"):
        next(sample_peaks([engine], 1.0))


def test_memory_is_measured_where_the_working_folder_has_a_package_of_our_name(
    tmp_path, monkeypatch
):
    onnx.save(residual(4), tmp_path / "net.onnx")
    for name in ("hardware", "pipeline", "numpy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('of the user')")
    monkeypatch.chdir(tmp_path)

    assert measure_peak_bytes(engine_file(tmp_path / "net.onnx", "fake", EngineSettings())) > 0


def working(calls: int) -> float:
    return 1.0


@pytest.mark.parametrize(
    "death", [MemoryError("no room"), RuntimeError("vendor's own"), SystemExit()]
)
def test_a_thread_that_dies_is_an_error_and_no_slow_one(death):
    def dying(calls: int) -> float:
        raise death

    with pytest.raises(
        RunError, match=rf"one of 2 threads died of {type(death).__name__}: {death}"
    ):
        inferences_per_s([working, dying], 0.01)


def test_an_engine_that_fails_under_load_says_why():
    def failing(calls: int) -> float:
        raise RunError("the engine broke")

    with pytest.raises(RunError, match=r"^the engine broke$"):
        inferences_per_s([failing, working], 0.01)

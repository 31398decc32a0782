from dataclasses import replace

import pytest
import torch

from hardware.latency.end_to_end import Timing, time_engines
from hardware.runtimes.base import EngineSettings
from hardware.runtimes.fake import FakeRuntime
from hardware.timing import Latency, Protocol
from pipeline.delivery.verify import Facts, Quality, judge, measure_parity
from pipeline.networks.export import export_graph
from pipeline.networks.fold_norms import fold_norms
from pipeline.networks.load import load_network
from pipeline.recipe import LimitsSection, ModelSection, TargetSection
from pipeline.records import Form
from pipeline.tasks.evaluate import Score

LIMITS = LimitsSection(accuracy_drop_points=1.0, parity=1e-3, prediction_error_pct=5.0)
RATIO = TargetSection(runtime="fake", latency_ratio=0.5)
FACTS = Facts(
    predicted_share=0.49,
    proof_error=1e-12,
    parameters=(100, 40),
    macs=(1000, 300),
    engine="engine",
    report="report.html",
    form=Form(taken="class", reason="the class can lose all", graph_share=1.0, class_share=1.0),
)


def latency(median_ms: float) -> Latency:
    return Latency(
        median_ms=median_ms, low_ms=median_ms, high_ms=median_ms, mad_ms=0.0, samples=100
    )


def timing(before_ms: float, after_ms: float) -> Timing:
    return Timing(baseline=latency(before_ms), delivered=latency(after_ms))


def quality(before_pct: float, after_pct: float) -> Quality:
    before, after = (Score(accuracy_pct=x, loss=1.0, images=100) for x in (before_pct, after_pct))
    return Quality(baseline=before, delivered=after, torch=after)


def test_a_verdict_passes_at_exactly_its_limits():
    verdict = judge(RATIO, LIMITS, FACTS, timing(2.0, 1.0), quality(90, 89), parity=1e-3)

    assert verdict.passed
    assert verdict.target_ms == 1.0 and verdict.speedup == 2.0
    assert verdict.predicted_ms == pytest.approx(0.98)


@pytest.mark.parametrize(
    ("after_ms", "after_pct", "parity", "share", "said"),
    [
        (1.01, 90, 0, 0.5, "MISSED: latency 1.0100 ms, target 1.0000 ms"),
        (1.0, 88.9, 0, 0.5, "MISSED: accuracy drop 1.10 points, allowed 1.00"),
        (1.0, 90, 2e-3, 0.5, "MISSED: parity 2.0e-03, allowed 1.0e-03"),
        (1.0, 90, 0, 0.53, "MISSED: prediction error +6.0 %, allowed 5.0 %"),
        (1.0, 90, 0, 0.47, "MISSED: prediction error -6.0 %, allowed 5.0 %"),
    ],
)
def test_one_missed_limit_fails_the_verdict_and_is_named(after_ms, after_pct, parity, share, said):
    facts = replace(FACTS, predicted_share=share)

    verdict = judge(RATIO, LIMITS, facts, timing(2.0, after_ms), quality(90, after_pct), parity)

    assert not verdict.passed
    assert [line for line in verdict.reasons if line.startswith("MISSED")] == [said]


def test_a_better_accuracy_is_no_drop():
    verdict = judge(RATIO, LIMITS, FACTS, timing(2.0, 1.0), quality(80, 95), parity=0)

    assert verdict.passed


def test_a_target_in_milliseconds_does_not_follow_the_baseline():
    target = TargetSection(runtime="fake", latency_ms=0.9)

    verdict = judge(target, LIMITS, FACTS, timing(2.0, 1.0), quality(90, 90), parity=0)

    assert verdict.target_ms == 0.9 and not verdict.passed


def test_the_interval_of_the_speed_up_comes_from_the_far_ends_of_both():
    before = Latency(median_ms=2.0, low_ms=1.8, high_ms=2.2, mad_ms=0.1, samples=100)
    after = Latency(median_ms=1.0, low_ms=0.9, high_ms=1.1, mad_ms=0.1, samples=100)

    found = Timing(baseline=before, delivered=after).speedup

    assert (found.estimate, found.low, found.high) == pytest.approx((2.0, 1.8 / 1.1, 2.2 / 0.9))


@pytest.fixture(scope="module")
def network():
    section = ModelSection(
        name="benchmarks.networks:digits_resnet",
        arguments={"blocks": 1, "width": 8},
        input_shape=(1, 16, 16),
    )
    return load_network(section)


def test_the_speed_up_is_that_of_the_runtime_over_all_loads(network):
    template = fold_norms(export_graph(network))
    fast, slow = FakeRuntime(), FakeRuntime(node_us=100.0)
    few = Protocol(warmup_s=0.01, min_samples=20, max_samples=20, max_seconds=1.0)

    found = time_engines(
        [slow.build(template, EngineSettings()) for _ in range(2)],
        [fast.build(template, EngineSettings()) for _ in range(2)],
        protocol=few,
    )

    assert found.baseline.samples == found.delivered.samples == 40
    assert found.speedup.estimate == pytest.approx(
        found.baseline.median_ms / found.delivered.median_ms
    )
    assert found.speedup.estimate > 1


def test_parity_is_relative_to_the_largest_output(network):
    engine = FakeRuntime().build(fold_norms(export_graph(network)), EngineSettings())
    images = torch.randn(3, 1, 16, 16)

    agreed = measure_parity(engine, network, images)
    with torch.no_grad():
        network.module.linear.weight.mul_(2)
        network.module.linear.bias.mul_(2)
    doubled = measure_parity(engine, network, images)

    assert agreed < 1e-5
    assert doubled == pytest.approx(0.5, abs=1e-4)  # half of the doubled outputs is missing

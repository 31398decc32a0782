"""What was promised against what the delivered engine does: parity, accuracy, latency."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hardware.latency.end_to_end import Timing
from hardware.runtimes.base import Engine
from pipeline.recipe import LimitsSection, TargetSection
from pipeline.records import Form, Network, Progress, Verdict
from pipeline.tasks.evaluate import Score, accuracy, engine_predictor, torch_predictor

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Accuracy on the test images, read once: both engines, and the pruned torch network."""

    baseline: Score
    delivered: Score
    torch: Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known before the verdict is measured."""

    predicted_share: float  # predicted latency / baseline latency, both predicted the same way
    proof_error: float
    parameters: tuple[int, int]
    macs: tuple[int, int]
    engine: str
    report: str
    form: Form


def measure_parity(engine: Engine, network: Network, images: Tensor) -> float:
    """Return the largest difference of engine and torch outputs, relative to the largest output.

    Args:
        engine: the delivered engine.
        network: the torch network that it was exported from.
        images: (n, channels, height, width), float32.
    """
    with torch.inference_mode():
        expected = torch_predictor(network)(images).float().numpy()
    found = engine_predictor(engine)(images).float().numpy()
    return float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-12))


def measure_quality(
    baseline: Engine,
    delivered: Engine,
    network: Network,
    test: Callable[[], Batches],
    images: int,
    progress: Progress,
) -> Quality:
    """Return the test accuracy of both engines and of the pruned torch network."""
    return Quality(
        baseline=accuracy(engine_predictor(baseline), test(), progress, images),
        delivered=accuracy(engine_predictor(delivered), test(), progress, images),
        torch=accuracy(torch_predictor(network), test(), progress, images),
    )


def judge(
    target: TargetSection,
    limits: LimitsSection,
    facts: Facts,
    timing: Timing,
    quality: Quality,
    parity: float,
) -> Verdict:
    """Return the verdict: every limit with what was measured and what was allowed.

    A target given as a ratio is a share of the baseline measured in the same run; the prediction
    is scaled by the same baseline, so that a machine that became slower does not pass for an error.
    """
    before, after = timing.baseline, timing.delivered
    target_ms = target.latency_ms or (target.latency_ratio or 1.0) * before.median_ms
    predicted_ms = facts.predicted_share * before.median_ms
    error_pct = 100 * (predicted_ms / after.median_ms - 1)
    drop = quality.baseline.accuracy_pct - quality.delivered.accuracy_pct
    checks = (
        (
            after.median_ms <= target_ms,
            f"latency {after.median_ms:.4f} ms, target {target_ms:.4f} ms",
        ),
        (
            drop <= limits.accuracy_drop_points,
            f"accuracy drop {drop:.2f} points, allowed {limits.accuracy_drop_points:.2f}",
        ),
        (parity <= limits.parity, f"parity {parity:.1e}, allowed {limits.parity:.1e}"),
        (
            abs(error_pct) <= limits.prediction_error_pct,
            f"prediction error {error_pct:+.1f} %, allowed {limits.prediction_error_pct:.1f} %",
        ),
    )
    return Verdict(
        passed=all(holds for holds, _ in checks),
        reasons=tuple(f"{'ok' if holds else 'MISSED'}: {text}" for holds, text in checks),
        runtime=target.runtime,
        precision=target.precision,
        batch=target.batch,
        threads=target.threads,
        baseline_ms=before.median_ms,
        baseline_interval_ms=(before.low_ms, before.high_ms),
        target_ms=target_ms,
        measured_ms=after.median_ms,
        measured_interval_ms=(after.low_ms, after.high_ms),
        predicted_ms=predicted_ms,
        prediction_error_pct=error_pct,
        speedup=timing.speedup.estimate,
        speedup_interval=(timing.speedup.low, timing.speedup.high),
        baseline_accuracy_pct=quality.baseline.accuracy_pct,
        accuracy_pct=quality.delivered.accuracy_pct,
        torch_accuracy_pct=quality.torch.accuracy_pct,
        test_images=quality.delivered.images,
        parity=parity,
        proof_error=facts.proof_error,
        parameters=facts.parameters,
        macs=facts.macs,
        engine=facts.engine,
        report=facts.report,
        form=facts.form,
    )

"""What a device's history says about the drift between its sessions, against arithmetic."""

import math

import numpy as np
import pytest
from scipy.stats import t as students_t

from hardware.gate.drift import session_drift
from hardware.gate.history import Measured, Past, Times
from hardware.gate.reference import NAME
from hardware.gate.sequential_test import ASSUMED_DRIFT
from hardware.gate.session import Subject


def session(log_ratio: float, *, engine: str = "a", reference: str = NAME, units: int = 9) -> Past:
    """An engine that takes exp(log_ratio) times as long as the reference, in every unit."""
    times = {"samples": 8, "p90_ms": 3.0, "p99_ms": 3.0, "load_ms": 9.0, "first_ms": 3.0}
    subject = Subject(
        path=f"{engine}.onnx", sha256=engine, runtime="ort", version="1", precision="fp32",
        threads=1, inputs=(),
    )  # fmt: skip
    unit = Measured(
        session="s",
        sha256=engine,
        reference=Times(p50_ms=2.0, **times),
        p50_ms=2.0 * math.exp(log_ratio),
        **times,
    )
    return Past("s", (subject,), reference, (unit,) * units, None)


def test_drift_is_the_prediction_bound_for_the_difference_of_two_sessions():
    # Two engines: squares (1 + 1) and (1 + 0 + 1), in units of 1e-4; 1 + 2 repeats; then one more.
    past = [session(x) for x in (0.50, 0.52)]
    past += [session(x, engine="b") for x in (-0.01, 0.0, 0.01)]
    past += [session(x, engine="c") for x in (0.30, 0.30)]

    found = session_drift(past, "p50", 0.01)

    scatter = math.sqrt((2e-4 + 2e-4 + 0) / 4)
    assert found.share == pytest.approx(math.expm1(students_t.isf(0.01, 4) * scatter * 2**0.5))
    assert found.sessions == 7
    # The other metrics did not move at all.
    assert session_drift(past, "load", 0.01).share == pytest.approx(0.0)


def test_the_bound_is_exceeded_as_often_as_it_says():
    generator = np.random.default_rng(0)
    exceeded = 0
    for _ in range(400):
        *known, then, now = generator.normal(0, 0.01, 8)
        bound = session_drift([session(x) for x in known], "p50", 0.05).share
        exceeded += math.exp(now - then) > 1 + bound

    # Binomial(400, 0.05) lies in 8 to 35 but for 1 in 1000.
    assert 8 <= exceeded <= 35


@pytest.mark.parametrize(
    "past",
    [
        [],
        [session(0.1)] * 4,  # three repeats
        [session(0.1, engine=name) for name in "abcdefgh"],  # nothing repeats
        [session(0.1, reference="another engine")] * 9,  # paired sessions drift less
        [session(0.1, units=4)] * 9,  # interrupted early
    ],
)
def test_too_little_history_leaves_what_is_assumed(past):
    assert session_drift(past, "p50", 0.01) is ASSUMED_DRIFT

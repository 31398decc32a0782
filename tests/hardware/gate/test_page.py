"""The page of a device's history: what it marks as a change, and what it does not."""

import pytest

from hardware.gate.engines import REFERENCE
from hardware.gate.history import Measured, Past, Times
from hardware.gate.page import page, series
from hardware.gate.sequential_test import ASSUMED_ALLOWANCE
from hardware.gate.session import Subject

NET = Subject(
    path="a<b>.onnx", sha256="a", runtime="ort", version="1", precision="fp32", threads=1, inputs=()
)


def session(p50_ms: float, reference_ms: float | None, reference: str = REFERENCE) -> Past:
    times = {"samples": 8, "p90_ms": 9.0, "p99_ms": 9.0, "load_ms": 9.0, "first_ms": 9.0}
    beside = None if reference_ms is None else Times(p50_ms=reference_ms, **times)
    unit = Measured(session="s", sha256="a", p50_ms=p50_ms, reference=beside, **times)
    return Past("s", (NET,), reference, (unit,) * 9, None)


def changes(*sessions: Past) -> list[float | None]:
    [points] = series(sessions, ASSUMED_ALLOWANCE).values()
    return [point.change_pct for point in points]


def test_a_change_is_one_against_the_same_reference():
    assert changes(session(2.0, 1.0), session(2.2, 1.0)) == [None, pytest.approx(10.0)]
    assert changes(session(2.2, 1.0), session(2.0, 1.0)) == [None, pytest.approx(-100 / 11)]
    assert changes(session(2.0, 1.0), session(2.04, 1.0)) == [
        None,
        None,
    ]  # 3 % are allowed between sessions


def test_a_machine_that_runs_at_another_clock_is_no_change():
    assert changes(session(2.0, 1.0), session(2.4, 1.2)) == [None, None]


def test_sessions_without_a_common_reference_tell_no_change():
    assert changes(session(2.0, 1.0, "old baseline"), session(4.0, 1.0, "new")) == [None, None]
    assert changes(session(2.0, None), session(4.0, None)) == [None, None]


def test_the_page_shows_every_session_and_marks_the_change():
    text = page("Latency on x & y", [session(2.0, 1.0), session(2.2, 1.0)])

    assert "Latency on x &amp; y" in text and "a&lt;b&gt;.onnx" in text
    assert text.count("<circle") == 2
    assert '<td class="changed">+10.0 %</td>' in text


def test_a_page_without_sessions_says_so():
    assert "Nothing was measured yet." in page("Latency", [])

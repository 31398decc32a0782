import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware.latency.references import References

USUAL = References(full_ms=16.0, narrow_ms=1.0)
TIMES = st.floats(0.01, 100.0)


def test_networks_between_the_two_are_slowed_between_them_by_their_time():
    # Small networks take twice as long as usual, the full one is as fast as ever.
    now = References(full_ms=16.0, narrow_ms=2.0)

    assert now.slowdown(USUAL, 16.0) == 1.0
    assert now.slowdown(USUAL, 2.0) == pytest.approx(2.0)
    assert now.slowdown(USUAL, 32**0.5) == pytest.approx(2**0.5)


def test_networks_outside_of_the_two_are_slowed_as_the_nearer_one():
    now = References(full_ms=24.0, narrow_ms=1.1)

    assert now.slowdown(USUAL, 100.0) == pytest.approx(1.5)
    assert now.slowdown(USUAL, 0.1) == pytest.approx(1.1)


@given(full=TIMES, narrow=TIMES, time=TIMES, factor=st.floats(0.5, 2.0))
def test_what_slows_all_alike_cancels(full, narrow, time, factor):
    usual = References(full_ms=full, narrow_ms=narrow)
    now = References(full_ms=factor * full, narrow_ms=factor * narrow)

    assert now.slowdown(usual, time) == pytest.approx(factor)


@given(full=TIMES, narrow=TIMES, time=TIMES)
def test_a_slowdown_lies_between_those_of_the_two(full, narrow, time):
    slowdown = References(full_ms=full, narrow_ms=narrow).slowdown(USUAL, time)

    ratios = sorted((full / 16.0, narrow / 1.0))
    assert ratios[0] * (1 - 1e-9) <= slowdown <= ratios[1] * (1 + 1e-9)


@pytest.mark.parametrize("narrow_ms", [0.0, 23.0])
def test_the_full_network_decides_alone_where_no_smaller_one_was_timed(narrow_ms):
    now = References(full_ms=24.0, narrow_ms=narrow_ms)

    assert now.slowdown(USUAL, 2.0) == 1.5
    assert USUAL.slowdown(References(full_ms=8.0, narrow_ms=narrow_ms / 2), 2.0) == 2.0

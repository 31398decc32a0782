"""What a table said of networks before it measured them says how far to trust it."""

import pytest

from hardware.latency.table import LatencyTable
from hardware.latency.trust import RECENT, trust_of
from tests.hardware.latency.test_table import KEY, conv, variant


def table_off_by(*shares):
    """A table that predicted each network too long by a share of what it took."""
    table = LatencyTable(key=KEY)
    for number, share in enumerate(shares):
        width = 8 * (number + 1)
        measured = variant([100.0], width=width, predicted_ms=0.1 * (1 + share))
        table = table.adding(measured, [conv(8, width)])
    return table


def test_the_errors_are_those_of_predictions_made_before_measuring():
    found = trust_of(table_off_by(0.01, -0.02, 0.03, -0.04, 0.06))

    assert found.errors_pct == pytest.approx((1.0, -2.0, 3.0, -4.0, 6.0))
    assert (found.median_pct, found.worst_pct) == (pytest.approx(3.0), pytest.approx(6.0))
    assert "3.0 % off (median), 6.0 % (worst)" in str(found)
    assert "table_minutes" not in str(found)


def test_only_the_last_networks_count_since_the_table_knew_less_before():
    found = trust_of(table_off_by(*[0.5] * 7, *[0.01] * RECENT))

    assert found.worst_pct == pytest.approx(1.0)


def test_a_table_that_predicts_badly_says_what_to_do():
    assert "target.table_minutes" in str(trust_of(table_off_by(0.01, 0.01, 0.01, 0.01, 0.2)))


def test_a_table_without_enough_predictions_says_so():
    table = table_off_by(0.01, 0.02)
    unpredicted = table.adding(variant([50.0], width=99), [conv(8, 99)])

    assert "2 networks were predicted" in str(trust_of(unpredicted))
    assert trust_of(LatencyTable(key=KEY)).errors_pct == ()


def test_a_slow_down_of_the_device_is_no_error_of_the_table():
    slow = variant([200.0], width=16, full_ms=2.0, predicted_ms=0.1)
    table = LatencyTable(key=KEY)
    for _ in range(3):
        table = table.adding(variant([100.0]), [conv(8, 8)])

    (error,) = trust_of(table.adding(slow, [conv(8, 16)])).errors_pct

    assert error == pytest.approx(0.0)

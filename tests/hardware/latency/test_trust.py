"""Each network predicted from the others: right where the law is known, blind to its own times."""

import pytest

from hardware.latency.table import LatencyTable
from hardware.latency.trust import cross_validate
from tests.hardware.latency.test_contexts import EVICTED_US, learnt
from tests.hardware.latency.test_table import KEY, conv, variant


@pytest.fixture(scope="module")
def table():
    return learnt(EVICTED_US)[0]


def retimed(table, place, factor):
    """The table with another end-to-end time of one network; what its layers take stays."""
    one = table.variants[place]
    figures = ("median_ms", "low_ms", "high_ms")
    slower = {name: factor * getattr(one.end_to_end, name) for name in figures}
    latency = one.end_to_end.model_copy(update=slower)
    keys = [table.entries[i].key for i in one.entries]
    changed = one.model_copy(
        update={"end_to_end": latency, "entries": tuple(range(len(one.entries)))}
    )
    return table.replacing(one, changed, keys)


def test_where_times_follow_a_law_each_network_is_predicted_from_the_others(table):
    found = cross_validate(table)

    assert len(found.networks) + found.passed_over == len(table.variants)
    assert not found.passed_over
    assert found.median_pct < 1 and found.p95_pct < 3
    assert f"{found.median_pct:.1f} % off (median)" in str(found)
    assert "table_minutes" not in str(found)


def test_a_network_that_strays_is_the_worst_by_as_much(table):
    found = cross_validate(retimed(table, 7, 1.25))

    worst = max(found.networks, key=lambda network: abs(network.error_pct))
    assert worst.variant.widths == table.variants[7].widths
    assert worst.error_pct == pytest.approx(100 * (1 / 1.25 - 1), abs=3)
    assert found.median_pct < 1


def test_a_table_that_predicts_badly_says_what_to_do(table):
    for place in (2, 9, 15):
        table = retimed(table, place, 1.4)

    assert "target.table_minutes" in str(cross_validate(table))


def test_a_network_has_no_say_in_its_own_prediction(table):
    before, after = (cross_validate(t).networks[3] for t in (table, retimed(table, 3, 1.5)))

    assert after.predicted_ms == before.predicted_ms
    assert after.measured_ms == pytest.approx(1.5 * before.measured_ms)


def test_what_no_other_network_has_is_passed_over():
    table = LatencyTable(key=KEY)
    for width in (8, 16, 24):
        table = table.adding(variant([1.0 * width], width=width), [conv(3, width)])
    lonely = conv(8, 8).model_copy(update={"strides": (2, 2)})
    table = table.adding(variant([9.0, 5.0], width=32), [conv(3, 32), lonely])
    seen = []

    found = cross_validate(table, lambda *told: seen.append(told))

    assert (len(found.networks), found.passed_over) == (3, 1)
    assert "3 networks can be predicted from the others: too few" in str(found)
    assert [told[:2] for told in seen] == [(n, 4) for n in range(1, 5)]


def test_what_was_measured_far_from_the_usual_pace_judges_nothing(table):
    slow = table.variants[5]
    keys = [table.entries[place].key for place in slow.entries]
    changed = slow.model_copy(
        update={"anchor_ms": 1.5 * slow.anchor_ms, "entries": tuple(range(len(keys)))}
    )

    found = cross_validate(table.replacing(slow, changed, keys))

    assert found.passed_over == 1 and "1 left aside" in str(found)
    assert all(network.variant.widths != slow.widths for network in found.networks)


def test_a_large_table_is_fitted_a_few_times_and_judged_by_all(table, monkeypatch):
    monkeypatch.setattr("hardware.latency.trust.MOST_FOLDS", 4)
    seen = []

    found = cross_validate(table, lambda *told: seen.append(told))

    assert [told[:2] for told in seen] == [(n, 4) for n in range(1, 5)]
    assert [n.variant.widths for n in found.networks] == [v.widths for v in table.variants]
    assert found.median_pct < 1.5


def test_a_table_without_a_network_is_as_if_it_had_never_been_measured(table):
    one = table.variants[0]
    keys = [table.entries[place].key for place in one.entries]
    added = one.model_copy(update={"widths": {"g": 1}, "entries": tuple(range(len(one.entries)))})

    again = table.adding(added, keys)

    assert again.without(again.variants[-1:]) == table

"""The sequential test's promises, on simulated series that break every textbook assumption."""

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import binom

from hardware.gate.sequential_test import (
    Allowance,
    Limit,
    MedianBounds,
    SequentialTest,
    Verdict,
    heads_needed,
    parse_share,
)
from hardware.intervals import Interval

LIMIT = Limit("p50", 0.02)
BORDER = math.log1p(0.02)


def judged(log_ratios, confidence=0.99, limit=LIMIT, **more) -> Verdict:
    """Look after every unit and stop as soon as it is sure, as a bench does."""
    test = SequentialTest(limit, confidence, **more)
    for load, value in enumerate(log_ratios):
        test.add(float(value), load)
        if (verdict := test.comparison().verdict) is not Verdict.INCONCLUSIVE:
            return verdict
    return Verdict.INCONCLUSIVE


def restless(generator: np.random.Generator, units: int) -> np.ndarray:
    """Log-ratios of two equal engines on a bad machine: two noises in an order drawn by lot.

    The noise is a slow wander plus Cauchy outliers: neither independent nor of finite variance.
    """
    wander = np.cumsum(generator.standard_normal((units, 2)) * 0.01, axis=0)
    noise = wander + 0.01 * generator.standard_cauchy((units, 2))
    swapped = generator.integers(0, 2, units) * 2 - 1
    return (noise[:, 0] - noise[:, 1]) * swapped


def test_a_proof_needs_as_many_heads_as_make_a_bettor_rich():
    # Nine in a row: the boldest alone has 0.4 * 1.97**9 = 179, and all others together the rest.
    # Eight: 0.4 * 1.97**8 + 0.2 * 1.75**8 + ... = 112, less than 1 / 0.005.
    assert heads_needed(8, 0.005) is None
    assert heads_needed(9, 0.005) == 9
    assert heads_needed(100, 0.005) < 80


@pytest.mark.parametrize("error", [0.05, 0.005])
def test_a_fair_coin_convinces_at_any_time_no_more_often_than_allowed(error):
    # Exact, by following the probability of every number of heads that has not convinced yet.
    alive, convinced = np.array([1.0]), 0.0
    for count in range(1, 401):
        alive = 0.5 * (np.append(alive, 0) + np.insert(alive, 0, 0))
        needed = heads_needed(count, error)
        if needed is not None:
            convinced += alive[needed:].sum()
            alive[needed:] = 0

    assert error / 10 < convinced <= error
    assert binom.sf(heads_needed(400, error) - 1, 400, 0.5) < error


def test_equal_engines_are_hardly_ever_called_a_regression_however_often_one_looks():
    # Exactly at the limit, where false alarms are most likely: each side may err in 0.5 %.
    generator = np.random.default_rng(0)

    verdicts = [judged(BORDER + restless(generator, 80)) for _ in range(400)]

    assert verdicts.count(Verdict.REGRESSION) <= 0.01 * len(verdicts)
    assert verdicts.count(Verdict.PASS) <= 0.01 * len(verdicts)


def test_equal_engines_pass_and_slow_ones_are_found():
    generator = np.random.default_rng(1)

    def series(slower: float) -> np.ndarray:
        # Units whose medians differ by 1 % (standard deviation), an outlier in every tenth.
        noise = generator.normal(0, 0.01, 40)
        outlier = generator.random(40) < 0.1
        return math.log1p(slower) + np.where(outlier, generator.standard_cauchy(40), noise)

    equal = [judged(series(0.0)) for _ in range(300)]
    slow = [judged(series(0.05)) for _ in range(300)]
    fast = [judged(series(-0.3)) for _ in range(100)]

    assert equal.count(Verdict.PASS) >= 0.9 * len(equal)
    assert equal.count(Verdict.REGRESSION) == 0
    assert slow.count(Verdict.REGRESSION) >= 0.99 * len(slow)
    assert set(fast) == {Verdict.PASS}


def test_bounds_hold_the_median_at_all_times_and_never_widen():
    generator = np.random.default_rng(2)
    missed = 0
    for _ in range(300):
        bounds, widths, holds = MedianBounds(0.99), [], True
        for value in restless(generator, 60):
            bounds.add(float(value))
            widths.append(bounds.high - bounds.low)
            holds &= bounds.low <= 0 <= bounds.high
        missed += not holds
        assert all(a >= b for a, b in pairwise(widths) if math.isfinite(a))

    assert missed <= 0.02 * 300


def test_a_run_tells_the_least_slow_down_that_it_would_have_seen():
    test = SequentialTest(LIMIT, 0.99)
    for load in range(9):
        test.add(math.log(1.0 + 0.001 * load), load)  # nine units: the bounds are the extremes

    found = test.comparison()

    assert found.ratio.low == pytest.approx(1.0)
    assert found.ratio.high == pytest.approx(1.008)
    assert found.verdict is Verdict.PASS
    # Were everything slower by this factor, the lower bound would lie on the limit.
    assert (1 + found.detectable) / 1.004 * 1.0 == pytest.approx(1.02)


def test_too_few_units_tell_nothing():
    found = SequentialTest(LIMIT, 0.99).comparison()

    assert found.verdict is Verdict.INCONCLUSIVE
    assert math.isinf(found.detectable)
    assert judged([0.5] * 8) is Verdict.INCONCLUSIVE
    assert judged([0.5] * 9) is Verdict.REGRESSION


def test_units_of_few_loads_are_no_independent_witnesses():
    def loaded(values) -> Verdict:
        test = SequentialTest(LIMIT, 0.99)
        for index, value in enumerate(values):
            test.add(value, index // 20)
        return test.comparison().verdict

    assert loaded([0.1] * 40) is Verdict.INCONCLUSIVE  # two loads
    assert loaded([0.1] * 60) is Verdict.REGRESSION  # three that agree
    assert loaded([0.1] * 80 + [0.0] * 20) is Verdict.INCONCLUSIVE  # one does not


def test_a_recorded_baseline_brings_its_own_interval_and_what_sessions_may_differ():
    base = Interval(0.0, -0.01, 0.01)

    # 5 % slower: log 0.0488. Against 0.01 + log 1.02 = 0.0298 it is sure,
    # with 3 % between sessions it is not.
    assert judged([0.0488] * 12, baseline=base) is Verdict.REGRESSION
    assert judged([0.0488] * 12, baseline=base, allowance=Allowance(0.03)) is Verdict.INCONCLUSIVE
    assert judged([0.0] * 12, baseline=base, allowance=Allowance(0.03)) is Verdict.PASS


def test_limits_are_read_and_written_alike():
    assert Limit.parse("p99: 2.5%") == Limit("p99", 0.025)
    assert str(Limit.parse("load:10")) == "load:10%"
    assert parse_share("3%") == 0.03


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("p95:2%", "Unknown metric 'p95'. Known: p50, p90, p99, load"),
        ("p50", "is no percentage"),
        ("p50:two%", "'two%' is no percentage"),
        ("p50:-1%", "0 % or more"),
        ("p50:nan%", "0 % or more"),
    ],
)
def test_limits_that_mean_nothing_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        Limit.parse(text)

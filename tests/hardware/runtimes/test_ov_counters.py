import numpy as np
import pytest

from hardware.runtimes.ov_counters import time_per_run_us


def counters(durations: np.ndarray) -> tuple[range, np.ndarray]:
    """What OpenVINO tells after every inference: `(inferences, counters)` in whole microseconds."""
    counts = range(1, len(durations) + 1)
    sums = np.cumsum(np.floor(durations), axis=0)
    return counts, sums // np.array(counts)[:, None]


def test_a_counter_of_steady_durations_is_read_to_the_microsecond():
    durations = np.tile([3.5, 20.5, 400.5], (40, 1))
    counts, averages = counters(durations)

    # Every duration is cut by half a microsecond, which is given back.
    np.testing.assert_allclose(time_per_run_us(counts, averages), durations[0], atol=0.5)


def test_a_cold_start_and_the_cuts_do_not_bias_a_counter():
    generator = np.random.default_rng(0)
    usual = generator.uniform(2, 60, size=200)
    durations = usual * np.exp(generator.normal(0, 0.02, size=(60, 200)))
    durations[0] += generator.uniform(20, 200, size=200)
    counts, averages = counters(durations)

    errors = time_per_run_us(counts[5:], averages[5:]) - usual

    assert abs(errors.mean()) < 0.1
    assert np.median(np.abs(errors)) < 0.3
    assert np.median(np.abs(averages[-1] - usual)) > 0.8  # what the counter says of itself


def test_an_interruption_does_not_enter_a_counter():
    durations = np.full((40, 3), 20.5)
    durations[17, 0] += 4000
    durations[[9, 30], 1] += 2500
    counts, averages = counters(durations)

    times = time_per_run_us(counts, averages)

    assert times[0] == pytest.approx(times[2], abs=0.7)
    assert times[1] == pytest.approx(times[2], abs=0.7)


def test_a_counter_needs_three_readings():
    with pytest.raises(ValueError, match="at least 3 readings of the counters; got 2"):
        time_per_run_us([1, 2], [[5], [5]])

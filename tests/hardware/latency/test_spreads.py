import numpy as np
import pytest

from hardware.latency.layers import LayerKey
from hardware.latency.samples import samples_of
from hardware.latency.spreads import USUAL_ENGINE, USUAL_ENTRY, spread_of
from hardware.latency.table import LatencyTable
from tests.hardware.latency.test_samples import series
from tests.hardware.latency.test_table import KEY, conv, variant

NOISE = 0.03


def noisy_table(seed, keys=40, builds=3):
    """Entries of 10 to 400 us; every build of one is off by 3 % (standard deviation)."""
    generator = np.random.default_rng(seed)
    table = LatencyTable(key=KEY)
    executed = [conv(8, 8 * (i + 1)) for i in range(keys)]
    for _ in range(builds):
        times = [10.0 * (i + 1) * generator.normal(1, NOISE) for i in range(keys)]
        table = table.adding(variant(times), executed)
    return table


def test_intervals_of_entries_hold_what_another_sweep_finds() -> None:
    inside = []
    for seed in range(6):
        first, second = noisy_table(2 * seed), noisy_table(2 * seed + 1)
        spread = spread_of(first)
        inside += [
            spread.of_entry(entry).contains(second.by_key[entry.key].median_us)
            for entry in first.entries
        ]

    assert 0.90 <= np.mean(inside) <= 0.99  # 95 % is meant; 240 entries


def test_more_builds_of_an_entry_make_its_interval_narrower() -> None:
    def width(table):
        return np.mean([spread_of(table).of_entry(e).relative_width for e in table.entries])

    # The median of twelve is as good as the mean of 7.6: 0.51 of the width of two.
    narrower = width(noisy_table(0, builds=12)) / width(noisy_table(0, builds=2))

    assert narrower == pytest.approx(0.51, rel=0.15)


def test_without_repeated_builds_the_usual_spread_counts() -> None:
    table = LatencyTable(key=KEY).adding(variant([10.0, 20.0]), [conv(3, 8), conv(8, 8)])

    interval = spread_of(table).of_entry(table.entries[0])

    assert interval.low == pytest.approx(10.0 * (1 - 1.96 * 2**0.5 * USUAL_ENTRY), rel=1e-3)


def test_engines_that_differ_widen_the_intervals_of_end_to_end_times() -> None:
    def table(apart):
        # Three engines of the full network take turns; the third is slower.
        anchor = series([1.0, 1.0, 1.0 + apart] * 5)
        raw = samples_of(series([0.5] * 15), anchor, engines=1, anchors=3)
        one = variant([10.0]).model_copy(update={"raw": raw})
        return LatencyTable(key=KEY).adding(one, [LayerKey.model_validate(conv(8, 8))])

    equal, different = table(0.0), table(0.1)
    intervals = [spread_of(t).of_variant(t.variants[0]) for t in (equal, different)]

    assert spread_of(equal).engine == pytest.approx(USUAL_ENGINE / 2**0.5)
    assert intervals[1].relative_width > 2 * intervals[0].relative_width
    assert all(interval.contains(0.5) for interval in intervals)

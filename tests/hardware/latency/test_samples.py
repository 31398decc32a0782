import numpy as np
import pytest

from hardware.errors import StorageError
from hardware.latency.samples import Samples, samples_of
from hardware.timing import Series


def series(samples_ms, crowded=()):
    marks = tuple(i in crowded for i in range(len(samples_ms)))
    none = (False,) * len(samples_ms)
    return Series(samples_ms=tuple(samples_ms), interrupted=none, crowded=marks)


def test_every_sample_survives_in_its_order_with_its_mark() -> None:
    generator = np.random.default_rng(0)
    variant, anchor, narrow = generator.uniform(0.01, 50.0, (3, 40))

    kept = samples_of(
        series(variant, crowded=[3]), series(anchor, crowded=[5]), 1, 3, series(narrow, crowded=[9])
    )

    np.testing.assert_allclose(kept.variant_us(), 1000 * variant, rtol=1e-6)
    np.testing.assert_allclose(kept.anchor_us(), 1000 * anchor, rtol=1e-6)
    np.testing.assert_allclose(kept.narrow_us(), 1000 * narrow, rtol=1e-6)
    assert kept.is_disturbed().nonzero()[0].tolist() == [3, 5, 9]


def test_samples_of_two_networks_alone_have_none_of_a_third() -> None:
    kept = samples_of(series([1.0, 2.0]), series([1.0, 2.0]), 1, 1)

    assert kept.narrow_us().tolist() == []


def test_a_hundred_samples_take_half_a_kilobyte() -> None:
    samples_ms = np.random.default_rng(0).uniform(1.0, 1.1, 100)

    kept = samples_of(series(samples_ms), series(samples_ms), 1, 1)

    assert len(kept.variant) < 560


def test_damaged_samples_are_an_error_that_says_what_they_are_for() -> None:
    damaged = Samples(variant="AAAA", anchor="%", disturbed="")

    for read in (damaged.variant_us, damaged.anchor_us):
        with pytest.raises(StorageError, match="predictions do not read them"):
            read()

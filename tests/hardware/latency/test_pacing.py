"""Profiles that were taken while the device was slower than for the end-to-end time."""

import numpy as np
import pytest

from hardware.latency.pacing import profile_paces
from hardware.latency.predict import predict_plan_ms
from hardware.latency.table import LatencyTable
from hardware.latency.template_layers import layers_of
from tests.hardware import templates
from tests.hardware.latency.test_contexts import adding
from tests.hardware.latency.test_table import KEY

SLOWED = 3  # the variant that is told otherwise than it was; no other has its inner1
TOLD = [
    {"stream": stream, "inner0": inner0, "inner1": inner1}
    for stream in (16, 32)
    for inner0, inner1 in ((8, 16), (32, 16), (16, 32), (24, 16), (32, 24))
]
TOLD[SLOWED]["inner1"] = 12


def learnt(profile=1.0, end_to_end=1.0):
    """Return a table in which one variant's profile, or end-to-end time, took so much longer."""
    template, channels = templates.residual()
    layers = layers_of(template, channels)
    table = LatencyTable(key=KEY)
    for widths in TOLD:
        table = adding(table, layers, widths, 0.0)
    slowed = table.variants[SLOWED]
    end = slowed.end_to_end.model_copy(
        update={"median_ms": slowed.end_to_end.median_ms * end_to_end}
    )
    times_us = tuple(profile * time_us for time_us in slowed.times_us)
    told = slowed.model_copy(
        update={"times_us": times_us, "sum_us": sum(times_us), "end_to_end": end}
    )
    variants = (*table.variants[:SLOWED], told, *table.variants[SLOWED + 1 :])
    return table.model_copy(update={"variants": variants}), layers


def test_a_profile_of_a_slower_moment_is_told_from_sums_and_layers():
    table, _ = learnt(profile=1.6)

    paces = profile_paces(table)

    assert paces[SLOWED] == pytest.approx(1.6, rel=0.02)
    assert np.delete(paces, SLOWED) == pytest.approx(np.ones(len(TOLD) - 1), abs=0.01)


def test_what_only_a_disturbed_profile_showed_is_still_predicted():
    table, layers = learnt(profile=1.6)
    exact, _ = learnt()

    plan = {**TOLD[0], "inner1": 12}

    assert predict_plan_ms(table, layers, plan) == pytest.approx(
        predict_plan_ms(exact, layers, plan), rel=0.01
    )


def test_a_disturbed_end_to_end_time_says_nothing_of_the_profile():
    table, _ = learnt(end_to_end=1.3)

    assert profile_paces(table) == pytest.approx(np.ones(len(TOLD)), abs=1e-6)


def test_few_variants_and_an_empty_table_tell_nothing():
    _, layers = learnt()
    few = LatencyTable(key=KEY)
    for widths in TOLD[:3]:
        few = adding(few, layers, widths, 0.0)

    assert profile_paces(few) == pytest.approx(np.ones(3))
    assert profile_paces(LatencyTable(key=KEY)).shape == (0,)

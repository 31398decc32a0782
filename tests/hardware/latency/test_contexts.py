"""Layers that take longer the more memory the whole network moves."""

from itertools import islice
from math import log

import numpy as np
import pytest

from hardware.latency.contexts import contexts_of, elements_in, elements_of
from hardware.latency.design import CEILINGS, design
from hardware.latency.predict import costs, predict_ms, predict_plan_ms
from hardware.latency.table import LatencyTable, Variant
from hardware.latency.template_layers import layers_of
from hardware.timing import Latency
from tests.hardware import templates
from tests.hardware.latency.test_predict import OUTSIDE_US, node_us, random_plans
from tests.hardware.latency.test_table import KEY

EVICTED_US = 3e-4  # per element of a layer's weights and inputs, per e-fold of the network's
LAST_SHARE = 0.3  # of its time, what the last layer gains beside that where it is asked for


def own_elements(key):
    return key.weights + key.in_channels * int(np.prod(key.in_size, dtype=int))


def time_us(key, elements, evicted_us):
    return node_us(key) + evicted_us * own_elements(key) * log(elements)


def executed(layers, widths):
    return [key for layer in layers if (key := layer.key_at(widths)) is not None]


def exact_ms(layers, widths, evicted_us):
    keys = executed(layers, widths)
    elements = elements_of(keys)
    return (sum(time_us(key, elements, evicted_us) for key in keys) + OUTSIDE_US) / 1000


def adding(table, layers, widths, evicted_us, slower=1.0, more=None):
    keys = executed(layers, widths)
    times = [slower * time_us(key, elements_of(keys), evicted_us) for key in keys]
    if more is not None:
        times = [time * (1 + extra) for time, extra in zip(times, more, strict=True)]
    ms = (sum(times) + slower * OUTSIDE_US) / 1000
    variant = Variant(
        template="t",
        widths=widths,
        end_to_end=Latency(median_ms=ms, low_ms=ms, high_ms=ms, mad_ms=0.0, samples=9),
        anchor_ms=1.0,
        sum_us=sum(times),
        samples=9,
        entries=tuple(range(len(times))),
        times_us=tuple(times),
    )
    return table.adding(variant, keys)


def learnt(evicted_us, builds=24):
    template, channels = templates.residual()
    layers = layers_of(template, channels)
    candidates = {group.name: tuple(range(4, group.width + 1, 4)) for group in channels.groups}
    table = LatencyTable(key=KEY)
    for widths in islice(design(layers, candidates, (), [], {}, seed=0), builds):
        table = adding(table, layers, widths, evicted_us)
    return table, layers, candidates


def test_what_a_network_evicts_is_told_from_layers_measured_in_several():
    table, _, _ = learnt(EVICTED_US)

    found = contexts_of(table)

    assert found.us_per_element == pytest.approx([EVICTED_US, EVICTED_US, 0.0], rel=0.05, abs=2e-5)


def test_a_kind_of_layer_that_gains_more_than_others_is_told_by_itself():
    template, channels = templates.residual()
    layers = layers_of(template, channels)
    candidates = {group.name: tuple(range(4, group.width + 1, 4)) for group in channels.groups}
    plans = list(islice(design(layers, candidates, (), [], {}, seed=0), 24))
    usual = np.mean([log(elements_of(executed(layers, widths))) for widths in plans])
    table = LatencyTable(key=KEY)
    for widths in plans:
        keys = executed(layers, widths)
        distance = log(elements_of(keys)) - usual
        more = [LAST_SHARE * distance * (key.operator == "Gemm") for key in keys]
        table = adding(table, layers, widths, EVICTED_US, more=more)

    found = contexts_of(table)

    shares = {layer.name: found.by_kind.get(layer.key.kind, 0.0) for layer in layers}
    assert shares.pop("fc") == pytest.approx(LAST_SHARE, rel=0.3)
    assert max(shares.values()) < LAST_SHARE / 5
    levelled = found.levelled_us(table)
    for entry, level_us in zip(table.entries, levelled.tolist(), strict=True):
        if entry.key.operator == "Gemm":
            true_us = time_us(entry.key, np.exp(found.usual), EVICTED_US)
            true_us *= 1 + LAST_SHARE * (found.usual - usual)
            assert level_us == pytest.approx(true_us, rel=0.05)


def test_a_layer_costs_less_around_a_narrower_plan():
    table, layers, candidates = learnt(EVICTED_US)
    whole = {name: max(widths) for name, widths in candidates.items()}
    narrow = {name: min(widths) for name, widths in candidates.items()}

    cheap, dear = (
        predict_ms(costs(table, layers, candidates, around), candidates, whole)
        for around in (narrow, whole)
    )

    own = sum(own_elements(key) for key in executed(layers, whole))
    sizes = [elements_of(executed(layers, widths)) for widths in (whole, narrow)]
    evicted_ms = EVICTED_US * own * log(sizes[0] / sizes[1]) / 1000
    assert dear - cheap == pytest.approx(evicted_ms, rel=0.05)
    assert predict_plan_ms(table, layers, whole) == pytest.approx(dear)
    assert dear == pytest.approx(exact_ms(layers, whole, EVICTED_US), rel=0.01)


def test_without_any_effect_none_is_found():
    table, layers, candidates = learnt(0.0)

    assert contexts_of(table).us_per_element == pytest.approx(np.zeros(3), abs=1e-9)
    for plan in random_plans(candidates, 5):
        truth = exact_ms(layers, plan, 0.0)
        assert predict_plan_ms(table, layers, plan) == pytest.approx(truth, rel=2e-3)


def test_a_disturbed_moment_is_not_taken_for_what_a_network_evicts():
    # Over 1 % of an e-fold 30 % seem to be gained: as if layers took thirty times as long.
    template, channels = templates.residual()
    layers = layers_of(template, channels)
    whole = {group.name: group.width for group in channels.groups}
    table = adding(LatencyTable(key=KEY), layers, whole, 0.0, slower=1.3)
    table = adding(table, layers, {**whole, "wide": whole["wide"] - 4}, 0.0)

    found = contexts_of(table)

    variant = table.variants[0]
    us_per_element = 1000 * variant.end_to_end.median_ms / elements_in(table, variant)
    assert found.us_per_element.max() < us_per_element / 2


def test_an_empty_table_knows_of_no_context():
    found = contexts_of(LatencyTable(key=KEY))

    assert not found.us_per_element.any()
    assert not len(found.levelled_us(LatencyTable(key=KEY)))


def test_some_designed_variants_are_narrow_everywhere():
    template, channels = templates.residual()
    layers = layers_of(template, channels)
    candidates = {group.name: tuple(range(4, group.width + 1, 4)) for group in channels.groups}

    plans = list(islice(design(layers, candidates, (), [], {}, seed=0), 3 + 2 * len(CEILINGS)))
    widest = [max(widths[n] / max(candidates[n]) for n in candidates) for widths in plans[3:]]

    for share, ceiling in zip(widest, 2 * CEILINGS, strict=True):
        assert share <= ceiling
    assert sum(share <= 0.5 for share in widest) == 4

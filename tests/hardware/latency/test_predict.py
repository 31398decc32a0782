from itertools import islice
from math import ceil

import numpy as np
import pytest

from hardware.errors import MissingLatencyError
from hardware.latency.design import design
from hardware.latency.predict import costs, keys_of, predict_keys_ms, predict_ms, predict_plan_ms
from hardware.latency.table import LatencyTable, Variant
from hardware.latency.template_layers import layers_of
from hardware.timing import Latency
from tests.hardware import templates
from tests.hardware.latency.test_table import KEY

OUTSIDE_US = 5.0


def node_us(key):
    """A staircase that pads to 4 inputs and 4 outputs; 2 us per executed node."""
    pixels = int(np.prod(key.out_size, dtype=int))
    if key.operator in ("Conv", "Gemm"):
        padded = ceil(key.in_channels / 4) * 4 * ceil(key.out_channels / 4) * 4
        if key.conv_groups > 1:
            padded = ceil(key.out_channels / 4) * 4
        return 2.0 + 1e-4 * pixels * int(np.prod(key.kernel, dtype=int)) * padded
    return 2.0 + 1e-3 * pixels * key.out_channels


def exact_us(layers, widths):
    keys = [layer.key_at(widths) for layer in layers]
    return sum(node_us(key) for key in keys if key)


def add_variant(table, layers, widths, *, slower=1.0, profiler_us=0.0, slowdown=1.0):
    """Add a variant measured by arithmetic: `slower` end to end than its nodes, all slowed down."""
    keys = [layer.key_at(widths) for layer in layers]
    executed = [key for key in keys if key]
    times = [slowdown * (node_us(key) + profiler_us) for key in executed]
    median_ms = slowdown * (slower * exact_us(layers, widths) + OUTSIDE_US) / 1000
    return table.adding(
        Variant(
            template="t",
            widths=widths,
            end_to_end=Latency(
                median_ms=median_ms, low_ms=median_ms, high_ms=median_ms, mad_ms=0.0, samples=9
            ),
            full_ms=slowdown * 1.0,
            samples=9,
            entries=tuple(range(len(times))),
            times_us=tuple(times),
        ),
        executed,
    )


def learnt(make, builds=20, **how):
    template, channels = make()
    layers = layers_of(template, channels)
    candidates = {}
    for group in channels.groups:
        in_branch = any(group.name in branch.groups for branch in channels.branches)
        candidates[group.name] = (0,) * in_branch + tuple(range(4, group.width + 1, 4))
    table = LatencyTable(key=KEY)
    plans = design(layers, candidates, channels.branches, [], {}, seed=0)
    for widths in islice(plans, builds):
        table = add_variant(table, layers, widths, **how)
    return table, layers, candidates


def random_plans(candidates, count=30):
    generator = np.random.default_rng(1)
    for _ in range(count):
        yield {name: int(generator.choice(widths)) for name, widths in candidates.items()}


def errors_of(table, layers, candidates, true_us):
    known = costs(table, layers, candidates)
    plans = list(random_plans(candidates))
    return np.array([1000 * predict_ms(known, candidates, p) / true_us(p) - 1 for p in plans])


@pytest.mark.parametrize("make", [templates.residual, templates.depthwise])
def test_unseen_plans_on_a_staircase_are_predicted_within_its_steps(make):
    table, layers, candidates = learnt(make, builds=24)

    errors = errors_of(table, layers, candidates, lambda plan: exact_us(layers, plan) + OUTSIDE_US)

    assert np.median(np.abs(errors)) < 0.01
    assert np.abs(errors).max() < 0.08


def test_layers_add_up_to_end_to_end_times_and_not_to_what_the_profiler_says():
    # Nodes read 3 us too long, and the whole takes 6 % longer than what the nodes really take.
    table, layers, candidates = learnt(templates.residual, slower=1.06, profiler_us=3.0)

    errors = errors_of(
        table, layers, candidates, lambda plan: 1.06 * exact_us(layers, plan) + OUTSIDE_US
    )

    assert np.median(np.abs(errors)) < 0.02
    assert np.abs(errors).max() < 0.15


def test_a_depthwise_layer_of_one_channel_is_not_free():
    table, layers, _ = learnt(templates.depthwise)  # of 4 channels and more
    known = costs(table, layers, {"wide": (1, 4, 16)})

    depth = next(cost.cost_us for cost in known if cost.layer == "depth")

    assert 0.5 * depth[1] < depth[0] <= depth[1] < depth[2]


def test_a_device_that_slows_down_half_way_does_not_bias_predictions():
    table, layers, candidates = learnt(templates.residual, builds=12)
    before = [predict_plan_ms(table, layers, plan) for plan in random_plans(candidates)]
    plans = design(layers, candidates, (), [], {}, seed=3)
    for widths in islice(plans, 6):
        table = add_variant(table, layers, widths, slowdown=1.4)

    after = [predict_plan_ms(table, layers, plan) for plan in random_plans(candidates)]

    assert np.median(np.array(after) / np.array(before)) == pytest.approx(1.0, abs=0.01)


def test_a_network_is_predicted_from_what_it_executes_as_from_its_widths():
    table, layers, candidates = learnt(templates.residual)
    plan = next(random_plans(candidates))

    executed = keys_of(layers, plan)

    assert predict_keys_ms(table, executed) == predict_plan_ms(table, layers, plan)


def test_measured_costs_are_marked_and_estimates_are_not():
    table, layers, candidates = learnt(templates.residual, builds=4)

    known = {cost.layer: cost for cost in costs(table, layers, candidates)}

    layer = next(layer for layer in layers if layer.name == "block0.a")
    cost = known["block0.a"]
    stream, inner = (candidates[name] for name in cost.groups)
    for i, wide in enumerate(stream):
        for j, width in enumerate(inner):
            key = layer.key_at({cost.groups[0]: wide, cost.groups[1]: width})
            assert cost.measured[i, j] == (key is None or key in table.by_key)
    assert cost.measured.any() and not cost.measured.all()


def test_layers_of_an_emptied_branch_cost_nothing():
    table, layers, candidates = learnt(templates.residual)

    known = {cost.layer: cost for cost in costs(table, layers, candidates)}

    for name in ("block0.a", "block0.b", "block1.a"):
        axis = next(i for i, g in enumerate(known[name].groups) if g.startswith("inner"))
        assert not known[name].cost_us.take(0, axis=axis).any()
        assert (known[name].cost_us.take(1, axis=axis) > 0).all()


def test_a_layer_of_many_groups_comes_in_parts_that_are_exact_around_the_given_widths():
    table, layers, candidates = learnt(templates.joined, builds=30)
    around = {"side0": 8, "side1": 12, "side2": 4, "read": 20}

    known = costs(table, layers, candidates, around)

    assert all(len(cost.groups) <= 2 for cost in known)
    assert sum(cost.layer == "reader" for cost in known) == 4
    truth = exact_us(layers, around) + OUTSIDE_US
    assert 1000 * predict_ms(known, candidates, around) == pytest.approx(truth, rel=1e-2)


def test_measuring_a_plan_improves_its_own_prediction():
    table, layers, candidates = learnt(templates.residual, builds=16)
    plan = next(random_plans(candidates))
    surprise = 1.05  # this plan takes 5 % longer than its layers explain

    def error(known):
        truth = surprise * exact_us(layers, plan) + OUTSIDE_US
        return abs(1000 * predict_ms(known, candidates, plan) / truth - 1)

    before = error(costs(table, layers, candidates))
    for _ in range(3):
        table = add_variant(table, layers, plan, slower=surprise)
    after = error(costs(table, layers, candidates))

    assert before > 0.03
    assert after < before / 2


def test_a_kind_of_layer_that_nobody_measured_is_an_error():
    table, _, _ = learnt(templates.residual)
    template, channels = templates.joined()

    with pytest.raises(MissingLatencyError, match="Conv of 8x8 px"):
        costs(table, layers_of(template, channels), {"read": (8, 16, 32)})


def test_a_width_that_is_no_candidate_is_an_error():
    table, layers, candidates = learnt(templates.residual, builds=5)

    with pytest.raises(MissingLatencyError, match="Width 5 of stream"):
        predict_ms(costs(table, layers, candidates), candidates, {"stream": 5})

import pytest

from hardware.errors import RunError
from hardware.latency.layers import attribute, owners_of
from hardware.latency.template_layers import layers_of
from hardware.runtimes.base import NodeTime
from tests.hardware import templates


def residual_of_one_block():
    template, channels = templates.residual(blocks=1)
    return template, layers_of(template, channels)


def test_time_is_attributed_to_convolutions_before_their_tails_and_reorders_to_what_follows():
    template, layers = residual_of_one_block()
    times = [
        NodeTime(name="stem", operator="Conv", nodes=("stem", "stem_relu"), time_us=1.0),
        NodeTime(name="reorder", operator="Reorder", nodes=(), time_us=2.0),
        NodeTime(name="fused", operator="Conv", nodes=("block0.a_relu", "block0.a"), time_us=4.0),
        NodeTime(name="b", operator="Conv", nodes=("block0.b",), time_us=8.0),
        NodeTime(name="add", operator="Add", nodes=("block0.add", "block0.relu"), time_us=16.0),
        NodeTime(name="down", operator="Conv", nodes=("down_out",), time_us=32.0),
        NodeTime(name="back", operator="Reorder", nodes=(), time_us=64.0),
    ]

    found = attribute(times, owners_of(template, layers), layers, {})

    by_layer = dict(zip((layer.name for layer in layers), (us for _, us in found), strict=True))
    assert by_layer["stem"] == 1.0
    assert by_layer["block0.a"] == 6.0
    assert by_layer["block0.b"] == 24.0
    assert by_layer["down"] == 96.0
    assert by_layer["pool"] == 0.0


def test_what_runs_of_an_emptied_branch_is_kept_apart():
    template, layers = residual_of_one_block()
    times = [
        NodeTime(name="stem", operator="Conv", nodes=("stem",), time_us=1.0),
        NodeTime(name="relu", operator="Relu", nodes=("block0.relu",), time_us=2.0),
    ]

    found = attribute(times, owners_of(template, layers), layers, {"inner0": 0})

    spent = {key.operator: us for key, us in found if us}
    assert spent == {"Conv": 1.0, "Relu": 2.0}


def test_a_runtime_that_renames_everything_is_an_error():
    template, layers = residual_of_one_block()
    times = [NodeTime(name="x1", operator="?", nodes=(), time_us=1.0)]

    with pytest.raises(RunError, match="None of the 1 executed nodes"):
        attribute(times, owners_of(template, layers), layers, {})

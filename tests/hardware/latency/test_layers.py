import pytest

from hardware.errors import RunError
from hardware.latency.layers import LayerKey, attribute, owners_of
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


def grouped(**more):
    return LayerKey(operator="Conv", in_channels=32, out_channels=32, conv_groups=32, **more)


@pytest.mark.parametrize(
    "key",
    [
        grouped(),
        grouped(group_channels=0),  # narrowed to one channel in each of 32 groups
        grouped().at(1, 1),
        LayerKey(operator="Conv", in_channels=1, out_channels=1),
    ],
)
def test_a_key_survives_as_tables_write_it(key):
    written = key.model_dump_json(exclude_defaults=True)

    read = LayerKey.model_validate_json(written)

    assert read == key and hash(read) == hash(key) and read.kind == key.kind


def test_a_depthwise_key_of_an_earlier_version_is_depthwise():
    stored = {"operator": "Conv", "in_channels": 32, "out_channels": 32, "conv_groups": 32}

    key = LayerKey.model_validate(stored)

    assert key.is_depthwise and key == grouped(group_channels=1)


def test_a_convolution_of_an_image_of_one_channel_is_not_depthwise():
    key = LayerKey(operator="Conv", in_channels=1, out_channels=8, kernel=(3, 3))

    assert not key.is_depthwise
    assert key.kind != grouped(kernel=(3, 3)).at(1, 1).kind

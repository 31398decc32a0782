import pytest
from onnx import TensorProto, helper

from hardware.errors import ModelError
from hardware.graph.channel_map import ChannelMap
from hardware.latency.layers import LayerKey, macs_of
from hardware.latency.template_layers import layers_of
from tests.hardware import templates


def by_name(template, channels):
    return {layer.name: layer for layer in layers_of(template, channels)}


def test_every_node_belongs_to_exactly_one_layer():
    for make in (templates.residual, templates.joined, templates.depthwise):
        template, channels = make()

        owned = [name for layer in layers_of(template, channels) for name in layer.nodes]

        assert sorted(owned) == sorted(node.name for node in template.graph.node)


def test_a_convolution_owns_its_tail_and_knows_its_groups():
    layers = by_name(*templates.residual())

    layer = layers["block0.b"]

    assert layer.nodes == ("block0.b", "block0.add", "block0.relu")
    assert (layer.in_parts, layer.out_parts) == ({"inner0": 1}, {"stream": 1})
    assert (layer.branches, layer.vanishes_with) == (("block0",), ("inner0",))
    assert layer.key == LayerKey(
        operator="Conv",
        in_channels=32,
        out_channels=32,
        kernel=(3, 3),
        strides=(1, 1),
        in_size=(16, 16),
        out_size=(16, 16),
        tail=("Add", "Relu"),
    )


def test_keys_follow_the_widths_and_vanish_with_an_emptied_branch():
    layer = by_name(*templates.residual())["block0.b"]

    key = layer.key_at({"inner0": 8, "stream": 24})

    assert key is not None
    assert (key.in_channels, key.out_channels) == (8, 24)
    assert layer.key_at({"inner0": 0, "stream": 24}) is None
    rest = layer.rest_key_at({"inner0": 0, "stream": 24})
    assert rest is not None
    assert (rest.operator, rest.out_channels, rest.tail) == ("Relu", 24, ())


def test_layers_of_one_shape_share_one_key():
    layers = by_name(*templates.residual())

    assert layers["block0.a"].key == layers["block1.a"].key
    assert hash(layers["block0.a"].key) == hash(layers["block1.a"].key)
    assert layers["block0.a"].key != layers["block0.b"].key


def test_concatenated_groups_all_count():
    layers = by_name(*templates.joined())

    reader = layers["reader"]

    assert reader.in_parts == {"side0": 1, "side1": 1, "side2": 1}
    key = reader.key_at({"side0": 4, "side2": 8, "read": 20})
    assert key is not None
    assert (key.in_channels, key.out_channels) == (4 + 16 + 8, 20)
    assert layers["concat"].groups == ("side0", "side1", "side2")


def test_depthwise_layers_stay_depthwise_and_flattened_units_own_many_positions():
    layers = by_name(*templates.depthwise(size=8))

    depth = layers["depth"].key_at({"wide": 5})

    assert depth is not None
    assert (depth.in_channels, depth.out_channels, depth.conv_groups) == (5, 5, 5)
    assert layers["fc"].in_parts == {"wide": 64}
    # The multiplication by the gate runs at the size of the map, so it belongs to the map's layer.
    assert layers["depth"].nodes == ("depth", "scale", "flat")
    assert layers["excite"].nodes == ("excite", "gate")


def test_a_shuffle_keeps_count_of_the_channels():
    layers = by_name(*templates.shuffled())

    for name in ("swap", "depth"):
        assert (layers[name].key.in_channels, layers[name].key.out_channels) == (16, 16)
        assert layers[name].out_parts == {"wide": 1}


def test_macs_are_those_of_the_definition():
    layers = layers_of(*templates.residual(size=16, blocks=1))

    full = 16 * 16 * 9 * (3 * 32 + 32 * 32 + 32 * 32) + 8 * 8 * 9 * 32 * 64 + 64 * 10
    assert macs_of(layers, {}) == full
    narrow = 16 * 16 * 9 * (3 * 32 + 32 * 8 + 8 * 32) + 8 * 8 * 9 * 32 * 64 + 64 * 10
    assert macs_of(layers, {"inner0": 8}) == narrow
    emptied = 16 * 16 * 9 * 3 * 32 + 8 * 8 * 9 * 32 * 64 + 64 * 10
    assert macs_of(layers, {"inner0": 0}) == emptied


def test_macs_of_a_depthwise_layer_fall_with_its_width_once():
    layers = [layer for layer in layers_of(*templates.depthwise(size=8)) if layer.name == "depth"]

    assert macs_of(layers, {}) == 8 * 8 * 9 * 16
    assert macs_of(layers, {"wide": 4}) == 8 * 8 * 9 * 4


def test_a_model_without_shapes_is_refused():
    value = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, "h", "w"])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    node = helper.make_node("GlobalAveragePool", ["input"], ["out"], name="pool")
    model = helper.make_model(helper.make_graph([node], "g", [value], [out]))

    with pytest.raises(ModelError, match="fixed input sizes"):
        layers_of(model, ChannelMap(groups=()))

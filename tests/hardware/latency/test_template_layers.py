from math import prod

import pytest
from onnx import TensorProto, helper

from hardware.errors import ModelError
from hardware.graph.carve import carve
from hardware.graph.channel_map import ChannelMap, Group, ParameterSlice, Resize
from hardware.graph.model import initializers, shapes
from hardware.latency.layers import LayerKey, macs_of
from hardware.latency.template_layers import layers_of
from pipeline.channels.checks import random_keep
from pipeline.channels.find import find_groups
from pipeline.networks.fold_norms import fold_norms
from tests.graphs import exported
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


ALL = (
    templates.residual,
    templates.joined,
    templates.depthwise,
    templates.shuffled,
    templates.convnext,
    templates.transformer,
)


@pytest.mark.parametrize("make", ALL)
def test_a_key_has_the_elements_that_its_node_reads_and_writes(make):
    template, channels = make()
    known, constants = shapes(template), initializers(template)
    nodes = {node.name: node for node in template.graph.node}

    for layer in layers_of(template, channels):
        node, key = nodes[layer.name], layer.key
        read = next(name for name in node.input if name not in constants)
        assert key.batch * key.in_channels * prod(key.in_size) == prod(known[read])
        assert key.batch * key.out_channels * prod(key.out_size) == prod(known[node.output[0]])


# Not `split`: where several groups lie along an axis that is cut, nobody follows whose go where.
NAMES = ["grouped", "group_normed", "inverted", "layer_normed", "many_groups", "shuffle"]


@pytest.mark.parametrize("name", [*NAMES, "padded_shortcut", "upsampled"])
def test_a_key_says_what_the_carved_network_executes(name):
    graph = exported(name)
    channels, template = find_groups(graph), fold_norms(graph)
    keep = random_keep(channels, seed=1)
    widths = {group: len(units) for group, units in keep.items()}
    carved = by_name(carve(template, channels, keep), ChannelMap(groups=()))

    for layer in layers_of(template, channels):
        if (key := layer.key_at(widths)) is not None:
            assert executed(key) == executed(carved[layer.name].key)


def test_padded_channels_belong_to_the_group_that_they_are_added_to():
    graph = exported("padded_shortcut")
    channels, template = find_groups(graph), fold_norms(graph)

    layers = by_name(template, channels)

    # The stem's 4 channels are the middle of 8; the 4 around them are another group.
    pad, mean = layers["node_pad"], layers["node_mean"]
    assert pad.in_parts == {"stem": 1}
    assert pad.out_parts == mean.in_parts == {"stem": 1, "conv2": 1}
    key = pad.key_at({"stem": 2, "conv2": 3})
    assert (key.in_channels, key.out_channels) == (2, 5)


def executed(key):
    """What a key says apart from how the layer narrows, and apart from what follows it."""
    return key.model_copy(update={"group_channels": None, "tail": (), "thinned": False})


def test_a_linear_layer_over_channels_last_has_pixels_and_channels_apart():
    layers = by_name(*templates.convnext())

    fc1, fc2 = layers["fc1"], layers["fc2"]

    assert fc1.key == LayerKey(
        operator="MatMul",
        in_channels=96,
        out_channels=384,
        in_size=(7, 7),
        out_size=(7, 7),
        tail=("Add", "Erf", "Mul"),
    )
    assert (fc1.in_parts, fc1.out_parts) == ({"stream": 1}, {"inner": 1})
    assert fc1.macs == fc2.macs == 7 * 7 * 96 * 384
    assert (fc2.key.in_channels, fc2.key.out_channels, fc2.key.in_size) == (384, 96, (7, 7))


def test_norms_and_transposes_of_channels_last_have_pixels_and_channels_apart():
    layers = by_name(*templates.convnext())

    for name in ("to_last", "norm", "to_first"):
        key = layers[name].key
        assert (key.in_channels, key.out_channels) == (96, 96)
        assert key.in_size == key.out_size == (7, 7)
        assert layers[name].in_parts == layers[name].out_parts == {"stream": 1}


@pytest.mark.parametrize(("make", "narrow"), [(templates.convnext, 48), (templates.transformer, 8)])
def test_a_narrowed_layer_shares_its_key_with_a_network_that_is_built_narrow(make, narrow):
    whole, built = layers_of(*make()), layers_of(*make(width=narrow))
    widths = {"stream": narrow, "inner": 4 * narrow, "q": narrow, "k": narrow, "v": narrow}
    # What the heads' shape says is fixed in the hand-written map of the transformer.
    fixed = {"q_heads", "k_heads", "v_heads", "scores", "mixed", "merge", "project"}

    for layer, same in zip(whole, built, strict=True):
        if layer.name not in fixed:
            assert layer.key_at(widths) == same.key


def test_attention_is_keyed_by_what_each_product_sums_over_and_makes():
    layers = by_name(*templates.transformer())

    # 2 heads of 8 channels: 9 x 9 scores each, sums over 8; then 9 x 8, sums over 9.
    scores, mixed = layers["scores"].key, layers["mixed"].key
    assert (scores.in_channels, scores.out_channels) == (8, 9)
    assert (mixed.in_channels, mixed.out_channels) == (9, 8)
    assert scores.in_size == scores.out_size == mixed.in_size == mixed.out_size == (2, 9)
    assert scores.macs == mixed.macs == 2 * 9 * 9 * 8
    assert layers["softmax"].key.in_channels == 9
    heads = layers["q_heads"].key
    assert (heads.in_channels, heads.in_size, heads.out_size) == (16, (9,), (9,))


def test_the_mean_over_tokens_leaves_the_channels():
    layers = by_name(*templates.transformer())

    mean = layers["mean"]

    assert (mean.key.in_channels, mean.key.in_size) == (16, (9,))
    assert (mean.key.out_channels, mean.key.out_size) == (16, ())
    assert mean.out_parts == layers["head"].in_parts == {"stream": 1}


@pytest.mark.parametrize("version", [11, 18])  # axes as an attribute, and as an input
def test_the_mean_over_pixels_of_channels_last_leaves_the_channels(version):
    b = templates.Builder(size=7)
    value = b.conv("input", "conv", (None, 3), ("wide", 98), kernel=1)  # 14 times 7
    value = b.add("Transpose", [value], "to_last", perm=[0, 2, 3, 1])
    b.add("ReduceMean", [value], "mean", axes=[1, 2], keepdims=0)
    if version == 18:
        del b.nodes[-1]
        axes = templates.sizes(b, "axes", 1, 2)
        b.add("ReduceMean", [value, axes], "mean", keepdims=0)
    template, channels = b.finish("mean_out", version=version)

    mean = by_name(template, channels)["mean"]

    assert (mean.key.in_channels, mean.key.in_size, mean.key.out_size) == (98, (7, 7), ())
    assert mean.in_parts == mean.out_parts == {"wide": 1}


def test_a_linear_layer_behind_a_flatten_reads_every_pixel():
    layer = by_name(*templates.depthwise(size=8))["fc"]

    assert (layer.key.in_channels, layer.key.in_size, layer.in_parts) == (1024, (), {"wide": 64})


def test_a_group_norm_and_what_follows_it_have_the_channels_from_before():
    b = templates.Builder(size=6)
    value = b.conv("input", "conv", (None, 3), ("wide", 8), kernel=1)
    value = b.add("Reshape", [value, templates.sizes(b, "apart", 1, 2, 144)], "apart")
    scale, shift = b.weight("scale", 2), b.weight("shift", 2)
    value = b.add("InstanceNormalization", [value, scale, shift], "norm")
    value = b.add("Reshape", [value, templates.sizes(b, "back", 1, 8, 6, 6)], "back")
    pool = b.add("MaxPool", [value], "pool", kernel_shape=[2, 2], strides=[2, 2])

    layers = by_name(*b.finish(pool))

    norm, after = layers["norm"], layers["pool"]
    assert (norm.key.in_channels, norm.key.in_size, norm.in_parts) == (8, (6, 6), {"wide": 1})
    assert (after.key.in_channels, after.key.in_size, after.key.out_size) == (8, (6, 6), (3, 3))
    assert after.in_parts == after.out_parts == {"wide": 1}


def test_weights_on_the_left_sum_over_tokens():
    b = templates.Builder(size=3)
    value = b.conv("input", "conv", (None, 3), ("wide", 8), kernel=1)
    value = b.add("Reshape", [value, templates.sizes(b, "flat", 1, 8, 9)], "flat")
    value = b.add("Transpose", [value], "to_last", perm=[0, 2, 1])
    value = b.add("MatMul", [b.weight("mix.weight", 5, 9), value], "mix")

    key = by_name(*b.finish(value))["mix"].key

    assert (key.in_channels, key.out_channels, key.in_size, key.out_size) == (9, 5, (8,), (8,))
    assert key.macs == 5 * 9 * 8


@pytest.mark.parametrize("operator", ["Conv", "ConvTranspose"])
def test_the_kind_of_a_depthwise_layer_does_not_depend_on_its_width(operator):
    b = templates.Builder(size=8)
    value = b.conv("input", "point", (None, 3), ("wide", 16), kernel=1)
    weight = b.weight("depth.weight", 16, 1, 3, 3)
    b.cut("wide", 16, weight, 0, "depthwise")
    depth = by_name(*b.finish(b.add(operator, [value, weight], "depth", group=16)))["depth"]

    keys = [depth.key_at({"wide": width}) for width in (16, 2, 1)]

    assert [(k.in_channels, k.out_channels, k.conv_groups) for k in keys] == [
        (16, 16, 16),
        (2, 2, 2),
        (1, 1, 1),
    ]
    assert {key.kind for key in keys} == {depth.key.kind}
    assert all(key.is_depthwise for key in keys)
    size = 8 if operator == "ConvTranspose" else 6
    assert [key.macs for key in keys] == [width * 9 * size * size for width in (16, 2, 1)]


def grouped(whole: bool):
    """A convolution of groups: whole ones go, or the same position of all of them."""
    b = templates.Builder(size=8)
    first = b.weight("first.weight", 16, 3, 1, 1)
    value = b.add("Conv", ["input", first], "first")
    second = b.weight("second.weight", 16, 2, 3, 3)
    output = b.add("Conv", [value, second], "second", group=8)
    if whole:  # 8 groups of 2 channels
        b.cut("wide", 8, first, 0, "filter", each=2)
        b.cut("wide", 8, second, 0, "filter", each=2)
    template, channels = b.finish(output)
    if whole:
        follows = Resize(node="second", attribute="group", parts={"wide": tuple(range(8))})
        return template, channels.model_copy(update={"resizes": (follows,)})

    def cut(parameter, axis, role, times):
        units = tuple(range(2)) * times
        return ParameterSlice(parameter=parameter, axis=axis, role=role, units=units)

    made = Group(name="out", width=2, slices=(cut(second, 0, "filter", 8),))
    slices = (cut(first, 0, "filter", 8), cut(second, 1, "input", 1))
    return template, ChannelMap(groups=(Group(name="wide", width=2, slices=slices), made))


def test_where_whole_groups_go_their_number_follows_the_width():
    layer = by_name(*grouped(whole=True))["second"]

    keys = [layer.key_at({"wide": width}) for width in (8, 3, 1)]

    assert layer.in_parts == layer.out_parts == {"wide": 2}
    assert [(k.in_channels, k.out_channels, k.conv_groups) for k in keys] == [
        (16, 16, 8),
        (6, 6, 3),
        (2, 2, 1),
    ]
    assert len({key.kind for key in keys}) == 1
    assert not any(key.is_depthwise for key in keys)
    assert [key.macs for key in keys] == [groups * 2 * 2 * 9 * 6 * 6 for groups in (8, 3, 1)]


def test_a_grouped_layer_is_not_depthwise_at_its_least_width():
    layer = by_name(*grouped(whole=False))["second"]

    keys = [layer.key_at({"wide": width, "out": 1}) for width in (2, 1)]

    assert [(k.in_channels, k.out_channels, k.conv_groups) for k in keys] == [
        (16, 8, 8),
        (8, 8, 8),
    ]
    assert {key.kind for key in keys} == {layer.key.kind}
    assert not any(key.is_depthwise for key in keys)


def test_a_transposed_convolution_of_groups_reads_and_makes_channels_of_every_group():
    b = templates.Builder(size=4)
    first, up = b.weight("first.weight", 12, 3, 1, 1), b.weight("up.weight", 12, 4, 2, 2)
    value = b.add("Conv", ["input", first], "first")
    template, _ = b.finish(b.add("ConvTranspose", [value, up], "up", group=2))
    parts = [(first, 0, "filter", 2), (up, 0, "input", 2)], [(up, 1, "filter", 1)]
    groups = [
        Group(
            name=name,
            width=width,
            slices=tuple(
                ParameterSlice(parameter=p, axis=axis, role=role, units=tuple(range(width)) * times)
                for p, axis, role, times in cuts
            ),
        )
        for name, width, cuts in zip(("wide", "up"), (6, 4), parts, strict=True)
    ]

    layer = by_name(template, ChannelMap(groups=tuple(groups)))["up"]

    assert (layer.in_parts, layer.out_parts) == ({"wide": 2}, {"up": 2})
    key = layer.key_at({"wide": 5, "up": 3})
    assert (key.in_channels, key.out_channels, key.conv_groups) == (10, 6, 2)
    assert key.macs == 4 * 4 * 10 * 6 // 2 * 2 * 2


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

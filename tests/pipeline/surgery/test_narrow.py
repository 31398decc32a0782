import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from hardware.graph.channel_map import Branch, ChannelMap
from pipeline.errors import SurgeryError
from pipeline.surgery.narrow import SizesOnly, emptied_branches, find_cuts, narrow, run_once
from tests.pipeline.maps import cut, group

CHAIN = ChannelMap(groups=(group(4, ["conv1"], ["bn1"], ["conv2"]),))


def test_two_groups_cut_one_axis_of_a_parameter_behind_a_concatenation():
    channels = ChannelMap(
        groups=(
            group(2, ["a"], others=[cut("c.weight", "input", (0, 1, -1, -1, -1), axis=1)]),
            group(3, ["b"], others=[cut("c.weight", "input", (-1, -1, 0, 1, 2), axis=1)]),
        )
    )

    cuts = find_cuts(channels, {"a.weight": (1,), "b.weight": (0, 2)})

    assert cuts == {"a.weight": {0: (1,)}, "b.weight": {0: (0, 2)}, "c.weight": {1: (1, 2, 4)}}


def test_a_unit_may_own_several_positions():
    flat = cut("linear.weight", "input", (0, 0, 1, 1, 2, 2), axis=1)
    channels = ChannelMap(groups=(group(3, ["conv"], others=[flat]),))

    assert find_cuts(channels, {"conv.weight": (0, 2)})["linear.weight"] == {1: (0, 1, 4, 5)}


@pytest.mark.parametrize(
    ("layer", "axes", "expected"),
    [
        (nn.Conv2d(6, 8, 3), {0: 5, 1: 4}, {"in_channels": 4, "out_channels": 5, "groups": 1}),
        (nn.Conv2d(6, 6, 3, groups=6), {0: 4}, {"in_channels": 4, "out_channels": 4, "groups": 4}),
        (nn.Conv2d(4, 8, 3, groups=4), {0: 6}, {"in_channels": 3, "out_channels": 6, "groups": 3}),
        (nn.Conv2d(16, 16, 1, groups=8), {0: 10}, {"in_channels": 10, "groups": 5}),
        (nn.Conv1d(6, 8, 3), {1: 2}, {"in_channels": 2, "out_channels": 8}),
        (nn.ConvTranspose2d(6, 8, 2), {0: 5, 1: 4}, {"in_channels": 5, "out_channels": 4}),
        (nn.ConvTranspose2d(6, 6, 2, groups=6), {0: 3}, {"in_channels": 3, "out_channels": 3}),
        (nn.Linear(6, 8), {0: 5, 1: 4}, {"in_features": 4, "out_features": 5}),
        (nn.LayerNorm(6), {0: 4}, {"normalized_shape": (4,)}),
        (nn.GroupNorm(3, 6), {0: 4}, {"num_channels": 4, "num_groups": 2}),
        (nn.PReLU(6), {0: 4}, {"num_parameters": 4}),
    ],
)
def test_layers_say_and_compute_their_new_sizes(layer, axes, expected):
    wrapped = nn.Sequential(layer)
    cuts = {"0.weight": {axis: tuple(range(n)) for axis, n in axes.items()}}
    if getattr(layer, "bias", None) is not None:
        out = expected.get("out_channels", expected.get("out_features", axes.get(0)))
        cuts["0.bias"] = {0: tuple(range(out))}

    narrow(wrapped, cuts)

    assert {name: getattr(layer, name) for name in expected} == expected
    size = expected.get("in_channels") or expected.get("in_features") or axes[0]
    spatial = {nn.Conv1d: (5,), nn.Linear: (), nn.LayerNorm: ()}.get(type(layer), (5, 5))
    shape = (2, size, *spatial)
    assert torch.isfinite(wrapped(torch.randn(shape))).all()


def test_the_same_positions_may_go_from_every_group_of_a_convolution():
    net = nn.Sequential(nn.Conv2d(8, 8, 1, groups=2))

    narrow(net, {"0.weight": {0: (0, 1, 2, 4, 5, 6), 1: (1, 2, 3)}, "0.bias": {0: tuple(range(6))}})

    assert (net[0].in_channels, net[0].out_channels, net[0].groups) == (6, 6, 2)
    assert net(torch.zeros(1, 6, 2, 2)).shape == (1, 6, 2, 2)


def test_norms_are_cut_with_their_statistics():
    net = nn.Sequential(nn.BatchNorm2d(3))
    net[0].running_mean.copy_(torch.tensor([5.0, 6.0, 7.0]))

    narrow(net, {f"0.{n}": {0: (0, 2)} for n in ("weight", "bias", "running_mean", "running_var")})

    assert net[0].num_features == 2
    assert net[0].running_mean.tolist() == [5.0, 7.0]


def test_dtype_memory_format_and_requires_grad_are_kept():
    conv = nn.Conv2d(4, 6, 3, bias=False).half().to(memory_format=torch.channels_last)
    conv.weight.requires_grad_(False)
    parameter = conv.weight

    narrow(nn.Sequential(conv), {"0.weight": {0: (0, 2, 5), 1: (1, 2)}})

    assert conv.weight is parameter and not conv.weight.requires_grad
    assert conv.weight.dtype == torch.float16 and conv.weight.shape == (3, 2, 3, 3)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_tied_parameters_are_cut_once_and_stay_tied():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight

    narrow(net, {"0.weight": {0: (0, 1)}, "1.weight": {0: (0, 1), 1: (2, 3)}})

    assert net[0].weight is net[1].weight and net[0].weight.shape == (2, 2)


def test_a_parametrised_weight_is_cut_where_its_parameters_are():
    net = nn.Sequential(weight_norm(nn.Conv2d(4, 6, 3)))
    path = "0.parametrizations.weight"
    first = net[0].weight[:3].detach().clone()

    narrow(net, {f"{path}.original0": {0: (0, 1, 2)}, f"{path}.original1": {0: (0, 1, 2)}})

    assert net[0].out_channels == 3
    torch.testing.assert_close(net[0].weight, first)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"conv1.weight": ()}, "conv1.weight cannot have width 0"),
        ({"conv1.weight": (2, 1)}, r"must ascend within 0..3; got \(2, 1\)"),
        ({"conv1.weight": (0, 4)}, r"must ascend within 0..3"),
        ({"fixed": (0,)}, "Group fixed may not be pruned: it is the output. Keep all 2 channels"),
    ],
)
def test_a_keep_that_makes_no_sense_is_refused(keep, message):
    fixed = group(2, ["out"], name="fixed", frozen="it is the output")
    channels = ChannelMap(groups=(*CHAIN.groups, fixed))

    with pytest.raises(SurgeryError, match=message):
        emptied_branches(channels, keep)


def test_a_branch_is_emptied_only_when_all_its_groups_are():
    groups = (group(2, ["a"]), group(2, ["b"]))
    branch = Branch(
        name="block", groups=("a.weight", "b.weight"), layers=(), join="add", parameters=()
    )
    channels = ChannelMap(groups=groups, branches=(branch,))

    assert emptied_branches(channels, {"a.weight": (), "b.weight": ()}) == (branch,)
    with pytest.raises(SurgeryError, match=r"a.weight cannot have width 0.*Branches: block"):
        emptied_branches(channels, {"a.weight": (), "b.weight": (0,)})


def test_a_map_of_another_network_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3))

    with pytest.raises(
        SurgeryError, match=r"'conv1.weight', and nothing that is in this Sequential"
    ):
        narrow(net, {"conv1.weight": {0: (0,)}})
    with pytest.raises(SurgeryError, match=r"0.weight has shape \(4, 3, 3, 3\).*position 7"):
        narrow(net, {"0.weight": {0: (0, 7)}})


def test_conv_groups_that_no_longer_divide_are_named():
    net = nn.Sequential(nn.Conv2d(8, 8, 1, groups=4))

    with pytest.raises(SurgeryError, match=r"its 4 groups would keep different numbers.* 1 to 2"):
        narrow(net, {"0.weight": {0: tuple(range(7))}})


def test_a_forward_that_fails_names_the_layer_and_what_it_was_given():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(8, 2, 1)))

    with pytest.raises(SurgeryError, match=r"1.0 \(Conv2d\) refuses its input \(1, 4, 6, 6\)"):
        run_once(net, torch.zeros(1, 3, 8, 8))


def test_an_instance_norm_without_parameters_learns_its_width():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8))
    narrow(net, {"0.weight": {0: (0, 1, 2)}, "0.bias": {0: (0, 1, 2)}})

    run_once(net, torch.randn(1, 3, 8, 8))

    assert net[1].num_features == 3


# Sizes without numbers


def norms(channels):
    layers = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels, affine=False), nn.ReLU()
    return nn.Sequential(nn.Conv2d(3, 6, 3), *layers).to("meta")


@pytest.mark.parametrize("training", [False, True])
def test_sizes_are_those_of_real_batch_norms(training):
    network, images = norms(6).train(training), torch.empty(2, 3, 8, 8, device="meta")

    with SizesOnly():
        found = network(images)

    assert found.is_meta and found.shape == network(images).shape == (2, 6, 6, 6)


def test_a_batch_norm_of_another_width_is_refused():
    with (
        SizesOnly(),
        pytest.raises(RuntimeError, match="a batch norm of 8 channels reads 6"),
    ):
        norms(8)(torch.empty(2, 3, 8, 8, device="meta"))

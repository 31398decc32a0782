import pytest
import torch
from torch import nn

from benchmarks.networks import digits_resnet
from hardware.graph.channel_map import ChannelMap
from pipeline.errors import SurgeryError
from pipeline.surgery.mask import masked
from tests.pipeline.maps import cut, group, resnet_map


def test_a_unit_is_silenced_where_it_is_read():
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Sigmoid(), nn.Conv2d(3, 1, 1, bias=False))
    with torch.no_grad():
        net[0].weight.zero_(), net[0].bias.zero_()  # every channel is sigmoid(0) = 0.5
        net[2].weight.copy_(torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1, 1))
    channels = ChannelMap(groups=(group(3, ["0"], inputs=["2"]),))
    x = torch.zeros(1, 1, 1, 1)

    with masked(net, channels, {"0.weight": (0, 2)}):
        silenced = net(x).item()

    assert (net(x).item(), silenced) == (55.5, 50.5)


def test_every_bit_is_restored_also_after_an_error():
    net = digits_resnet(width=4)
    channels = resnet_map(net)
    keep = {channels.groups[0].name: (), channels.groups[1].name: (1, 2), "conv1.weight": (0, 3)}
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}

    def fail():
        with masked(net, channels, keep):
            assert not net.layer1[0].conv2.weight.any()
            assert not net.layer1[1].conv2.weight[:, 0].any()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()

    assert all(torch.equal(before[n], tensor) for n, tensor in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_an_emptied_branch_adds_nothing_and_a_whole_group_costs_nothing():
    net = digits_resnet(width=4).eval()
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    channels = resnet_map(net)
    block, x = net.layer1[1], torch.rand(2, 4, 8, 8)

    with masked(net, channels, {"layer1.1.conv1.weight": (), "conv1.weight": (0, 1, 2, 3)}):
        assert torch.equal(block(x), x)


def test_gradients_reach_a_masked_network():
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Conv2d(3, 1, 1))
    channels = ChannelMap(groups=(group(3, ["0"], inputs=["1"]),))

    with masked(net, channels, {"0.weight": (0,)}):
        net(torch.ones(1, 1, 2, 2)).sum().backward()

    assert net[0].weight.grad[1:].abs().sum() == 0 and net[0].weight.grad[0].abs().sum() > 0


def test_a_map_of_another_network_is_refused_and_nothing_changes():
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Conv2d(3, 1, 1))
    wrong = ChannelMap(groups=(group(3, ["0"], inputs=["1"], others=[cut("9.w", "input", 3)]),))
    before = net[1].weight.clone()

    with pytest.raises(SurgeryError, match=r"names '9.w', which this network does not have"):
        masked(net, wrong, {"0.weight": (0,)}).__enter__()

    assert torch.equal(net[1].weight, before)

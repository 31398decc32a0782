import pytest
import torch

from benchmarks.networks import digits_resnet
from hardware.graph.channel_map import ChannelMap
from pipeline.errors import SurgeryError
from pipeline.surgery.mask import masked
from pipeline.surgery.proof import prove
from pipeline.surgery.remove import failing, prune
from tests.pipeline.maps import (
    Chain,
    chain,
    largest_difference,
    network_of,
    random_keep,
    resnet_map,
)

EXACT = 1e-11  # float64, some twenty layers


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small that a second thread only waits
    yield
    torch.set_num_threads(threads)


def test_pruning_a_silent_channel_keeps_the_output():
    network, channels = chain()
    with torch.no_grad():
        network.module.conv2.weight[:, 2].zero_()
    x = network.example(2)

    smaller = prune(network, channels, {"conv1.weight": (0, 1, 3, 4, 5)})

    assert smaller.module.conv1.out_channels == 5 and type(smaller.module) is Chain
    assert network.module.conv1.out_channels == 6
    torch.testing.assert_close(smaller.module(x), network.module(x))


def test_an_emptied_branch_leaves_its_shortcut_alone():
    network = network_of(digits_resnet(width=8), 1, 16, 16)
    channels = resnet_map(network.module)
    x = torch.rand(2, 8, 5, 5)

    smaller = prune(network, channels, {"layer1.1.conv1.weight": ()})

    assert torch.equal(smaller.module.layer1[1](x), x)
    assert not list(smaller.module.layer1[1].parameters())


def test_a_second_round_narrows_what_joins_emptied_branches():
    network = network_of(digits_resnet(width=8), 1, 16, 16)
    channels = resnet_map(network.module)
    once = prune(network, channels, {"layer1.1.conv1.weight": (), "layer3.1.conv1.weight": ()})
    gone = {
        f"layer{i}.1.{n}.{part}"
        for i in (1, 3)
        for n in ("conv1", "conv2", "bn1", "bn2")
        for part in ("weight", "bias", "running_mean", "running_var")
    }
    groups = tuple(
        g.model_copy(update={"slices": tuple(s for s in g.slices if s.parameter not in gone)})
        for g in channels.groups
        if g.name not in gone
    )
    later = ChannelMap(groups=groups)
    keep = {"conv1.weight": (0, 3, 5), "layer3.0.shortcut.0.weight": (1, 2, 7, 30)}

    twice = prune(once, later, keep)

    assert prove(once, later, keep) < EXACT
    assert twice.module.layer1[1].conv2.rule.channels == 3
    assert twice.module.layer3[1].conv2.rule.channels == 4


def test_gradients_reach_every_parameter_of_a_pruned_network():
    network = network_of(digits_resnet(width=8), 1, 16, 16)
    channels = resnet_map(network.module)
    smaller = prune(network, channels, random_keep(channels, 0, emptied=2)).module.train()

    smaller(torch.randn(4, 1, 16, 16)).square().sum().backward()

    assert all(p.grad is not None and p.grad.shape == p.shape for p in smaller.parameters())


def test_a_pruned_network_computes_what_the_masked_one_does_on_its_own_weights():
    network, channels = chain()
    keep = {"conv1.weight": (1, 4), "conv2.weight": (0, 2, 5)}
    smaller, x = prune(network, channels, keep), network.example(3)

    with masked(network.module, channels, keep):
        difference = largest_difference(smaller.module, network.module, x)

    assert difference < 1e-5
    assert largest_difference(smaller.module, network.module, x) > 1e-3


def test_what_failed_is_not_tried_twice():
    tried = []

    def fails(names):
        tried.append("".join(names))
        return "no" if "d" in names else None

    assert failing("abcd", fails) == {"d": "no"}
    assert tried == ["abcd", "ab", "abc"]


def test_a_forward_that_cannot_run_at_the_new_width_names_the_layer():
    network, channels = chain()
    missing = tuple(
        g.model_copy(update={"slices": tuple(s for s in g.slices if s.role != "input")})
        for g in channels.groups
    )

    with pytest.raises(SurgeryError, match=r"conv2 \(Conv2d\) refuses its input \(1, 2, 8, 8\)"):
        prune(network, ChannelMap(groups=missing), {"conv1.weight": (0, 1)})

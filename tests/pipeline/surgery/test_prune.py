import copy

import pytest
import torch
from torch import nn

from benchmarks.networks import digits_resnet
from hardware.graph.channel_map import Branch, ChannelMap
from pipeline.errors import ProofError, SurgeryError
from pipeline.surgery.empty import Zeros
from pipeline.surgery.mask import masked
from pipeline.surgery.proof import outputs_of
from pipeline.surgery.prune import examine, fit_to_class, prove, prune
from pipeline.surgery.remove import failing
from tests.pipeline.maps import (
    cut,
    group,
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


class Chain(nn.Module):
    def __init__(self, fixed=None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)
        self.fixed = fixed

    def forward(self, x):
        x = torch.sigmoid(self.bn1(self.conv1(x)))
        x = torch.sigmoid(self.bn2(self.conv2(x)))
        if self.fixed == "second":
            x = x.view(x.shape[0], 8, 8, 8)
        if self.fixed == "together" and x.shape[1] < 8 and self.conv1.out_channels < 6:
            raise ValueError("either may shrink, not both")
        if self.fixed == "not on meta":
            x = x * float(x.sum() * 0 + 1)
        return self.head(x.mean((2, 3)))


def chain(fixed=None):
    others = [cut("conv1.bias", "bias", 6)]
    second = [cut("conv2.bias", "bias", 8)]
    groups = (
        group(6, ["conv1"], ["bn1"], ["conv2"], others),
        group(8, ["conv2"], ["bn2"], ["head"], second),
    )
    return network_of(Chain(fixed), 3, 8, 8), ChannelMap(groups=groups)


def test_pruning_a_silent_channel_keeps_the_output():
    network, channels = chain()
    with torch.no_grad():
        network.module.conv2.weight[:, 2].zero_()
    x = network.example(2)

    smaller = prune(network, channels, {"conv1.weight": (0, 1, 3, 4, 5)})

    assert smaller.module.conv1.out_channels == 5 and type(smaller.module) is Chain
    assert network.module.conv1.out_channels == 6
    torch.testing.assert_close(smaller.module(x), network.module(x))


@pytest.mark.parametrize("emptied", [0, 1, 3, 6])
def test_removed_is_masked_in_a_residual_network(emptied):
    network = network_of(digits_resnet(width=8), 1, 16, 16)
    channels = resnet_map(network.module)
    keep = random_keep(channels, seed=emptied, emptied=emptied)

    proof = examine(network, channels, keep)

    assert proof.error < EXACT
    assert proof.structure_only == ()
    zeros = [m for m in prune(network, channels, keep).module.modules() if isinstance(m, Zeros)]
    assert len(zeros) == 4 * emptied


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


def test_a_wrong_map_fails_the_proof_and_the_guilty_group_is_named():
    network, channels = chain()
    right, second = channels.groups
    shuffled = tuple(
        s.model_copy(update={"units": (1, 0, *range(2, 8))}) if s.role == "input" else s
        for s in second.slices
    )
    wrong = ChannelMap(groups=(right, second.model_copy(update={"slices": shuffled})))

    assert prove(network, channels, {"conv1.weight": (0, 2), "conv2.weight": (0, 2)}) < EXACT
    with pytest.raises(ProofError, match=r"not the same.*Guilty: conv2.weight\."):
        prove(network, wrong, {"conv1.weight": (0, 2), "conv2.weight": (0, 2)})


def test_a_proof_that_says_nothing_is_refused():
    network, channels = chain()
    unread = tuple(
        g.model_copy(update={"slices": tuple(s for s in g.slices if s.role == "norm")})
        for g in channels.groups
    )
    module = copy.deepcopy(network.module)
    module.head = nn.Identity()
    module.forward = lambda x: x.flatten(1) * 0

    with pytest.raises(SurgeryError):
        prove(network, ChannelMap(groups=unread), {"conv1.weight": (0,)})
    with pytest.raises(ProofError, match="says nothing: the largest output"):
        prove(network_of(module, 3, 8, 8), channels, {"conv1.weight": (0,)})


def test_channels_that_nothing_reads_make_no_proof():
    class Unread(Chain):
        def forward(self, x):
            self.conv2(self.conv1(x))
            return x.mean((2, 3))

    network = network_of(Unread(), 3, 8, 8)
    _, channels = chain()

    with pytest.raises(ProofError, match=r"silencing conv1.weight changes no output"):
        prove(network, channels, {"conv1.weight": (0,)})


def test_groups_that_a_norm_mixes_are_compared_by_shape_and_said_so():
    class Mixed(Chain):
        def __init__(self):
            super().__init__()
            self.bn2 = nn.GroupNorm(1, 8)

    norm = [cut(f"bn2.{part}", "norm", 8) for part in ("weight", "bias")]
    _, channels = chain()
    mixed = group(
        8, ["conv2"], [], ["head"], [*norm, cut("conv2.bias", "bias", 8)], mixes="GroupNorm"
    )
    channels = ChannelMap(groups=(channels.groups[0], mixed))
    network = network_of(Mixed(), 3, 8, 8)

    proof = examine(network, channels, {"conv1.weight": (0, 2), "conv2.weight": (0, 2)})

    assert proof.exact == ("conv1.weight",) and proof.structure_only == ("conv2.weight",)
    assert proof.error < EXACT


def test_a_network_that_is_not_pruned_needs_no_proof():
    network, channels = chain()

    assert prove(network, channels, {"conv1.weight": tuple(range(6))}) == 0


def test_a_class_that_shrinks_everywhere_keeps_all_groups():
    network, channels = chain()

    assert fit_to_class(network, channels) == channels


def test_a_size_in_forward_freezes_its_group_with_the_reason():
    network, channels = chain("second")

    fitted = fit_to_class(network, channels)

    assert fitted.group("conv1.weight").frozen is None
    assert "the class's forward fixes this size: " in fitted.group("conv2.weight").frozen
    assert "shape '[1, 8, 8, 8]' is invalid" in fitted.group("conv2.weight").frozen


@pytest.mark.parametrize("fixed", ["together", "not on meta"])
def test_groups_that_fail_jointly_are_found_also_where_meta_does_not_run(fixed):
    network, channels = chain(fixed)

    frozen = [g.name for g in fit_to_class(network, channels).groups if g.frozen]

    assert frozen == (["conv2.weight"] if fixed == "together" else [])


def test_what_failed_is_not_tried_twice():
    tried = []

    def fails(names):
        tried.append("".join(names))
        return "no" if "d" in names else None

    assert failing("abcd", fails) == {"d": "no"}
    assert tried == ["abcd", "ab", "abc"]


def test_a_branch_that_the_class_cannot_empty_is_dropped():
    class Nosy(nn.Module):
        """Looks at the weight of its second branch's convolution."""

        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)) for _ in "ab")

        def forward(self, x):
            x = x + self.a(x)
            return (x + self.b(x)).to(self.b[0].weight.dtype)

    groups = tuple(
        group(4, [f"{n}.0"], [], [f"{n}.1"], [cut(f"{n}.0.bias", "bias", 4)]) for n in "ab"
    )
    branches = tuple(
        Branch(
            name=n,
            groups=(f"{n}.0.weight",),
            layers=(),
            join="",
            parameters=tuple(f"{n}.{i}.{part}" for i in (0, 1) for part in ("weight", "bias")),
        )
        for n in "ab"
    )
    network = network_of(Nosy(), 3, 8, 8)

    fitted = fit_to_class(network, ChannelMap(groups=groups, branches=branches))

    assert [branch.name for branch in fitted.branches] == ["a"]
    assert fitted.prunable == groups


def test_a_forward_that_cannot_run_at_the_new_width_names_the_layer():
    network, channels = chain()
    missing = tuple(
        g.model_copy(update={"slices": tuple(s for s in g.slices if s.role != "input")})
        for g in channels.groups
    )

    with pytest.raises(SurgeryError, match=r"conv2 \(Conv2d\) refuses its input \(1, 2, 8, 8\)"):
        prune(network, ChannelMap(groups=missing), {"conv1.weight": (0, 1)})


def test_outputs_are_found_in_nested_results():
    a, b, c = torch.zeros(1), torch.ones(1), torch.ones(2)

    assert outputs_of({"x": a, "y": (b, [c, None])}) == (a, b, c)

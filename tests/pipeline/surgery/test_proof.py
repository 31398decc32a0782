import copy

import pytest
import torch
from torch import nn

from benchmarks.networks import cifar_resnet, digits_resnet
from hardware.graph.channel_map import ChannelMap
from pipeline.errors import ProofError, SurgeryError
from pipeline.surgery.empty import Zeros
from pipeline.surgery.proof import examine, outputs_of, prove, randomised
from pipeline.surgery.remove import prune
from tests.pipeline.maps import Chain, chain, cut, group, network_of, random_keep, resnet_map

EXACT = 1e-11  # float64, some twenty layers


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small that a second thread only waits
    yield
    torch.set_num_threads(threads)


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


def test_outputs_are_found_in_nested_results():
    a, b, c = torch.zeros(1), torch.ones(1), torch.ones(2)

    assert outputs_of({"x": a, "y": (b, [c, None])}) == (a, b, c)


# Random weights


def test_activations_keep_their_size_through_a_deep_network():
    network = network_of(cifar_resnet(56), 3, 8, 8)

    with torch.no_grad():
        output = randomised(network)(network.example(2).double())

    assert 1e-3 < float(output.abs().max()) < 1e3
    assert float((output[0] - output[1]).abs().max()) > 1e-3


class Experts(nn.Module):
    """A convolution whose kernel is a mixture, as each image wants it: of one parameter."""

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.zeros(2, width * width * 9))

    def forward(self, x):
        mixture = x.mean((1, 2, 3)).sigmoid()[:, None] * self.weight[0] + self.weight[1]
        kernels = mixture.view(-1, self.width, 3, 3)
        y = nn.functional.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels, None, 1, 1, 1, len(x))
        return y.reshape(x.shape)


def test_activations_keep_their_size_behind_computed_weights():
    blocks = [nn.Sequential(Experts(8), nn.BatchNorm2d(8), nn.SiLU()) for _ in range(60)]
    network = network_of(nn.Sequential(*blocks), 8, 8, 8)

    with torch.no_grad():
        output = randomised(network)(network.example(2).double())

    assert 1e-2 < float(output.std()) < 1e2


def test_every_parameter_and_statistic_is_drawn_and_the_network_stays_as_it_is():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4))
    network = network_of(module, 3, 8, 8)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    drawn = randomised(network, seed=1).state_dict()

    for name, tensor in before.items():
        assert torch.equal(module.state_dict()[name], tensor)
        if tensor.is_floating_point():
            assert drawn[name].dtype == torch.float64
            assert len(drawn[name].unique()) == tensor.numel()
    assert bool((drawn["1.running_var"] > 0).all())
    assert drawn["1.num_batches_tracked"] == before["1.num_batches_tracked"]


def test_the_seed_decides():
    network = network_of(nn.Sequential(nn.Conv2d(3, 4, 3)), 3, 8, 8)
    one, same, other = (randomised(network, seed)[0].weight for seed in (0, 0, 1))

    assert torch.equal(one, same) and not torch.equal(one, other)

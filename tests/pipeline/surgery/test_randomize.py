import torch
from torch import nn

from benchmarks.networks import cifar_resnet
from pipeline.surgery.randomize import randomised
from tests.pipeline.maps import network_of


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

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.networks import digits_resnet
from hardware.graph.channel_map import ChannelMap, Group
from pipeline.errors import PipelineError
from pipeline.evidence.views import group_views
from pipeline.records import Network
from tests.pipeline.maps import cut, network_of, resnet_map


class Mixed(nn.Module):
    """A unit of `conv` owns one depthwise filter, two norm entries and four columns of `linear`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 2)
        self.depthwise = nn.Conv2d(3, 3, 1, groups=3)
        self.norm = nn.BatchNorm1d(6)
        self.transposed = nn.ConvTranspose2d(3, 2, 1)
        self.linear = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.depthwise(self.conv(x))
        return self.linear(out.flatten(1)) + self.transposed(out).mean()


def mixed() -> tuple[Network, ChannelMap]:
    group = Group(
        name="conv",
        width=3,
        slices=(
            cut("conv.weight", "filter", 3),
            cut("depthwise.weight", "depthwise", 3),
            cut("norm.weight", "norm", (0, 1, 2, 0, 1, 2)),
            cut("norm.bias", "norm", (0, 1, 2, 0, 1, 2)),
            cut("norm.running_mean", "norm", (0, 1, 2, 0, 1, 2)),
            cut("transposed.weight", "input", 3, axis=0),
            cut("linear.weight", "input", [unit for unit in range(3) for _ in range(4)], axis=1),
        ),
    )
    return network_of(Mixed(), 1, 3, 3), ChannelMap(groups=(group,))


def test_every_tensor_has_the_unit_first() -> None:
    network, channels = mixed()
    module = network.module

    [view] = group_views(network, channels)

    assert [tuple(f.shape) for f in view.filters] == [(3, 4), (3, 1)]
    torch.testing.assert_close(view.filters[0][1], module.conv.weight[1].flatten())
    transposed, linear = view.consumers
    torch.testing.assert_close(transposed, module.transposed.weight.flatten(1))
    # linear.weight is (2, 12); unit 1 owns columns 4 to 7.
    torch.testing.assert_close(linear[1], module.linear.weight[:, 4:8].T.flatten())
    assert view.filter_gradients == ()


def test_a_norm_of_two_positions_per_unit_gives_two_tensors() -> None:
    network, channels = mixed()
    with torch.no_grad():
        network.module.norm.weight.copy_(torch.arange(6.0))

    [view] = group_views(network, channels)

    assert [scale.tolist() for scale in view.norm_scales] == [[0, 1, 2], [3, 4, 5]]
    assert len(view.norm_shifts) == 2


def test_positions_that_belong_to_no_unit_are_left_out_and_uneven_ones_padded() -> None:
    network, _ = mixed()
    units = (1, -1, -1, 1, 0, 0, 0, 0, -1, -1, 2, -1)
    group = Group(
        name="conv",
        width=3,
        slices=(cut("conv.weight", "filter", 3), cut("linear.weight", "input", units, axis=1)),
    )

    [view] = group_views(network, ChannelMap(groups=(group,)))

    weight, [columns] = network.module.linear.weight.detach(), view.consumers
    torch.testing.assert_close(columns[0], weight[:, 4:8].T.flatten())
    torch.testing.assert_close(columns[1], functional.pad(weight[:, [0, 3]].T.flatten(), (0, 4)))
    torch.testing.assert_close(columns[2], functional.pad(weight[:, 10].flatten(), (0, 6)))


def test_gradients_are_those_of_the_mean_cross_entropy_in_eval_mode() -> None:
    torch.manual_seed(0)
    network = network_of(digits_resnet(width=4, blocks=1), 1, 8, 8)
    module, channels = network.module, resnet_map(network.module)
    batches = [(torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2])) for _ in range(2)]

    views = {view.name: view for view in group_views(network, channels, batches)}

    for number, (images, labels) in enumerate(batches):
        functional.cross_entropy(module.eval()(images), labels).backward()
        expected = module.layer1[0].conv1.weight.grad.flatten(1)
        found = views["layer1.0.conv1.weight"].filter_gradients[0][number]
        torch.testing.assert_close(found, expected)
        scale = views["layer1.0.conv1.weight"].norm_scale_gradients[0][number]
        torch.testing.assert_close(scale, module.layer1[0].bn1.weight.grad)
        module.zero_grad()


def test_the_network_is_left_as_it_was_also_after_an_error() -> None:
    network = network_of(digits_resnet(width=4, blocks=1), 1, 8, 8)
    module, channels = network.module, resnet_map(network.module)
    module.train()
    module.bn1.eval()
    module.conv1.weight.requires_grad_(False)
    module.linear.weight.grad = torch.ones_like(module.linear.weight)
    modes = [part.training for part in module.modules()]
    good = (torch.randn(2, 1, 8, 8), torch.tensor([0, 1]))

    group_views(network, channels, [good])
    with pytest.raises(PipelineError, match="loss on calibration images is nan"):
        group_views(network, channels, [good, (torch.full((2, 1, 8, 8), torch.nan), good[1])])

    assert [part.training for part in module.modules()] == modes
    assert not module.conv1.weight.requires_grad and module.layer1[0].conv1.weight.requires_grad
    assert module.conv1.weight.grad is None
    assert torch.equal(module.linear.weight.grad, torch.ones_like(module.linear.weight))


def test_frozen_groups_have_no_view() -> None:
    network, channels = mixed()
    frozen = channels.groups[0].model_copy(update={"frozen": "network output"})

    assert group_views(network, ChannelMap(groups=(frozen,))) == ()


def test_a_map_of_another_network_is_refused() -> None:
    _, channels = mixed()
    other = network_of(nn.Sequential(nn.Conv2d(1, 2, 3)), 1, 8, 8)
    wider = network_of(Mixed(), 1, 3, 3)
    wider.module.conv = nn.Conv2d(1, 5, 2)

    with pytest.raises(PipelineError, match="the network has none of them"):
        group_views(other, channels)
    with pytest.raises(PipelineError, match=r"conv.weight has shape \(5, 1, 2, 2\).* 3 positions"):
        group_views(wider, channels)

import pytest
import torch
from torch import nn

from pipeline.errors import DataError
from pipeline.evidence.recalibrate import following, observing, recalibrate, recalibrate_module
from pipeline.records import Network


def norm_network() -> Network:
    module = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(2, momentum=0.3), nn.InstanceNorm2d(2))
    module[1].running_mean.fill_(7)
    module[1].running_var.fill_(7)
    return Network(module=module, spec="tests:norm", arguments={}, input_shape=(2, 3, 3))


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 6, 2, 3, 3, generator=generator)
    return [(batch, torch.zeros(6, dtype=torch.int64)) for batch in images]


def test_statistics_become_the_mean_over_the_batches() -> None:
    seen = batches(5)

    norm = recalibrate(norm_network(), seen).module[1]

    mean = torch.stack([images.mean((0, 2, 3)) for images, _ in seen]).mean(0)
    variance = torch.stack([images.var((0, 2, 3)) for images, _ in seen]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)


def test_recalibrating_leaves_the_network_itself_alone() -> None:
    network = norm_network()
    network.module.train()

    copy = recalibrate(network, batches(2))

    assert network.module[1].running_mean.tolist() == [7, 7]
    assert network.module.training and not copy.module.training
    assert copy.module[1].momentum == 0.3


def test_no_images_to_recalibrate_on_are_an_error() -> None:
    with pytest.raises(DataError, match="no images to take batch-norm statistics from"):
        recalibrate(norm_network(), [])


def test_statistics_follow_what_a_change_does_to_the_input_of_a_norm() -> None:
    images = torch.randn(32, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)).eval()
    net[1].running_mean.copy_(torch.tensor([1.0, 2, 3]))
    before = net[1].running_mean.clone()
    with torch.no_grad(), observing(net) as seen:
        full = net(images)
    with torch.no_grad(), following(net, seen):
        same = net(images)
        net[0].weight.mul_(2)  # twice as wide
        net[0].bias.mul_(2).add_(5)  # and moved: by the former mean too
        net(images)
        moved, spread = net[1].running_mean.clone(), net[1].running_var.clone()

    torch.testing.assert_close(same, full)
    torch.testing.assert_close(moved, before + seen["1"].mean + 5)
    ratio = (4 * seen["1"].variance + 1e-5) / (seen["1"].variance + 1e-5)
    torch.testing.assert_close(spread, (1 + 1e-5) * ratio - 1e-5, rtol=1e-4, atol=0)
    assert net[1].running_mean.equal(before) and net[1].running_var.equal(torch.ones(3))


def test_a_norm_that_runs_twice_keeps_its_statistics() -> None:
    norm = nn.BatchNorm2d(2).eval()
    net = nn.Sequential(norm, norm, nn.BatchNorm2d(2).eval()).eval()

    with observing(net) as seen:
        net(torch.randn(4, 2, 3, 3))
        net(torch.randn(4, 2, 3, 3))

    assert list(seen) == ["2"]


def test_following_gives_what_recalibrating_gives() -> None:
    torch.manual_seed(0)
    images = torch.randn(64, 2, 7, 7)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)
    )
    batch = [(images, torch.zeros(64, dtype=torch.int64))]
    recalibrate_module(net, batch)
    net.eval()
    with torch.no_grad(), observing(net) as seen:
        net(images)
    with torch.no_grad():
        net[0].weight[:2] = 0
        with following(net, seen):
            followed = net(images)
        recalibrate_module(net, batch)
        anew = net(images)

    torch.testing.assert_close(followed, anew, atol=1e-3, rtol=1e-3)

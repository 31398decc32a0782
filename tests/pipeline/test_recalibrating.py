import pytest
import torch
from torch import nn

from pipeline.errors import DataError
from pipeline.recalibrating import recalibrate
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

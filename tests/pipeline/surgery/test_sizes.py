import pytest
import torch
from torch import nn

from pipeline.surgery.sizes import SizesOnly


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

import pytest
import torch
from torch import nn

from pipeline.processor import laid_out, memory_format

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Conv2d(4, 8, 1, stride=2), torch.contiguous_format),
        (nn.Conv2d(32, 8, 1, stride=2, groups=4), torch.contiguous_format),
        (nn.Conv2d(16, 8, 1, stride=2), torch.channels_last),
        (nn.Conv2d(4, 8, 1), torch.channels_last),
        (nn.Conv2d(4, 8, 3, stride=2), torch.channels_last),
    ],
)
def test_only_strided_convolutions_of_few_channels_forbid_channels_last(layer, expected):
    assert memory_format(nn.Sequential(layer), CPU) is expected
    assert memory_format(nn.Sequential(layer), torch.device("cuda")) is torch.channels_last


def test_gradients_of_a_narrow_strided_convolution_are_right_in_the_layout_that_is_chosen():
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, 1, stride=2, bias=False)
    layout = memory_format(layer, CPU)
    images = torch.randn(64, 4, 16, 16).contiguous(memory_format=torch.channels_last)

    layer.to(memory_format=layout)(laid_out(images, layout)).sum().backward()

    # Every output is summed once: the gradient of a weight is the sum of what it reads.
    expected = images[:, :, ::2, ::2].sum(dim=(0, 2, 3)).expand(8, 4)
    torch.testing.assert_close(layer.weight.grad[:, :, 0, 0], expected, rtol=1e-4, atol=1e-3)


def test_a_network_of_grey_images_stays_in_the_layout_that_is_chosen():
    grey = torch.rand(2, 4, 4, 1).permute(0, 3, 1, 2)

    for layout in (torch.contiguous_format, torch.channels_last):
        layer = nn.Conv2d(1, 3, 3).to(memory_format=layout)
        assert layer(laid_out(grey, layout)).is_contiguous(memory_format=layout)

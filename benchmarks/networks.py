"""The networks of the benchmarks and of the demo: CIFAR ResNets and a small one for digits."""

from collections.abc import Callable

import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them.

    Args:
        inputs: channels of the input.
        width: channels of the output.
        stride: of the first convolution and of the shortcut.
        shortcut: makes the module of a shortcut that changes the shape.
    """

    def __init__(
        self, inputs: int, width: int, stride: int, shortcut: Callable[[int, int, int], nn.Module]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        is_plain = stride == 1 and inputs == width
        self.shortcut = nn.Identity() if is_plain else shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(residual branch + shortcut)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class PaddedShortcut(nn.Module):
    """Every second pixel, and zero channels on both sides: a shortcut without parameters.

    Reference:
        He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385,
        sec. 4.2, option A.
    """

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (width - inputs) // 2
        self.after = width - inputs - self.before

    def forward(self, x: Tensor) -> Tensor:
        """Return the subsampled input between zero channels."""
        # The zeros stand for channels of the block that the shortcut does not reach. They are
        # counted, not measured: a narrower input keeps them all.
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


def projected_shortcut(inputs: int, width: int, stride: int) -> nn.Module:
    """Return a 1x1 convolution with batch norm (option B of the same paper)."""
    return nn.Sequential(
        nn.Conv2d(inputs, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
    )


class ResNet(nn.Module):
    """A stem, three stages of basic blocks, global average pooling and a linear layer."""

    def __init__(
        self,
        channels: int,
        widths: tuple[int, int, int],
        blocks: int,
        classes: int,
        shortcut: Callable[[int, int, int], nn.Module],
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = self._stage(widths[0], widths[0], blocks, 1, shortcut)
        self.layer2 = self._stage(widths[0], widths[1], blocks, 2, shortcut)
        self.layer3 = self._stage(widths[1], widths[2], blocks, 2, shortcut)
        self.linear = nn.Linear(widths[2], classes)

    @staticmethod
    def _stage(
        inputs: int,
        width: int,
        blocks: int,
        stride: int,
        shortcut: Callable[[int, int, int], nn.Module],
    ) -> nn.Sequential:
        first = BasicBlock(inputs, width, stride, shortcut)
        return nn.Sequential(
            first, *(BasicBlock(width, width, 1, shortcut) for _ in range(blocks - 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(batch, classes)`."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(out.mean(dim=(2, 3)))
        return logits


def cifar_resnet(depth: int, classes: int = 10) -> ResNet:
    """Return the CIFAR ResNet of that depth (20, 32, 44, 56, 110) for 3x32x32 images.

    Raises:
        ValueError: no such depth: it is 6n + 2.

    Reference:
        He et al., arXiv:1512.03385, sec. 4.2.
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"depth is 6n + 2 (20, 32, 44, 56, 110), not {depth}")
    return ResNet(3, (16, 32, 64), (depth - 2) // 6, classes, PaddedShortcut)


def digits_resnet(width: int = 16, blocks: int = 2, classes: int = 10) -> ResNet:
    """Return a small residual network for 1x32x32 digits; `width` is that of its first stage."""
    return ResNet(1, (width, 2 * width, 4 * width), blocks, classes, projected_shortcut)

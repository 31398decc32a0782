"""Tiny networks, one per way in which channels are coupled, with the groups they must have.

Every network takes an input of shape (1, 3, 16, 16). `NETS` builds them by name; `WIDTHS` says
which groups each must have and how many units; what is not named there must not be prunable.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that torch's readers know

INPUT_SHAPE = (3, 16, 16)


class Chain(nn.Module):
    """Convolutions one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.leaky_relu(self.conv2(x))
        return self.fc(x.mean((2, 3)))


class Residual(nn.Module):
    """Two basic blocks, the second with a convolution in its shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv1 = nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.conv3 = nn.Conv2d(6, 5, 3, padding=1, stride=2)
        self.conv4 = nn.Conv2d(5, 8, 3, padding=1)
        self.short = nn.Conv2d(6, 8, 1, stride=2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        x = F.relu(self.short(x) + self.conv4(F.relu(self.conv3(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class PaddedShortcut(nn.Module):
    """A shortcut that takes every second pixel and pads channels with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv1 = nn.Conv2d(4, 8, 3, padding=1, stride=2)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        x = F.relu(short + self.conv2(F.relu(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class Dense(nn.Module):
    """Every layer reads all layers before it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 5, 3, padding=1)
        self.conv3 = nn.Conv2d(9, 6, 1)
        self.fc = nn.Linear(15, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.conv1(x))
        b = self.conv2(F.relu(self.bn(a)))
        c = self.conv3(F.silu(torch.cat([a, b], 1)))
        return self.fc(torch.cat([a, b, c], 1).amax((2, 3)))


class Inverted(nn.Module):
    """Expand, depthwise, squeeze and excite, project: with a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, stride=2)
        self.expand = nn.Conv2d(4, 12, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.squeeze = nn.Conv2d(12, 3, 1)
        self.excite = nn.Conv2d(3, 12, 1)
        self.project = nn.Conv2d(12, 4, 1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.relu6(self.bn1(self.expand(x)))
        y = F.hardswish(self.bn2(self.depthwise(y)))
        gate = self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True))))
        x = x + self.project(y * gate.sigmoid())
        return self.fc(x.mean((2, 3)))


class Multiplied(nn.Module):
    """A depthwise convolution that makes two channels of each, and a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.conv2 = nn.Conv2d(12, 4, 1)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2, groups=4)
        self.conv3 = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.depthwise(F.relu(self.conv1(x))))
        return self.conv3(F.relu(self.up(F.relu(self.conv2(x)))))


class Grouped(nn.Module):
    """A grouped convolution of few large groups: every group loses the same positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(12, 8, 3, padding=1, groups=2)
        self.conv3 = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))


class ManyGroups(nn.Module):
    """A grouped convolution of many small groups: whole groups go."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, groups=8)
        self.bn2 = nn.BatchNorm2d(16)
        self.conv3 = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(F.relu(self.bn2(self.conv2(F.relu(self.conv1(x))))))


class Shuffle(nn.Module):
    """Two branches side by side, channels shuffled among them."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 6, 3, padding=1)
        self.right = nn.Conv2d(3, 6, 1)
        self.conv1 = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x), self.right(x)], 1).relu()
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2)
        return self.conv1(x.reshape(batch, channels, height, width))


class Split(nn.Module):
    """Half of the channels pass, the other half is convolved; a slice, and a shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.conv3 = nn.Conv2d(10, 4, 1)
        self.conv4 = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.conv1(x).chunk(2, 1)
        x = self.conv3(torch.cat([left, self.conv2(right).relu()], 1))
        return self.conv4(x[:, 1:].tanh())


class Hierarchy(nn.Module):
    """Res2Net's chain: every piece of the channels goes through what the last one made."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.conv3 = nn.Conv2d(4, 4, 3, padding=1)
        self.conv4 = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = torch.split(self.conv1(x).relu(), 4, 1)
        b = self.conv2(b)
        c = self.conv3(b + c)
        return self.conv4(torch.cat([b, c, a], 1))


class Upsampled(nn.Module):
    """A small U-Net: transposed convolution, resize, pixel shuffle, skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1, stride=2)
        self.up = nn.ConvTranspose2d(6, 5, 2, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(5)
        self.conv3 = nn.Conv2d(9, 16, 3, padding=1)
        self.conv4 = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.conv1(x).relu()
        b = self.bn(self.up(self.conv2(a).relu())).relu()
        c = F.pixel_shuffle(self.conv3(torch.cat([a, b], 1)), 2)
        return self.conv4(F.interpolate(c, scale_factor=2.0, mode="nearest"))


class Flattened(nn.Module):
    """The classifier reads every pixel of every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, stride=4)
        self.fc1 = nn.Linear(64, 6)
        self.act = nn.PReLU(6)
        self.fc2 = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(torch.flatten(self.conv1(x).relu(), 1))))


class GroupNormed(nn.Module):
    """Whole groups of a group norm can go; an instance norm keeps channels apart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.norm1 = nn.GroupNorm(8, 16)
        self.conv2 = nn.Conv2d(16, 6, 3, padding=1)
        self.norm2 = nn.InstanceNorm2d(6, affine=True)
        self.conv3 = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        return self.conv3(self.norm2(self.conv2(x)).relu())


class LayerNormed(nn.Module):
    """ConvNeXt's block: a layer norm over channels, linear layers over pixels, a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 4, stride=4)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm = nn.LayerNorm(6)
        self.fc1 = nn.Linear(6, 10)
        self.fc2 = nn.Linear(10, 6)
        self.gamma = nn.Parameter(torch.ones(6))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.fc2(F.gelu(self.fc1(y))) * self.gamma
        x = x + y.permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


class SplitAttention(nn.Module):
    """ResNeSt's block: a softmax over two branches weighs them channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.fc1 = nn.Conv2d(6, 4, 1)
        self.fc2 = nn.Conv2d(4, 12, 1)
        self.conv2 = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).relu()
        batch, channels, height, width = x.shape
        x = x.reshape(batch, 2, channels // 2, height, width)
        gap = x.sum(1).mean((2, 3), keepdim=True)
        weight = self.fc2(self.fc1(gap).relu()).view(batch, 2, channels // 2).softmax(1)
        return self.conv2((x * weight.view(batch, 2, channels // 2, 1, 1)).sum(1))


class Standardised(nn.Module):
    """A convolution whose weight is standardised while the network runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(8, 1, 1, 1))
        self.conv3 = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).relu()
        weight = self.conv2.weight
        mean = weight.mean((1, 2, 3), keepdim=True)
        scale = self.gain / (weight - mean).square().mean((1, 2, 3), keepdim=True).sqrt()
        return self.conv3(F.conv2d(x, (weight - mean) * scale, self.conv2.bias).relu())


class Tied(nn.Module):
    """One convolution used twice: what it reads and what it makes is the same group."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(self.conv(self.conv(x).relu()))


class TwoHeads(nn.Module):
    """Two outputs, one of them an inner value, which therefore stays."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv2(self.conv1(x).relu())
        return self.head(x.relu()), x


NETS: dict[str, Callable[[], nn.Module]] = {
    "chain": Chain,
    "residual": Residual,
    "padded_shortcut": PaddedShortcut,
    "dense": Dense,
    "inverted": Inverted,
    "multiplied": Multiplied,
    "grouped": Grouped,
    "many_groups": ManyGroups,
    "shuffle": Shuffle,
    "split": Split,
    "hierarchy": Hierarchy,
    "upsampled": Upsampled,
    "flattened": Flattened,
    "group_normed": GroupNormed,
    "layer_normed": LayerNormed,
    "split_attention": SplitAttention,
    "standardised": Standardised,
    "tied": Tied,
    "two_heads": TwoHeads,
}

WIDTHS: Mapping[str, Mapping[str, int]] = {
    "chain": {"conv1": 6, "conv2": 8},
    "residual": {"stem": 6, "conv1": 4, "conv3": 5, "short": 8},
    # The stem's 4 channels are the middle of 8: the 2 before and the 2 behind are a group too.
    "padded_shortcut": {"stem": 4, "conv1": 8, "conv2": 4},
    "dense": {"conv1": 4, "conv2": 5, "conv3": 6},
    "inverted": {"stem": 4, "expand": 12, "squeeze": 3},
    "multiplied": {"conv1": 6, "conv2": 4},
    "grouped": {"conv1": 6, "conv2": 4},  # 12 channels in 2 groups, 8 in 2 groups
    "many_groups": {"conv1": 8},  # 8 groups of 2 in and 2 out
    "shuffle": {"left": 6},  # the same positions of both sides
    "split": {"conv1": 4, "conv1#2": 4, "conv2": 6, "conv3": 3},  # conv3's first channel is cut off
    "hierarchy": {"conv1": 4, "conv1#2": 4, "conv1#3": 4, "conv3": 4},
    "upsampled": {"conv1": 4, "conv2": 6, "up": 5, "conv3": 4},  # 16 channels become 4 times 4
    "flattened": {"conv1": 4, "fc1": 6},
    "group_normed": {"conv1": 8, "conv2": 6},  # 8 groups of 2
    "layer_normed": {"stem": 6, "fc1": 10},
    "split_attention": {"conv1": 6, "fc1": 4},
    "standardised": {"conv1": 6, "conv2": 8},
    "tied": {"stem": 6},
    "two_heads": {"conv1": 6},
}

BRANCHES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "residual": {"conv2": ("conv1",), "conv4": ("conv3",)},
    "padded_shortcut": {"conv2": ("conv1",)},
    "inverted": {"project": ("expand", "squeeze")},
    "layer_normed": {"fc2": ("fc1",)},
}


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give a network random weights and norm statistics, so that nothing is hidden by a zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        with torch.no_grad():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
            if "var" in name:
                tensor.abs_().add_(0.5)
    return module


def build(name: str, seed: int = 0) -> nn.Module:
    """Return one of the networks with random weights, in evaluation mode."""
    return randomise(NETS[name](), seed).eval()

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.networks import digits_resnet
from pipeline.evidence.replay import parts_of, record, replay


class InPlace(nn.Module):
    """Changes what its parts give in place, between the parts and inside the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.second = nn.Sequential(nn.Hardswish(inplace=True), nn.Conv2d(4, 4, 3))
        self.third = nn.Conv2d(4, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        early = self.first(x)
        late = self.second(functional.hardswish(early, inplace=True))
        late += 1
        return self.third(late + early[:, :, 1:-1, 1:-1]).mean(dim=(2, 3))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x), x


class Branching(nn.Module):
    """A part that gives a pair, a part that runs twice, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.pair = Pair()
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out, image = self.pair(x * self.scale)
        out = self.twice(self.twice(out).relu()).relu()
        return self.linear(out.mean(dim=(2, 3)) + image.mean())


@pytest.mark.parametrize("make", [InPlace, Branching, lambda: digits_resnet(width=4, blocks=1)])
@torch.no_grad()
def test_replay_gives_what_the_changed_network_gives(make) -> None:
    torch.manual_seed(0)
    module, images = make().eval(), torch.randn(2, 1, 12, 12)
    tape = record(module, images)

    for name, parameter in list(module.named_parameters()):
        former = parameter.clone()
        parameter.mul_(-1.5).add_(0.1)
        torch.testing.assert_close(replay(module, tape, images, [name]), module(images))
        parameter.copy_(former)
    torch.testing.assert_close(replay(module, tape, images, []), module(images))


@torch.no_grad()
def test_parts_before_the_change_are_not_computed() -> None:
    module, images = digits_resnet(width=4, blocks=1).eval(), torch.randn(2, 1, 12, 12)
    tape = record(module, images)
    ran = []
    for name in ("conv1", "layer1.0.conv1", "layer2.0.conv1", "linear"):
        module.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))

    replay(module, tape, images, ["layer2.0.conv2.weight"])

    # Hooks of the stem run, its convolution does not: what matters is inside the blocks.
    assert "layer1.0.conv1" not in ran and "layer2.0.conv1" in ran and "linear" in ran


@torch.no_grad()
def test_a_network_runs_as_ever_after_a_replay() -> None:
    module, images = InPlace().eval(), torch.randn(1, 1, 12, 12)
    before = module(images)
    tape = record(module, images)
    with pytest.raises(RuntimeError):
        replay(module, tape, images[:, :, :2, :2], ["first.weight"])

    torch.testing.assert_close(module(images), before)
    assert all("forward" not in part.__dict__ for part in module.modules())


def test_parts_are_blocks_and_none_lies_inside_another() -> None:
    names = list(parts_of(digits_resnet(width=4, blocks=3)))

    assert "layer1.0" in names and "layer1.2" in names and "conv1" in names
    assert not any(one != two and one.startswith(f"{two}.") for one in names for two in names)

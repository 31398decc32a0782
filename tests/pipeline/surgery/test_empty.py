import pytest
import torch
from torch import nn

from hardware.graph.channel_map import Branch
from pipeline.errors import SurgeryError
from pipeline.surgery.empty import Zeros, empty, observe, set_zero

LAYERS = [
    (nn.Conv2d(3, 5, 3, stride=2, padding=1), (2, 3, 9, 8)),
    (nn.Conv2d(3, 5, (1, 5), padding=(0, 4), dilation=(1, 2)), (1, 3, 7, 9)),
    (nn.Conv2d(3, 5, 3, padding="same"), (1, 3, 7, 7)),
    (nn.Conv2d(3, 5, 3, padding="valid"), (1, 3, 7, 7)),
    (nn.Conv2d(3, 5, 3), (3, 7, 7)),
    (nn.Conv1d(3, 5, 4, stride=3), (2, 3, 17)),
    (nn.Conv3d(3, 5, 3), (1, 3, 5, 6, 7)),
    (nn.ConvTranspose2d(3, 5, 3, stride=2, padding=1, output_padding=1), (1, 3, 6, 7)),
    (nn.Linear(3, 5), (2, 7, 3)),
    (nn.BatchNorm2d(3), (2, 3, 4, 4)),
    (nn.LayerNorm(3), (2, 7, 3)),
    (nn.PReLU(3), (2, 3, 4, 4)),
]


class Same(nn.Conv2d):
    """Pads as TensorFlow does: the output has the input's size over the stride, rounded up."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


class Held(nn.Module):
    """A block that owns its layer scale itself."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.gamma = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x):
        return x + self.gamma * self.conv(x)


def branch_of(module: nn.Module, *parameters: str) -> Branch:
    names = parameters or tuple(module.state_dict())
    return Branch(name="block", groups=("g",), layers=(), join="add", parameters=names)


@pytest.mark.parametrize(
    ("layer", "shape"), [*LAYERS, (Same(3, 5, 3, stride=2, padding=0), (1, 3, 8, 8))]
)
def test_zeros_have_the_shape_of_the_layer_at_any_size(layer, shape):
    net = nn.Sequential(layer).eval()
    branch, small = branch_of(net), torch.randn(shape)
    large = (
        torch.randn(*shape[:-1], shape[-1] + 2) if shape[-1] != 3 else torch.randn(4, *shape[1:])
    )
    expected = [tuple(net(x).shape) for x in (small, large)]

    untrained = empty(net, [branch], observe(net, [branch], small))

    assert isinstance(net[0], Zeros) and not list(net.parameters()) and untrained == ()
    for x, shape_given in zip((small, large), expected, strict=True):
        assert tuple(net(x).shape) == shape_given and not net(x).any()


def test_what_follows_may_write_into_the_zeros_and_gradients_pass_the_shortcut():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.act, self.conv = (
                nn.BatchNorm2d(3),
                nn.ReLU(inplace=True),
                nn.Conv2d(3, 3, 1),
            )

        def forward(self, x):
            out = self.conv(self.act(self.norm(x)))
            out += x
            return out

    net = nn.Sequential(Block()).eval()
    branch, x = branch_of(net), torch.full((1, 3, 4, 4), -1.0, requires_grad=True)

    empty(net, [branch], observe(net, [branch], x.detach()))
    net(x).sum().backward()

    assert torch.equal(net(x), x) and bool((x.grad == 1).all())


def test_a_parameter_that_a_block_holds_itself_is_zeroed_and_not_trained():
    net = nn.Sequential(Held()).eval()
    branch, x = branch_of(net), torch.randn(1, 3, 4, 4)

    untrained = empty(net, [branch], observe(net, [branch], x))

    assert untrained == ("0.gamma",) and not net[0].gamma.requires_grad
    assert torch.equal(net(x), x)


def test_a_layer_that_is_held_twice_is_replaced_twice():
    conv = nn.Conv2d(3, 3, 1)
    net = nn.Sequential(conv, nn.Sequential(conv))
    branch = branch_of(net, "0.weight", "0.bias")

    empty(net, [branch], observe(net, [branch], torch.randn(1, 3, 4, 4)))

    assert net[0] is net[1][0] and isinstance(net[0], Zeros)


def test_a_convolution_of_an_unknown_size_is_refused():
    class Odd(nn.Conv2d):
        def forward(self, x):
            return super().forward(x).repeat(1, 1, 1, 3)

    net = nn.Sequential(Odd(3, 3, 1))
    branch = branch_of(net)

    with pytest.raises(SurgeryError, match=r"0 \(Odd\) turns \(1, 3, 4, 4\) into \(1, 3, 4, 12\)"):
        empty(net, [branch], observe(net, [branch], torch.randn(1, 3, 4, 4)))


def test_variances_survive_emptying():
    net = nn.Sequential(Held())
    net[0].register_buffer("running_var", torch.ones(3))
    branch = branch_of(net, "0.running_var")

    assert empty(net, [branch], {}) == ()
    assert bool((net[0].running_var == 1).all())
    set_zero(net, ["0.gamma"])
    assert not net[0].gamma.any()

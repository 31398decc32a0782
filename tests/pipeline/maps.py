"""Channel maps, views and responses written by hand: tests do not rest on what finds them."""

import random

import torch
from torch import Tensor, nn

from benchmarks.networks import ResNet
from hardware.graph.channel_map import Branch, ChannelMap, Group, ParameterSlice
from pipeline.records import GroupView, Network, Responses

NORM = ("weight", "bias", "running_mean", "running_var")


def network_of(
    module: nn.Module, *input_shape: int, spec: str = "tests:net", **arguments
) -> Network:
    return Network(module=module.eval(), spec=spec, arguments=arguments, input_shape=input_shape)


def cut(parameter: str, role: str, units, axis: int = 0) -> ParameterSlice:
    """Return a slice; `units` may be a width for units in order."""
    units = range(units) if isinstance(units, int) else units
    return ParameterSlice(parameter=parameter, axis=axis, role=role, units=tuple(units))


def group(width: int, filters=(), norms=(), inputs=(), others=(), **fields) -> Group:
    """Return a group whose layers all hold its units in order, once each."""
    slices = [cut(f"{name}.weight", "filter", width) for name in filters]
    slices += [cut(f"{name}.{part}", "norm", width) for name in norms for part in NORM]
    slices += [cut(f"{name}.weight", "input", width, axis=1) for name in inputs]
    fields.setdefault("name", f"{filters[0]}.weight")
    return Group(width=width, slices=(*slices, *others), **fields)


def resnet_map(net: ResNet, *, streams: bool = True) -> ChannelMap:
    """Return groups and branches of a residual network with projected shortcuts."""
    groups, branches = [], []
    stages = [("layer1", net.layer1), ("layer2", net.layer2), ("layer3", net.layer3)]
    for number, (stage, blocks) in enumerate(stages):
        paths = [f"{stage}.{index}" for index in range(len(blocks))]
        for path, block in zip(paths, blocks, strict=True):
            inner = group(
                block.conv1.out_channels, [f"{path}.conv1"], [f"{path}.bn1"], [f"{path}.conv2"]
            )
            groups.append(inner)
            branches.append(
                Branch(
                    name=path,
                    groups=(inner.name,),
                    layers=(),
                    join=f"{path}.add",
                    parameters=(
                        *(f"{path}.conv{i}.weight" for i in (1, 2)),
                        *(f"{path}.bn{i}.{part}" for i in (1, 2) for part in NORM),
                    ),
                )
            )
        if streams:
            following = [f"layer{number + 2}.0.conv1", f"layer{number + 2}.0.shortcut.0"]
            first = (
                ("conv1", "bn1") if number == 0 else (f"{paths[0]}.shortcut.{i}" for i in (0, 1))
            )
            conv, norm = first
            groups.append(
                group(
                    blocks[0].conv2.out_channels,
                    [conv, *(f"{path}.conv2" for path in paths)],
                    [norm, *(f"{path}.bn2" for path in paths)],
                    [f"{path}.conv1" for path in (paths if number == 0 else paths[1:])]
                    + (following if number < 2 else ["linear"]),
                )
            )
    return ChannelMap(groups=tuple(groups), branches=tuple(branches))


class Chain(nn.Module):
    """Two convolutions and a head; `fixed` says which widths its `forward` fixes, and how."""

    def __init__(self, fixed=None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)
        self.fixed = fixed

    def forward(self, x):
        x = torch.sigmoid(self.bn1(self.conv1(x)))
        x = torch.sigmoid(self.bn2(self.conv2(x)))
        if self.fixed == "second":
            x = x.view(x.shape[0], 8, 8, 8)
        if self.fixed == "together" and x.shape[1] < 8 and self.conv1.out_channels < 6:
            raise ValueError("either may shrink, not both")
        if self.fixed == "not on meta":
            x = x * float(x.sum() * 0 + 1)
        return self.head(x.mean((2, 3)))


def chain(fixed: str | None = None) -> tuple[Network, ChannelMap]:
    """Return a chain and the two groups of its convolutions."""
    others = [cut("conv1.bias", "bias", 6)]
    second = [cut("conv2.bias", "bias", 8)]
    groups = (
        group(6, ["conv1"], ["bn1"], ["conv2"], others),
        group(8, ["conv2"], ["bn2"], ["head"], second),
    )
    return network_of(Chain(fixed), 3, 8, 8), ChannelMap(groups=groups)


def random_keep(channels: ChannelMap, seed: int, emptied: int = 0) -> dict[str, tuple[int, ...]]:
    """Return between a quarter and all units of every prunable group, and some emptied branches."""
    source = random.Random(seed)
    keep = {}
    for part in channels.prunable:
        width = source.randint(max(1, part.width // 4), part.width)
        keep[part.name] = tuple(sorted(source.sample(range(part.width), width)))
    for branch in source.sample(channels.branches, min(emptied, len(channels.branches))):
        keep |= dict.fromkeys(branch.groups, ())
    return keep


def largest_difference(first: nn.Module, second: nn.Module, batch: torch.Tensor) -> float:
    with torch.no_grad():
        one, other = first(batch), second(batch)
    return float((one - other).abs().max() / other.abs().max())


def seen(values: Tensor) -> Responses:
    """Return responses `(rows, width)` as if they were all that a reader saw."""
    return Responses(
        reader="conv2",
        active=(values > 0).float().mean(dim=0),
        magnitude=values.abs().mean(dim=0),
        pooled=values,
        map_ranks=torch.ones(values.shape[1]),
        covariance=values.T.cov(correction=0),
        contributions=values.T @ values,
        rows=len(values),
    )


def view(*gradients: Tensor, name: str = "conv1", seen: tuple[Responses, ...] = ()) -> GroupView:
    """Return a group with these gradients `(batches, width, fan-in)`, one per coupled layer."""
    width = gradients[0].shape[1] if gradients else len(seen[0].active)
    return GroupView(
        name=name,
        width=width,
        filters=tuple(gradient[0] for gradient in gradients) or (torch.eye(width),),
        consumers=(),
        norm_scales=(),
        norm_shifts=(),
        filter_gradients=gradients,
        responses=seen,
    )


def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)

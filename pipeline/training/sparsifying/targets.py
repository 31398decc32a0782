"""What a plan wants removed, as parts of parameters, and what a method does about it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hardware.graph.channel_map import ChannelMap, Group, Keep, ParameterSlice
from pipeline.surgery.empty import UNTOUCHED
from pipeline.surgery.narrow import emptied_branches

MADE = ("filter", "depthwise", "norm", "bias")  # what makes a channel; all zero: the channel is
Parameters = Mapping[str, nn.Parameter]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A group that is to become narrower."""

    group: str
    full: int
    width: int  # above 0, below `full`
    made: tuple[ParameterSlice, ...]  # parameters that make its channels
    read: tuple[ParameterSlice, ...]  # parameters that read them

    def width_at(self, step: int, steps: int) -> int:
        """Return the width after one of several steps, each by the same factor."""
        ratio: float = (self.width / self.full) ** (step / steps)
        return math.ceil(self.full * ratio - 1e-9)


class Penalty:
    """What a training does besides learning: nothing, unless a subclass says so."""

    def begin(self, epoch: int) -> None:
        """Get ready for an epoch, counted from 0."""

    def loss(self) -> Tensor | None:
        """Return what is added to the loss of this step, None for nothing."""
        return None

    def after_step(self) -> None:
        """Change what the optimizer has just changed."""

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that a resumed training needs."""
        return {}

    def resume(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `state` returned."""

    def facts(self) -> dict[str, object]:
        """Return what decides the result, besides the section: a resumed training must agree."""
        return {}

    def finish(self) -> dict[str, tuple[int, ...]]:
        """Return the channels of every group that stay, as many as the plan says; work no more."""
        return {}


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by every name that they have."""
    return dict(module.named_parameters(remove_duplicate=False))


def targets_of(parameters: Parameters, channels: ChannelMap, keep: Keep) -> tuple[Target, ...]:
    """Return the groups that a choice narrows; those that it empties go with their branches."""
    return tuple(
        Target(
            group=group.name,
            full=group.width,
            width=len(keep[group.name]),
            made=_slices(group, parameters, MADE),
            read=_slices(group, parameters, ("input",)),
        )
        for group in channels.prunable
        if 0 < len(keep.get(group.name, ())) < group.width
    )


def emptied_parameters(parameters: Parameters, channels: ChannelMap, keep: Keep) -> tuple[str, ...]:
    """Return the parameters of the branches that a choice empties: all of them become zero."""
    names = [name for branch in emptied_branches(channels, keep) for name in branch.parameters]
    return tuple(
        name for name in dict.fromkeys(names) if name in parameters and not name.endswith(UNTOUCHED)
    )


def channel_norms(
    tensors: Mapping[str, Tensor], slices: Sequence[ParameterSlice], width: int
) -> Tensor:
    """Return the L2 norm `(width,)` of each channel of a group over all its slices together."""
    squares = torch.zeros(width)
    for part in slices:
        rows = tensors[part.parameter].detach().movedim(part.axis, 0)
        units = torch.tensor(part.units)
        owned = units >= 0
        squares.index_add_(
            0, units[owned], rows.float().square().reshape(len(rows), -1).sum(dim=1).cpu()[owned]
        )
    return squares.sqrt()


def largest(scores: Tensor, width: int) -> tuple[int, ...]:
    """Return the `width` channels of the largest scores, ascending; of equals the first ones."""
    order = torch.argsort(-scores, stable=True)[:width]
    return tuple(sorted(int(channel) for channel in order))


def mask_of(tensor: Tensor, part: ParameterSlice, kept: Sequence[int]) -> Tensor:
    """Return a factor for a tensor: 0 where a channel of the slice is not kept, 1 elsewhere."""
    units = torch.tensor(part.units)
    gone = (units >= 0) & ~torch.isin(units, torch.tensor(kept, dtype=units.dtype))
    shape = [1] * tensor.ndim
    shape[part.axis] = len(units)
    return (~gone).to(tensor).reshape(shape)


def _slices(
    group: Group, parameters: Parameters, roles: Sequence[str]
) -> tuple[ParameterSlice, ...]:
    """Return the slices of these roles that are trained, not statistics or constants."""
    return tuple(s for s in group.slices if s.role in roles and s.parameter in parameters)

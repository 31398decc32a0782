"""What a plan wants removed, as parts of parameters: the target of every sparsifying stage."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hardware.graph.channel_map import ChannelMap, Group, Keep, ParameterSlice
from pipeline.surgery.empty import UNTOUCHED
from pipeline.surgery.narrow import emptied_branches
from pipeline.training.training import Pull

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


class Sparsifier(Pull):
    """A pull that ends with the choice of what stays."""

    def finish(self) -> dict[str, tuple[int, ...]]:
        """Return the units of every group that stay, as many as the plan says; stop pulling."""
        raise NotImplementedError


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


def unit_norms(
    tensors: Mapping[str, Tensor], slices: Sequence[ParameterSlice], width: int
) -> Tensor:
    """Return the L2 norm `(width,)` of each unit over all its slices together."""
    squares = torch.zeros(width)
    for piece in slices:
        rows = tensors[piece.parameter].detach().movedim(piece.axis, 0)
        units = torch.tensor(piece.units)
        owned = units >= 0
        squares.index_add_(
            0, units[owned], rows.float().square().reshape(len(rows), -1).sum(dim=1).cpu()[owned]
        )
    return squares.sqrt()


def largest(scores: Tensor, width: int) -> tuple[int, ...]:
    """Return the `width` units of the largest scores, ascending; among equals the first ones."""
    order = torch.argsort(-scores, stable=True)[:width]
    return tuple(sorted(int(unit) for unit in order))


def mask_of(tensor: Tensor, piece: ParameterSlice, kept: Sequence[int]) -> Tensor:
    """Return a factor for a tensor: 0 where a unit of the slice is not kept, 1 elsewhere."""
    units = torch.tensor(piece.units)
    gone = (units >= 0) & ~torch.isin(units, torch.tensor(kept, dtype=units.dtype))
    shape = [1] * tensor.ndim
    shape[piece.axis] = len(units)
    return (~gone).to(tensor).reshape(shape)


def _slices(
    group: Group, parameters: Parameters, roles: Sequence[str]
) -> tuple[ParameterSlice, ...]:
    """Return the slices of these roles that are trained, not statistics or constants."""
    return tuple(s for s in group.slices if s.role in roles and s.parameter in parameters)

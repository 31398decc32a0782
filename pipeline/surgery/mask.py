"""Silence channels without removing them: for the proof of surgery, and to measure damage."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hardware.graph.channel_map import ChannelMap, Keep
from pipeline.errors import SurgeryError
from pipeline.surgery.empty import UNTOUCHED
from pipeline.surgery.narrow import emptied_branches, named_tensors


@contextmanager
def masked(module: nn.Module, channels: ChannelMap, keep: Keep) -> Iterator[None]:
    """Let a module compute what it would compute without the channels that are not kept.

    Channels are silenced where they are *read*: the input columns that read them are zero. That is
    exact whatever happens to the channels on the way (an activation that maps 0 to something else,
    a batch norm's shift). A branch at width 0 is silenced by zeroing its own parameters, so that it
    adds zero. On leaving, everything is restored bit for bit, also after an error.

    Only what changes is copied: entering costs as much as the masked columns are large.

    Args:
        module: changed inside the `with` block only.
        channels: the channel map of this module.
        keep: per group the channels that stay; groups that are not named stay whole.

    Raises:
        SurgeryError: `keep` makes no sense, or the channel map is that of another network.
    """
    branches = emptied_branches(channels, keep)
    tensors = named_tensors(module)
    undo: list[tuple[Tensor, int, Tensor, Tensor]] = []

    def silence(tensor: Tensor, axis: int, positions: list[int]) -> None:
        index = torch.tensor(positions, device=tensor.device)
        undo.append((tensor, axis, index, tensor.index_select(axis, index)))
        tensor.index_fill_(axis, index, 0)

    try:
        with torch.no_grad():
            for name, units in keep.items():
                for parameter, axis, positions in _columns(channels, name, units):
                    silence(_tensor(tensors, parameter), axis, positions)
            for parameter in dict.fromkeys(n for branch in branches for n in branch.parameters):
                tensor = tensors.get(parameter)
                if tensor is not None and tensor.ndim and not parameter.endswith(UNTOUCHED):
                    silence(tensor, 0, list(range(tensor.shape[0])))
        yield
    finally:
        with torch.no_grad():
            for tensor, axis, index, former in reversed(undo):
                tensor.index_copy_(axis, index, former)


def _columns(
    channels: ChannelMap, name: str, units: tuple[int, ...]
) -> Iterator[tuple[str, int, list[int]]]:
    """Yield (parameter, axis, positions) of what reads the channels of a group that do not stay."""
    group, kept = channels.group(name), set(units)
    if not units or len(units) == group.width:  # an emptied group goes with its branch
        return
    for part in group.slices:
        if part.role == "input":
            positions = [p for p, unit in enumerate(part.units) if unit >= 0 and unit not in kept]
            if positions:
                yield part.parameter, part.axis, positions


def _tensor(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise SurgeryError(
            f"The channel map names {name!r}, which this network does not have: it was made for "
            "another network."
        )
    return tensors[name]

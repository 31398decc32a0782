"""Remove channels from a copy of the user's own class."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hardware.graph.channel_map import ChannelMap, Keep
from pipeline.records import Network
from pipeline.surgery.empty import empty, fit_zeros, observe
from pipeline.surgery.forms import GraphBacked
from pipeline.surgery.narrow import Cuts, emptied_branches, find_cuts, named_tensors, narrow


def prune(network: Network, channels: ChannelMap, keep: Keep) -> Network:
    """Return a copy of a network with only the channels in `keep`, of the user's own class.

    A network in graph form is carved.

    Layers of emptied branches are replaced by zeros without parameters, so that an unchanged
    `out += shortcut` adds nothing.

    Args:
        network: stays as it is.
        channels: its channel map.
        keep: per group the channels that stay, ascending; groups that are not named stay whole,
            () empties the branch that a group belongs to.

    Raises:
        SurgeryError: `keep` or the map do not fit, or `forward` cannot run at the new widths.
    """
    branches = emptied_branches(channels, keep)
    if isinstance(network.module, GraphBacked):
        return replace(network, module=network.module.carved(channels, keep))
    module = copy.deepcopy(network.module)
    tensors = named_tensors(module)
    floating = (tensor for tensor in tensors.values() if tensor.is_floating_point())
    example = network.example().to(next(floating, torch.empty(0)))  # its dtype, its device
    modes = [(layer, layer.training) for layer in module.modules()]
    module.eval()
    seen = observe(module, branches, example)
    cuts = find_cuts(channels, keep)
    sizes = _sizes(tensors, cuts)
    narrow(module, cuts)
    empty(module, branches, seen)
    fit_zeros(module, example, sizes)
    for layer, is_training in modes:
        layer.training = is_training
    return replace(network, module=module)


def _sizes(tensors: Mapping[str, Tensor], cuts: Cuts) -> dict[int, set[int]]:
    """Return per former length of an axis the lengths that the cuts make of it."""
    sizes: dict[int, set[int]] = {}
    for name, axes in cuts.items():
        for axis, kept in axes.items():
            if name in tensors and axis < tensors[name].ndim:
                sizes.setdefault(tensors[name].shape[axis], set()).add(len(kept))
    return sizes


def failing(names: Sequence[str], fails: Callable[[Sequence[str]], str | None]) -> dict[str, str]:
    """Return the names to leave out, each with the reason, so that the others pass together.

    Halves what fails; a half is tried together with everything accepted before it, so that names
    that fail only jointly are found too. Where all of a first half is accepted, the second half is
    what failed, and is not tried again as a whole.

    Args:
        names: to be tried, all at once first.
        fails: says for some of the names why they fail together, or None.
    """
    accepted: list[str] = []
    left_out: dict[str, str] = {}

    def sort(some: Sequence[str], reason: str | None = None) -> None:
        if not some:
            return
        reason = reason or fails([*accepted, *some])
        if reason is None:
            accepted.extend(some)
        elif len(some) == 1:
            left_out[some[0]] = reason
        else:
            known, half = len(left_out), len(some) // 2
            sort(some[:half])
            sort(some[half:], reason if len(left_out) == known else None)

    sort(names)
    return left_out


def joined(parts: Mapping[str, Keep], names: Sequence[str]) -> Keep:
    """Return the named parts of a choice as one choice."""
    return {group: units for name in names for group, units in parts[name].items()}


def each(keep: Keep) -> dict[str, Keep]:
    """Return a choice as one part per group."""
    return {name: {name: units} for name, units in keep.items()}

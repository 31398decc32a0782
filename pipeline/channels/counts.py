"""What a channel map and a plan amount to: filters removed, channels frozen, what can be pruned."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hardware.graph.channel_map import Branch, ChannelMap, Group
from hardware.graph.operators import CONVOLUTIONS
from hardware.latency.layers import Layer
from pipeline import wording
from pipeline.records import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenRow:
    """Channels that may not be pruned for one and the same reason."""

    reason: str
    channels: int
    places: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """What part of a network can be pruned at all, each in [0, 1]."""

    channels: float  # of the output channels of all convolutions
    macs: float  # of the multiply-adds: those that read or produce a prunable channel


def coupled_layers(group: Group) -> tuple[str, ...]:
    """Return the layers whose filters make the group's channels, in graph order."""
    roles = ("filter", "depthwise")
    names = (wording.layer_of(part.parameter) for part in group.slices if part.role in roles)
    return tuple(dict.fromkeys(names))


def emptied_branches(channels: ChannelMap, plan: Plan) -> tuple[Branch, ...]:
    """Return the residual branches that the plan removes altogether."""
    widths = plan.widths
    return tuple(
        branch
        for branch in channels.branches
        if branch.groups and all(widths.get(group) == 0 for group in branch.groups)
    )


def filters_removed(channels: ChannelMap, plan: Plan) -> tuple[int, int]:
    """Return how many filters the plan removes, and how many the network has.

    An emptied branch loses all its filters, also those that feed channels which others keep.
    """
    emptied = {name for branch in emptied_branches(channels, plan) for name in branch.parameters}
    removed = total = 0
    for group in channels.groups:
        stays = set(plan.keep.get(group.name, range(group.width)))
        for part in group.slices:
            if part.role in ("filter", "depthwise"):
                units = [unit for unit in part.units if unit >= 0]
                kept = stays if part.parameter not in emptied else set()
                total += len(units)
                removed += sum(unit not in kept for unit in units)
    removed += sum(axis.channels for axis in channels.frozen if axis.parameter in emptied)
    return removed, total + sum(axis.channels for axis in channels.frozen)


def frozen_rows(channels: ChannelMap) -> tuple[FrozenRow, ...]:
    """Return the reasons why channels may not be pruned, the most frequent one first."""
    counts: Counter[str] = Counter()
    places: dict[str, list[str]] = {}
    for group in channels.groups:
        if group.frozen is not None:
            counts[group.frozen] += group.width
            places.setdefault(group.frozen, []).append(group.name)
    for axis in channels.frozen:
        counts[axis.reason] += axis.channels
        places.setdefault(axis.reason, []).append(axis.parameter)
    return tuple(
        FrozenRow(
            reason=reason, channels=count, places=tuple(map(wording.layer_of, places[reason]))
        )
        for reason, count in counts.most_common()
    )


def prunable_shares(channels: ChannelMap, layers: Sequence[Layer]) -> Shares:
    """Return what part of the convolution output channels and of the multiply-adds is prunable."""
    convolutions = [layer for layer in layers if layer.key.operator in CONVOLUTIONS]
    outputs = sum(layer.key.out_channels for layer in convolutions)
    free = sum(_free(layer.out_parts, channels) for layer in convolutions)
    macs = sum(layer.macs for layer in layers)
    return Shares(
        channels=free / outputs if outputs else 0.0,
        macs=sum(prunable_macs(layer, channels) for layer in layers) / macs if macs else 0.0,
    )


def prunable_macs(layer: Layer, channels: ChannelMap) -> float:
    """Return the multiply-adds of a layer that read or produce at least one prunable channel."""
    inputs = 1 - _free(layer.in_parts, channels) / max(layer.key.in_channels, 1)
    outputs = 1 - _free(layer.out_parts, channels) / max(layer.key.out_channels, 1)
    if layer.key.group_channels:  # whole groups go, inputs and outputs together
        return layer.macs * (1 - outputs)
    return layer.macs * (1 - inputs * outputs)


def _free(parts: Mapping[str, int], channels: ChannelMap) -> int:
    widths = {group.name: group.width for group in channels.prunable}
    return sum(count * widths.get(group, 0) for group, count in parts.items())

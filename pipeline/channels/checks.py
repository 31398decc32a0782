"""Check the channel analysis on graphs: removed channels against masked ones, and labels again.

Not part of a run, which proves surgery on the torch network (`pipeline.surgery.proof`): the zoo
and the tests hold `find_groups` and `carve` against these.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from hardware.graph.channel_map import ChannelMap, Keep
from hardware.graph.model import to_array
from pipeline.channels.find import run_on_labels
from pipeline.errors import ProofError

Channel = tuple[str, int]  # a group, and which of its channels


def random_keep(
    channels: ChannelMap, seed: int = 0, share: float = 0.5
) -> dict[str, tuple[int, ...]]:
    """Return a random share of the channels of every prunable group, at least one of each."""
    generator = np.random.default_rng(seed)
    return {
        group.name: tuple(
            sorted(
                int(unit)
                for unit in generator.choice(
                    group.width, max(1, int(group.width * share)), replace=False
                )
            )
        )
        for group in channels.prunable
    }


def mask_graph(model: onnx.ModelProto, channels: ChannelMap, keep: Keep) -> onnx.ModelProto:
    """Return the whole model with zeros in the weights that read a channel which is not kept.

    Exact whatever an activation makes of zero, unless an operator mixes the channels of a group on
    the way (`Group.mixes`): removing a channel there is another function than masking it.

    Args:
        model: the graph that the map was found on, or what `fold_norms` made of it.
        channels: the map.
        keep: per group the channels that stay.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    zeroed = _masked_positions(channels, keep)
    for tensor in copy.graph.initializer:
        if tensor.name not in zeroed:
            continue
        values = to_array(tensor).copy()
        for axis, positions in zeroed[tensor.name].items():
            places: list[Any] = [slice(None)] * values.ndim  # Any: slices and one mask
            places[axis] = positions
            values[tuple(places)] = 0
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return copy


def _masked_positions(
    channels: ChannelMap, keep: Keep
) -> Mapping[str, dict[int, npt.NDArray[np.bool_]]]:
    """Return by parameter and axis the positions that read what is not kept."""
    found: dict[str, dict[int, npt.NDArray[np.bool_]]] = {}
    for group in channels.groups:
        if group.name not in keep:
            continue
        gone = np.ones(group.width + 1, dtype=bool)
        gone[list(keep[group.name])] = False
        gone[-1] = False  # where -1, a channel of another group or of none, looks
        for part in group.slices:
            if part.role == "input":
                mask = gone[np.array(part.units, dtype=np.int64)]
                axes = found.setdefault(part.parameter, {})
                axes[part.axis] = axes.get(part.axis, False) | mask
    return found


def check_carved(channels: ChannelMap, keep: Keep, carved: onnx.ModelProto) -> None:
    """Run the carved graph on labels and compare with what was kept.

    Whatever meets in the carved graph must have been one channel of one group before, and nothing
    that was removable may meet something fixed. Channels that a shuffle brought out of step show
    here.

    Raises:
        ProofError: two channels of the groups meet, or one meets something that is fixed.
    """
    trace = run_on_labels(carved, _grouped(channels))
    roots = trace.unions.roots()
    expected = _kept_labels(channels, keep)
    owner: dict[int, Channel | None] = {}
    for block in trace.unions.blocks:
        kept = expected.get((block.parameter, block.axis))
        if kept is None:
            continue
        if len(kept) != block.extent:
            raise ProofError(
                f"{block.parameter} has {block.extent} positions on axis {block.axis} once carved, "
                f"{len(kept)} were kept. This is a bug of the carving; please report it."
            )
        for one, root in zip(kept, roots[block.start : block.start + block.extent], strict=True):
            if root:
                if one != owner.setdefault(int(root), one):
                    _fail(block.parameter, one, owner[int(root)])
            elif one is not None and len(keep.get(one[0], (0, 1))) > 1:  # the last one is fixed
                _fail(block.parameter, one, None)


def _grouped(channels: ChannelMap) -> frozenset[str]:
    """Return the parameters that are filters: none of them is a depthwise kernel."""
    parts = [part for group in channels.groups for part in group.slices if part.axis == 0]
    return frozenset(part.parameter for part in parts if part.role == "filter")


def _kept_labels(channels: ChannelMap, keep: Keep) -> dict[tuple[str, int], list[Channel | None]]:
    """Return for every axis of every carved parameter the channel of each position, or None."""
    full: dict[tuple[str, int], list[Channel | None]] = {}
    for group in channels.groups:
        for part in group.slices:
            labels = full.setdefault((part.parameter, part.axis), [None] * len(part.units))
            for place, unit in enumerate(part.units):
                if unit >= 0:
                    labels[place] = (group.name, unit)
    kept = {name: set(units) for name, units in keep.items()}
    return {key: [one for one in labels if _stays(one, kept)] for key, labels in full.items()}


def _stays(channel: Channel | None, kept: Mapping[str, set[int]]) -> bool:
    return channel is None or channel[0] not in kept or channel[1] in kept[channel[0]]


def _fail(parameter: str, channel: Channel | None, other: Channel | None) -> None:
    one, two = (f"channel {c[1]} of {c[0]}" if c else "a fixed channel" for c in (channel, other))
    raise ProofError(
        f"In the carved graph {one} meets {two}, at {parameter}. "
        "This is a bug of the channel analysis; please report it with the network."
    )

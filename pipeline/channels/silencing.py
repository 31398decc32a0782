"""Silence units of a graph without removing them: what removal is compared with."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from hardware.graph.channel_map import ChannelMap, Keep
from hardware.graph.model import to_array


def silence(model: onnx.ModelProto, channels: ChannelMap, keep: Keep) -> onnx.ModelProto:
    """Return the whole model with zeros in the weights that read a unit which is not kept.

    Exact whatever an activation makes of zero, unless an operator mixes the channels of a group on
    the way (`Group.mixes`): removing a unit there is another function than silencing it.

    Args:
        model: the graph that the map was found on, or what `fold_norms` made of it.
        channels: the map.
        keep: per group the units that stay.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    zeroed = _silent_positions(channels, keep)
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


def _silent_positions(
    channels: ChannelMap, keep: Keep
) -> Mapping[str, dict[int, npt.NDArray[np.bool_]]]:
    """Return by parameter and axis the positions that read what is not kept."""
    found: dict[str, dict[int, npt.NDArray[np.bool_]]] = {}
    for group in channels.groups:
        if group.name not in keep:
            continue
        gone = np.ones(group.width + 1, dtype=bool)
        gone[list(keep[group.name])] = False
        gone[-1] = False  # where unit -1, of another group or of none, looks
        for part in group.slices:
            if part.role == "input":
                mask = gone[np.array(part.units, dtype=np.int64)]
                axes = found.setdefault(part.parameter, {})
                axes[part.axis] = axes.get(part.axis, False) | mask
    return found


def random_keep(
    channels: ChannelMap, seed: int = 0, share: float = 0.5
) -> dict[str, tuple[int, ...]]:
    """Return a random share of the units of every prunable group, at least one unit of each."""
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

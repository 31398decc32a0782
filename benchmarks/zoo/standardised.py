"""Numbers for networks that compute their weights, such as the NF-Nets with weight standardisation.

The mean of a filter changes when it loses some of the channels it reads, so removing them is not
masking them. But a pruned network computes certain weights, and the full network with these
weights, and zeros where channels were removed, must compute the same.
"""

from collections.abc import Mapping

import numpy as np
import onnx
import torch
from torch import Tensor

from hardware.graph.channel_map import ChannelMap, Group, Keep
from hardware.graph.model import drop_dead, initializers, shapes
from hardware.graph.operators import PRODUCTS
from pipeline.errors import ProofError


def computed_weights(graph: onnx.ModelProto) -> dict[str, str]:
    """Return by name the layers' weights that are computed, and the parameter each is made of.

    Of the parameters a weight is computed from, the one of its shape; without one it is left out.
    """
    known = shapes(graph)
    sources = {name: [name] for name in initializers(graph)}
    found: dict[str, str] = {}
    for node in graph.graph.node:
        inputs = [name for name in node.input if name]
        if inputs and all(name in sources for name in inputs):
            origin = list(dict.fromkeys(s for name in inputs for s in sources[name]))
            sources.update(dict.fromkeys(node.output, origin))
        elif node.op_type in PRODUCTS:
            value = node.input[1]
            for parameter in sources.get(value, []):
                if parameter != value and known[parameter] == known[value]:
                    found.setdefault(value, parameter)
    return found


def without_standardising(graph: onnx.ModelProto, weights: Mapping[str, str]) -> onnx.ModelProto:
    """Return the graph whose layers read the parameters that their weights are computed from."""
    plain = onnx.ModelProto()
    plain.CopyFrom(graph)
    for node in plain.graph.node:
        if node.op_type in PRODUCTS:
            node.input[1] = weights.get(node.input[1], node.input[1])
    drop_dead(plain)
    return plain


def comparable(channels: ChannelMap, plain: ChannelMap, keep: Keep) -> Keep:
    """Return the choice for the groups that only computed weights mix.

    Args:
        channels: of the graph.
        plain: of the graph without standardising.
        keep: per group of `channels` the units that stay.
    """
    others = {group.name: group for group in plain.groups}
    return {
        name: units
        for name, units in keep.items()
        if name in others and _is_same(channels.group(name), others[name])
    }


def _is_same(group: Group, other: Group) -> bool:
    """Return whether a group is made of the same units without standardising, and not mixed."""
    mine = {(part.parameter, part.axis): part.units for part in group.slices}
    return (
        other.mixes is None
        and other.width == group.width
        and all(mine.get((p.parameter, p.axis)) == p.units for p in other.slices)
    )


def with_outputs(graph: onnx.ModelProto, names: Mapping[str, str]) -> onnx.ModelProto:
    """Return the graph that gives out these values too, as its last outputs."""
    infos = {info.name: info for info in graph.graph.value_info}
    wider = onnx.ModelProto()
    wider.CopyFrom(graph)
    wider.graph.output.extend(infos[name] for name in names)
    return wider


def spread(
    weights: Mapping[str, Tensor],
    shape_of: Mapping[str, tuple[int, ...]],
    plain: ChannelMap,
    keep: Keep,
) -> dict[str, Tensor]:
    """Return the weights of a pruned network at their places in the full one, zeros elsewhere.

    Args:
        weights: by parameter, as the pruned network computes them.
        shape_of: the full shapes by parameter.
        plain: the groups.
        keep: per group the units that stay.

    Raises:
        ProofError: a weight does not have the size that was kept.
    """
    found = {}
    for name, weight in weights.items():
        places = [np.ones(extent, dtype=bool) for extent in shape_of[name]]
        for group in plain.groups:
            for part in group.slices:
                if part.parameter == name and group.name in keep:
                    places[part.axis] &= ~np.isin(part.units, _removed(group, keep))
        kept = tuple(int(place.sum()) for place in places)
        if kept != tuple(weight.shape):
            raise ProofError(f"The weight made of {name} is {tuple(weight.shape)}, kept is {kept}.")
        found[name] = torch.zeros(shape_of[name], dtype=weight.dtype)
        found[name][np.ix_(*places)] = weight
    return found


def _removed(group: Group, keep: Keep) -> list[int]:
    return sorted(set(range(group.width)) - set(keep[group.name]))

"""A network template and what to keep of it -> a narrower ONNX model, without torch."""

import itertools
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from hardware.errors import CarveError
from hardware.graph.channel_map import Branch, ChannelMap, Keep, Resize
from hardware.graph.model import (
    constant_values,
    drop_dead,
    foreign_values,
    infer_shapes,
    initializers,
    rewire,
    set_attribute,
    to_array,
)


def carve(model: onnx.ModelProto, channels: ChannelMap, keep: Keep) -> onnx.ModelProto:
    """Return a copy of the model with only the channels that are kept.

    Args:
        model: the graph that the map was found on, or the template that `fold_norms` made of it.
        channels: the map.
        keep: per group the channels that stay, ascending; () for all groups of a branch empties
            it.

    Raises:
        CarveError: `keep` names a group that does not exist, a channel out of range, an empty group
            that is no branch's or only part of a branch's groups, or a group that is frozen.
    """
    _check(channels, keep)
    carved = onnx.ModelProto()
    carved.CopyFrom(model)
    _empty_branches(carved, [b for b in channels.branches if is_emptied(b, keep)])
    _slice_parameters(carved, _kept_positions(channels, keep))
    _recompute_sizes(carved, channels, keep)
    drop_dead(carved)
    infer_shapes(carved, foreign_values(carved))
    return carved


def keep_first(channels: ChannelMap, widths: Mapping[str, int]) -> Keep:
    """Return which channels to keep to get these widths: the first of every group.

    Raises:
        CarveError: a width is larger than its group, or negative.
    """
    keep: dict[str, tuple[int, ...]] = {}
    for name, group in channels.groups_of(widths).items():
        width = widths[name]
        if not 0 <= width <= group.width:
            raise CarveError(
                f"Group {name} has {group.width} channels; a width of {width} is impossible."
            )
        keep[name] = tuple(range(width))
    return keep


def is_emptied(branch: Branch, keep: Keep) -> bool:
    """Return whether nothing is kept of a branch."""
    return all(name in keep and not keep[name] for name in branch.groups)


def _check(channels: ChannelMap, keep: Keep) -> None:
    """Refuse what cannot be carved."""
    emptied = {n for b in channels.branches if is_emptied(b, keep) for n in b.groups}
    for name, group in channels.groups_of(keep).items():
        units = keep[name]
        if any(not 0 <= unit < group.width for unit in units):
            wrong = next(unit for unit in units if not 0 <= unit < group.width)
            raise CarveError(
                f"Group {name} has channels 0 to {group.width - 1}; channel {wrong} is out of "
                "range."
            )
        if any(a >= b for a, b in itertools.pairwise(units)):
            raise CarveError(f"The channels kept of group {name} must ascend, each named once.")
        if group.frozen is not None and len(units) < group.width:
            raise CarveError(f"Group {name} cannot be narrowed: {group.frozen}.")
        if not units and name not in emptied:
            _refuse_empty(channels, name)


def _refuse_empty(channels: ChannelMap, name: str) -> None:
    """Raise with the reason why a group cannot lose all its channels."""
    branches = [branch for branch in channels.branches if name in branch.groups]
    if not branches:
        raise CarveError(
            f"Group {name} belongs to no residual branch, so at least one of its channels must "
            "stay."
        )
    together = ", ".join(branches[0].groups)
    raise CarveError(
        f"Branch {branches[0].name} is emptied as a whole or not at all: "
        f"give () for each of its groups ({together}), not only for {name}."
    )


def _empty_branches(model: onnx.ModelProto, branches: list[Branch]) -> None:
    """Let every reader of a join read its live side, and drop what is dead then, in place."""
    if not branches:
        return
    nodes = {node.name: node for node in model.graph.node}
    producer = {value: node.name for node in model.graph.node for value in node.output}
    renamed: dict[str, str] = {}
    for branch in branches:
        join = nodes.get(branch.join)
        if join is None:
            raise CarveError(
                f"The model has no node {branch.join}, which joins branch {branch.name}. "
                "The channel map belongs to another graph."
            )
        layers = set(branch.layers)
        live = [name for name in join.input if producer.get(name) not in layers]
        if len(live) != 1:
            raise CarveError(f"Node {branch.join} does not join branch {branch.name} any more.")
        renamed[join.output[0]] = live[0]
    rewire(model, renamed)
    drop_dead(model)


def _kept_positions(
    channels: ChannelMap, keep: Keep
) -> dict[str, dict[int, npt.NDArray[np.bool_]]]:
    """Return by parameter and axis which positions stay."""
    found: dict[str, dict[int, npt.NDArray[np.bool_]]] = defaultdict(dict)
    for group in channels.groups:
        units = keep.get(group.name)
        if units is None or len(units) == group.width:
            continue
        stays = np.zeros(group.width + 1, dtype=bool)
        stays[list(units)] = True
        stays[-1] = True  # where unit -1, of another group or of none, looks
        for part in group.slices:
            mask = stays[np.array(part.units, dtype=np.int64)]
            axes = found[part.parameter]
            axes[part.axis] = axes[part.axis] & mask if part.axis in axes else mask
    return found


def _slice_parameters(
    model: onnx.ModelProto, positions: Mapping[str, Mapping[int, npt.NDArray[np.bool_]]]
) -> None:
    """Cut the initializers, in place."""
    for name, tensor in initializers(model).items():
        for axis, stays in positions.get(name, {}).items():
            if axis >= len(tensor.dims) or tensor.dims[axis] != stays.size:
                raise CarveError(
                    f"{name} has shape {tuple(tensor.dims)}; the channel map expects "
                    f"{stays.size} positions on axis {axis}. It belongs to another network."
                )
        if name in positions:
            _cut(tensor, positions[name])


def _cut(tensor: TensorProto, axes: Mapping[int, npt.NDArray[np.bool_]]) -> None:
    """Cut one initializer, in place."""
    values = to_array(tensor)
    for axis, stays in axes.items():
        values = values.compress(stays, axis=axis)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _recompute_sizes(model: onnx.ModelProto, channels: ChannelMap, keep: Keep) -> None:
    """Write the sizes that changed into nodes' attributes and constant inputs, in place."""
    nodes = {node.name: node for node in model.graph.node}
    constants = constant_values(model)
    kept = {name: frozenset(units) for name, units in keep.items()}
    inputs: dict[tuple[str, int], dict[int, int]] = defaultdict(dict)
    for resize in channels.resizes:
        if resize.node not in nodes or not any(name in keep for name in resize.parts):
            continue
        size = _count(resize, kept)
        if resize.attribute is not None:
            set_attribute(nodes[resize.node], resize.attribute, size)
        elif resize.input is not None:
            inputs[resize.node, resize.input][resize.index] = size
    for (name, place), sizes in inputs.items():
        node = nodes[name]
        source = node.input[place]
        if source not in constants:
            raise CarveError(
                f"Input {source} of node {name} is no constant, so it cannot follow the widths. "
                "Simplify the model first."
            )
        values: npt.NDArray[Any] = constants[source].copy()
        for index, size in sizes.items():
            values.reshape(-1)[index] = size
        own = f"{name}_{place}_carved"
        model.graph.initializer.append(numpy_helper.from_array(values, own))
        node.input[place] = own


def _count(resize: Resize, kept: Mapping[str, frozenset[int]]) -> int:
    """Return the new value of a size; groups not named are whole."""
    size = resize.fixed
    for name, units in resize.parts.items():
        size += sum(unit in kept[name] for unit in units) if name in kept else len(units)
    return size

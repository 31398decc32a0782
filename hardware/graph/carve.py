"""A network template and what to keep of it -> a narrower ONNX model, without torch."""

import itertools
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, numpy_helper
from onnx.external_data_helper import load_external_data_for_model

from hardware.errors import CarveError, ModelError
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
from hardware.graph.simplify import settled


def carve(model: onnx.ModelProto, channels: ChannelMap, keep: Keep) -> onnx.ModelProto:
    """Return the model with only the units that are kept.

    Args:
        model: the graph that the map was found on, or the template that `fold_norms` made of it.
        channels: the map.
        keep: per group the units that stay, ascending; () for all groups of a branch empties it.

    Raises:
        CarveError: `keep` names a group that does not exist, a unit out of range, an empty group
            that is no branch's or only part of a branch's groups, or a group that is frozen.
    """
    _check(channels, keep)
    carved = onnx.ModelProto()
    carved.CopyFrom(settled(model))
    _empty_branches(carved, [b for b in channels.branches if is_emptied(b, keep)])
    _slice_parameters(carved, _kept_positions(channels, keep))
    _recompute_sizes(carved, channels, keep)
    drop_dead(carved)
    infer_shapes(carved, foreign_values(carved))
    return carved


def keep_first(channels: ChannelMap, widths: Mapping[str, int]) -> Keep:
    """Return which units to keep to get these widths: the first of every group.

    Raises:
        CarveError: a width is larger than its group, or negative.
    """
    keep: dict[str, tuple[int, ...]] = {}
    for name, width in widths.items():
        full = channels.group(name).width
        if not 0 <= width <= full:
            raise CarveError(f"Group {name} has {full} units; a width of {width} is impossible.")
        keep[name] = tuple(range(width))
    return keep


def load_model(path: Path) -> onnx.ModelProto:
    """Return the ONNX model in a file, its weights included.

    Raises:
        ModelError: no such file, not an ONNX model, damaged, or its external data is absent.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
        _require_external_data(model, path)
        load_external_data_for_model(model, str(path.parent))
    except ModelError:
        raise
    except FileNotFoundError as error:
        raise ModelError(f"Cannot read {path}: there is no such file.") from error
    except OSError as error:
        raise ModelError(f"Cannot read {path}: {error.strerror or error}.") from error
    except Exception as error:  # protobuf's DecodeError, onnx's ValidationError: no common base
        raise ModelError(
            f"{path} is not a sound ONNX model ({error}). Export or download it again."
        ) from error
    if not model.graph.node:
        raise ModelError(f"{path} holds no ONNX graph. Export or download it again.")
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{path} is not a valid ONNX model: {reason}") from error
    return model


def _require_external_data(model: onnx.ModelProto, path: Path) -> None:
    """Refuse a model whose weights lie in a file that is not there."""
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and not (path.parent / entry.value).is_file():
                raise ModelError(
                    f"{path} keeps its weights in external data, {entry.value}, which is not "
                    f"there. Put that file into {path.parent}."
                )


def is_emptied(branch: Branch, keep: Keep) -> bool:
    """Return whether nothing is kept of a branch."""
    return all(name in keep and not keep[name] for name in branch.groups)


def _check(channels: ChannelMap, keep: Keep) -> None:
    """Refuse what cannot be carved."""
    emptied = {n for b in channels.branches if is_emptied(b, keep) for n in b.groups}
    for name, units in keep.items():
        group = channels.group(name)
        if any(not 0 <= unit < group.width for unit in units):
            wrong = next(unit for unit in units if not 0 <= unit < group.width)
            raise CarveError(
                f"Group {name} has units 0 to {group.width - 1}; unit {wrong} is out of range."
            )
        if any(a >= b for a, b in itertools.pairwise(units)):
            raise CarveError(f"The units kept of group {name} must ascend, each named once.")
        if group.frozen is not None and len(units) < group.width:
            raise CarveError(f"Group {name} cannot be narrowed: {group.frozen}.")
        if not units and name not in emptied:
            _refuse_empty(channels, name)


def _refuse_empty(channels: ChannelMap, name: str) -> None:
    """Say why a group cannot lose all its units."""
    branches = [branch for branch in channels.branches if name in branch.groups]
    if not branches:
        raise CarveError(
            f"Group {name} belongs to no residual branch, so at least one of its units must stay."
        )
    together = ", ".join(branches[0].groups)
    raise CarveError(
        f"Branch {branches[0].name} is emptied as a whole or not at all: "
        f"give () for each of its groups ({together}), not only for {name}."
    )


def _empty_branches(model: onnx.ModelProto, branches: list[Branch]) -> None:
    """Let every reader of a join read its live side, and drop what is dead then."""
    if not branches:
        return
    nodes = {node.name: node for node in model.graph.node}
    renamed: dict[str, str] = {}
    for branch in branches:
        join = nodes.get(branch.join)
        if join is None:
            raise CarveError(
                f"The model has no node {branch.join}, which joins branch {branch.name}. "
                "The channel map belongs to another graph."
            )
        layers = set(branch.layers)
        dead = [
            name
            for name in join.input
            if any(n in layers for n in _producers(model.graph.node, name))
        ]
        live = [name for name in join.input if name not in dead]
        if len(live) != 1:
            raise CarveError(f"Node {branch.join} does not join branch {branch.name} any more.")
        renamed[join.output[0]] = live[0]
    rewire(model, renamed)
    drop_dead(model)


def _producers(nodes: list[NodeProto], name: str) -> list[str]:
    """Return the name of the node that computes a value, in a list that may be empty."""
    return [node.name for node in nodes if name in node.output]


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
    inputs: dict[tuple[str, int], dict[int, int]] = defaultdict(dict)
    for resize in channels.resizes:
        if resize.node not in nodes or not any(name in keep for name in resize.parts):
            continue
        size = _count(resize, keep)
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
                "Settle the model first."
            )
        values: npt.NDArray[Any] = constants[source].copy()
        for index, size in sizes.items():
            values.reshape(-1)[index] = size
        own = f"{name}_{place}_carved"
        model.graph.initializer.append(numpy_helper.from_array(values, own))
        node.input[place] = own


def _count(resize: Resize, keep: Keep) -> int:
    """Return the new value of a size."""
    size = resize.fixed
    for name, units in resize.parts.items():
        kept = keep.get(name)
        size += len(units) if kept is None else sum(unit in set(kept) for unit in units)
    return size

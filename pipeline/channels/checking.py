"""Check a carved graph: the labels it has by itself must be the labels that were kept."""

from collections.abc import Mapping

import onnx

from hardware.graph.channel_map import ChannelMap, Keep
from hardware.graph.simplify import settled
from pipeline.channels.find import run_on_labels
from pipeline.errors import ProofError

Unit = tuple[str, int]


def check_carved(channels: ChannelMap, keep: Keep, carved: onnx.ModelProto) -> None:
    """Run the carved graph on labels and compare with what was kept.

    Whatever meets in the carved graph must have been one unit before, and nothing that was
    removable may meet something fixed. Channels that a shuffle brought out of step show here.

    Raises:
        ProofError: two units meet, or a unit meets something that is fixed.
    """
    trace = run_on_labels(settled(carved), _grouped(channels))
    roots = trace.unions.roots()
    expected = _kept_labels(channels, keep)
    owner: dict[int, Unit | None] = {}
    for block in trace.unions.blocks:
        units = expected.get((block.parameter, block.axis))
        if units is None:
            continue
        if len(units) != block.extent:
            raise ProofError(
                f"{block.parameter} has {block.extent} positions on axis {block.axis} once carved, "
                f"{len(units)} were kept. This is a bug of the carving; please report it."
            )
        for unit, root in zip(units, roots[block.start : block.start + block.extent], strict=True):
            if root:
                if unit != owner.setdefault(int(root), unit):
                    _fail(block.parameter, unit, owner[int(root)])
            elif unit is not None and len(keep.get(unit[0], (0, 1))) > 1:  # a last unit is fixed
                _fail(block.parameter, unit, None)


def _grouped(channels: ChannelMap) -> frozenset[str]:
    """Return the parameters that are filters: none of them is a depthwise kernel."""
    parts = [part for group in channels.groups for part in group.slices if part.axis == 0]
    return frozenset(part.parameter for part in parts if part.role == "filter")


def _kept_labels(channels: ChannelMap, keep: Keep) -> dict[tuple[str, int], list[Unit | None]]:
    """Return for every axis of every carved parameter the unit of each position, or None."""
    full: dict[tuple[str, int], list[Unit | None]] = {}
    for group in channels.groups:
        for part in group.slices:
            labels = full.setdefault((part.parameter, part.axis), [None] * len(part.units))
            for place, unit in enumerate(part.units):
                if unit >= 0:
                    labels[place] = (group.name, unit)
    kept = {name: set(units) for name, units in keep.items()}
    return {key: [unit for unit in labels if _stays(unit, kept)] for key, labels in full.items()}


def _stays(unit: Unit | None, kept: Mapping[str, set[int]]) -> bool:
    return unit is None or unit[0] not in kept or unit[1] in kept[unit[0]]


def _fail(parameter: str, unit: Unit | None, other: Unit | None) -> None:
    one, two = (f"unit {u[1]} of {u[0]}" if u else "a fixed channel" for u in (unit, other))
    raise ProofError(
        f"In the carved graph {one} meets {two}, at {parameter}. "
        "This is a bug of the channel analysis; please report it with the network."
    )

"""The widths that groups may have, and what each of them is worth."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from hardware.graph.channel_map import ChannelMap
from hardware.latency.predict import Candidates
from pipeline.errors import PlanError
from pipeline.recipe import PlanSection
from pipeline.records import Array, Floor, Removal

# Of the range of values; keeps wider strictly better where a criterion sees no difference.
TRACE = 1e-6


def default_step(width: int) -> int:
    """Return the step between candidate widths: about eight candidates, at the hardware's tiles."""
    if width < 8:
        return 1 if width <= 4 else 2
    if width <= 32:
        return 4
    if width <= 64:
        return 8
    if width <= 128:
        return 16
    return 32 * math.ceil(width / 256)


def candidate_widths(
    channels: ChannelMap,
    floors: Sequence[Floor],
    step: int | None = None,
    empty_branches: bool = True,
) -> dict[str, tuple[int, ...]]:
    """Return the widths that each prunable group may take, ascending.

    These are the multiples of the step from the floor to the full width, the full width itself,
    and 0 where the group belongs to a branch that can be emptied: the floor says how alike the
    filters are, not whether the branch is needed, so it does not forbid that.

    Args:
        channels: groups that are frozen are left out.
        floors: groups that are not named may go down to one step.
        step: widths are multiples of it; None: `default_step` of the group's width.
        empty_branches: whether branches may be emptied at all.

    Raises:
        PlanError: a floor names no group of the map, or another width than the group has.
    """
    full = {group.name: group.width for group in channels.groups}
    for floor in floors:
        if full.get(floor.group) != floor.width:
            raise PlanError(
                f"The floor of {floor.group} is for {floor.width} filters, the network has "
                f"{full.get(floor.group, 'no such group')}. Measure redundancy on this network."
            )
    least = {floor.group: floor.floor for floor in floors}
    prunable = {group.name for group in channels.prunable}
    emptiable = {
        name
        for branch in channels.branches
        if empty_branches and prunable.issuperset(branch.groups)
        for name in branch.groups
    }
    found = {}
    for group in channels.prunable:
        stride = step or default_step(group.width)
        first = stride * math.ceil(max(1, least.get(group.name, 1)) / stride)
        widths = [*range(first, group.width, stride), group.width]
        found[group.name] = (0, *widths) if group.name in emptiable else tuple(widths)
    return found


def swept_widths(channels: ChannelMap, section: PlanSection) -> dict[str, tuple[int, ...]]:
    """Return the widths that a latency table is measured for: all candidates, before floors.

    Floors depend on weights and images, latency does not: so one table serves every plan of a
    network, and `espalier profile` measures what `espalier compress` needs.
    """
    return candidate_widths(channels, (), section.step, section.empty_branches)


def values_from_saliency(
    saliency: Mapping[str, Tensor | Array],
    candidates: Candidates,
    weights: Mapping[str, float] | None = None,
) -> dict[str, dict[int, float]]:
    """Return what each width is worth: the share of the group's saliency that it keeps.

    A group of any width is worth 1 in full: one of its `n` filters about `1 / n`, as a layer with
    more filters misses one of them less. A group that scores 0 throughout is worth nothing.

    Args:
        saliency: per group `(width,)`, >= 0, higher = keep.
        candidates: ascending widths per group.
        weights: what a group is worth in full, where that should not be 1.

    Raises:
        PlanError: saliency is negative or not a number.
    """
    values = {}
    for group, widths in candidates.items():
        scores = checked_scores(group, saliency)
        if scores.min() < 0:
            raise PlanError(
                f"Saliency must be >= 0 to be shared out; in group {group} the least is "
                f"{scores.min():g}. Set plan.objective to sensitivity, or change plan.criterion."
            )
        kept = np.concatenate([[0.0], np.sort(scores)[::-1].cumsum()])
        kept /= kept[-1] or 1.0
        weight = 1.0 if weights is None else weights.get(group, 1.0)
        values[group] = {
            width: weight * (float(kept[width]) + TRACE * index)
            for index, width in enumerate(widths)
        }
    return values


def values_from_damage(
    damage: Mapping[str, Mapping[int, float]], candidates: Candidates
) -> dict[str, dict[int, float]]:
    """Return what each width is worth: minus its damage, and never more than a wider one.

    Noise can make a narrower width look better than a wider one; it is then worth as much as the
    wider one less a trace. Width 0 is held against the full width only: a branch may well do
    less harm emptied than garbled.

    Args:
        damage: per group and width, how much the loss rises; 0 at the full width.
        candidates: ascending widths per group.

    Raises:
        PlanError: a width has no damage, or one that is not a number.
    """
    extent = max((abs(x) for line in damage.values() for x in line.values()), default=0.0) or 1.0
    values = {}
    for group, widths in candidates.items():
        line = damage.get(group, {})
        if unknown := [w for w in widths if not math.isfinite(line.get(w, math.nan))]:
            raise PlanError(
                f"The damage of group {group} at widths {unknown} is missing or not a number. "
                "Measure it again; if it stays so, the network diverges there: raise plan.step."
            )
        top = -line[widths[-1]]
        values[group] = {widths[-1]: top}
        for wider, width in zip(widths[:0:-1], widths[-2::-1], strict=True):
            ceiling = values[group][wider] if width else top
            values[group][width] = min(-line[width], ceiling - TRACE * extent)
    return {group: dict(sorted(line.items())) for group, line in values.items()}


def values_from_removals(
    removals: Sequence[Removal], candidates: Candidates
) -> dict[str, dict[int, float]]:
    """Return what each width is worth where redundancy decides which group gives up filters first.

    A filter is worth one over the redundancy that its group had when the loop took it: of a group
    of score 4, in which four filters do the work of one, a filter is worth a quarter. So where all
    filters took the same time, the solver would take them in the order of the loop.

    Args:
        removals: as the loop made them, down to one filter per group; that one is worth 1.
        candidates: ascending widths per group.
    """
    worth: dict[str, list[float]] = {group: [1.0] for group in candidates}  # of the last left first
    for removal in reversed(removals):
        if removal.group in worth:
            worth[removal.group].append(1 / removal.score)
    return {
        group: {
            width: sum(worth[group][:width]) + TRACE * index for index, width in enumerate(widths)
        }
        for group, widths in candidates.items()
    }


def checked_scores(group: str, saliency: Mapping[str, Tensor | Array]) -> Array:
    """Return the saliency of a group's channels; raises PlanError where one is not a number."""
    scores: Array = np.asarray(saliency[group], dtype=np.float64)
    if not np.isfinite(scores).all():
        raise PlanError(
            f"Saliency of group {group} is not a number for {int((~np.isfinite(scores)).sum())} of "
            f"{scores.size} units. Check the network's weights and the calibration images."
        )
    return scores

"""Widths for a target: candidates, what each is worth, the exact choice, and a reason for each."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from hardware.graph.channel_map import ChannelMap, Group
from hardware.latency.predict import Candidates, LayerCost
from pipeline.errors import PlanError
from pipeline.evidence.sensitivity import most_salient
from pipeline.planning.program import CostModel, Values, model_costs
from pipeline.planning.solve import Allocation, allocate
from pipeline.records import Array, Choice, Floor, Plan, Removal

__all__ = [
    "Allocation",
    "allocate",
    "candidate_widths",
    "default_step",
    "make_plan",
    "values_from_damage",
    "values_from_removals",
    "values_from_saliency",
]

# Of the full network's latency; less than this is not a gain, it is what measuring cannot tell.
LEAST_GAIN = 0.002

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
        scores = _scores(group, saliency)
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


def _scores(group: str, saliency: Mapping[str, Tensor | Array]) -> Array:
    scores: Array = np.asarray(saliency[group], dtype=np.float64)
    if not np.isfinite(scores).all():
        raise PlanError(
            f"Saliency of group {group} is not a number for {int((~np.isfinite(scores)).sum())} of "
            f"{scores.size} units. Check the network's weights and the calibration images."
        )
    return scores


def make_plan(
    channels: ChannelMap,
    floors: Sequence[Floor],
    saliency: Mapping[str, Tensor | Array],
    candidates: Candidates,
    values: Values,
    costs: Sequence[LayerCost],
    allocation: Allocation,
    target_ms: float,
    baseline_ms: float,
    objective: str,
) -> Plan:
    """Return the plan: which units stay, what it costs, and why every group has its width.

    Args:
        channels: all groups, frozen ones too.
        floors: by redundancy.
        saliency: per group `(width,)`; the units of highest saliency stay.
        candidates: ascending widths per group.
        values: what each width is worth.
        costs: of every layer; may be newer than those the allocation was made with.
        allocation: the widths.
        target_ms: the latency allowed.
        baseline_ms: of the full network.
        objective: what the values are, for the report: "saliency" or "sensitivity".
    """
    model = model_costs(candidates, costs)
    choice = {group: candidates[group].index(allocation.widths[group]) for group in candidates}
    floor_of = {floor.group: floor.floor for floor in floors}
    explainer = _Explainer(model, values, choice, floor_of, objective)
    return Plan(
        target_ms=target_ms,
        predicted_ms=model.total_us(choice) / 1000,
        baseline_ms=baseline_ms,
        gap=allocation.gap,
        objective=objective,
        value=allocation.value,
        solver_s=allocation.seconds,
        measured=all(
            bool(np.asarray(cost.measured)[tuple(choice[group] for group in cost.groups)])
            for cost in costs
        ),
        choices=tuple(explainer.explain(group) for group in channels.groups),
        keep={
            group: most_salient(_scores(group, saliency), allocation.widths[group])
            for group in candidates
        },
    )


class _Explainer:
    """Says why a group has its width, by what its next wider and narrower candidates would do."""

    def __init__(
        self,
        model: CostModel,
        values: Values,
        choice: Mapping[str, int],
        floors: Mapping[str, int],
        objective: str,
    ) -> None:
        self.model, self.values, self.choice = model, values, choice
        self.floors, self.objective = floors, objective
        self.spent_us = model.total_us(choice)
        self.full_us = model.total_us(model.full())

    def explain(self, group: Group) -> Choice:
        if group.name not in self.model.candidates:
            reason, detail, width = f"frozen: {group.frozen or 'no candidates'}", "", group.width
            floor = group.width
        else:
            width = self.model.candidates[group.name][self.choice[group.name]]
            reason, detail = self._reason(group, width), self._detail(group.name)
            floor = self.floors.get(group.name, 1)
        return Choice(
            group=group.name,
            full=group.width,
            floor=floor,
            width=width,
            reason=reason,
            detail=detail,
        )

    def _reason(self, group: Group, width: int) -> str:
        if width == 0:
            return "emptied"
        narrower = self._narrower(group.name)
        if narrower is None:
            return "redundancy floor" if self.floors.get(group.name, 1) > 1 else "least candidate"
        if self._saved_us(group.name, narrower) <= LEAST_GAIN * self.full_us:
            return "no measured gain below"
        return "full: worth its time" if width == group.width else "saliency"

    def _detail(self, group: str) -> str:
        """Return what one candidate narrower and one wider would save, cost, lose and gain."""
        widths, index = self.model.candidates[group], self.choice[group]
        parts = []
        for other in (self._narrower(group), index + 1 if widths[index] else None):
            if other is None or other >= len(widths):
                continue
            saved = self._saved_us(group, other)
            gain = self.values[group][widths[other]] - self.values[group][widths[index]]
            parts.append(
                f"at {widths[other]}: {-saved:+.1f} us ({-saved / self.full_us:+.1%} of the "
                f"network), {gain:+.3g} {self.objective}"
            )
        return "; ".join(parts)

    def _narrower(self, group: str) -> int | None:
        """Return the index of the next narrower candidate; None where there is none above 0."""
        index = self.choice[group] - 1
        return index if index >= 0 and self.model.candidates[group][index] > 0 else None

    def _saved_us(self, group: str, index: int) -> float:
        return self.spent_us - self.model.total_us({**self.choice, group: index})

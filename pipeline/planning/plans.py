"""From chosen widths to a plan with a reason for every width; plans of several rounds as one."""

from collections.abc import Mapping, Sequence

import numpy as np

from hardware.graph.channel_map import ChannelMap, Group, Keep
from hardware.latency.predict import LayerCost
from pipeline.errors import PlanError
from pipeline.evidence.sensitivity import most_salient
from pipeline.planning.program import CostModel, model_costs
from pipeline.planning.solve import Allocation
from pipeline.planning.widths import checked_scores
from pipeline.records import Choice, FittedPlan, Floor, Plan, PlanningInputs

# Of the full network's latency; less than this is not a gain, it is what measuring cannot tell.
LEAST_GAIN = 0.002


def make_plan(
    inputs: PlanningInputs,
    costs: Sequence[LayerCost],
    allocation: Allocation,
    *,
    target_ms: float,
    baseline_ms: float,
    objective: str,
) -> Plan:
    """Return the plan: which channels stay, what it costs, and why every group has its width.

    Args:
        inputs: the candidates, their values, the floors and the saliency; the channels of highest
            saliency stay.
        costs: of every layer; may be newer than those the allocation was made with.
        allocation: the widths.
        target_ms: the latency allowed.
        baseline_ms: of the full network.
        objective: what the values are, for the report: "saliency" or "sensitivity".
    """
    candidates = inputs.candidates
    model = model_costs(candidates, costs)
    choice = {group: candidates[group].index(allocation.widths[group]) for group in candidates}
    explainer = _Explainer(model, inputs, choice, objective)
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
        choices=tuple(explainer.explain(group) for group in inputs.channels.groups),
        keep={
            group: most_salient(checked_scores(group, inputs.saliency), allocation.widths[group])
            for group in candidates
        },
    )


class _Explainer:
    """Says why a group has its width, by what its next wider and narrower candidates would do."""

    def __init__(
        self, model: CostModel, inputs: PlanningInputs, choice: Mapping[str, int], objective: str
    ) -> None:
        self.model, self.values, self.choice = model, inputs.values, choice
        self.floors = {floor.group: floor.floor for floor in inputs.floors}
        self.objective = objective
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


def join_rounds(
    earlier: FittedPlan, original: ChannelMap, later: FittedPlan, pruned: ChannelMap, number: int
) -> FittedPlan:
    """Return two rounds of planning as one plan for the network before the first of them.

    Every group has the width that is left in the end, beside its width and name in the original
    network, with the reason of the round that decided it. The latencies are those of the original
    network times what each round leaves of it.

    Args:
        earlier: the plan of all rounds before, for the original network.
        original: the channel map of the original network.
        later: the plan of this round, for the network that `earlier` left.
        pruned: the channel map of that network.
        number: of this round, for the details.

    Raises:
        PlanError: this round narrows channels that the original network has in no group.
    """
    names = original_names(original, earlier.plan.keep, pruned)
    last = {names[choice.group]: choice for choice in later.plan.choices if choice.group in names}
    floors = {names[floor.group]: floor for floor in later.floors if floor.group in names}
    keep = dict(earlier.plan.keep)
    for group, units in later.plan.keep.items():
        if group in names:
            name = names[group]
            before = keep.get(name, tuple(range(original.group(name).width)))
            keep[name] = tuple(before[index] for index in units)
        elif len(units) < pruned.group(group).width:
            raise PlanError(
                f"Round {number} narrows {group}, which belongs to no pruning group of the "
                "original network. Set plan.rounds to 1 (with target.latency_ratio as it is)."
            )
    decided = {
        choice.group: last[choice.group]
        for choice in earlier.plan.choices
        if choice.group in last and not _is_narrower(choice, last[choice.group])
    }
    plan, before_ms = later.plan, later.plan.baseline_ms
    warnings = dict.fromkeys(filter(None, (earlier.warning, later.warning)))
    return FittedPlan(
        plan=plan.model_copy(
            update={
                "target_ms": earlier.plan.target_ms * plan.target_ms / before_ms,
                "predicted_ms": earlier.plan.predicted_ms * plan.predicted_ms / before_ms,
                "baseline_ms": earlier.plan.baseline_ms,
                "gap": max(earlier.plan.gap, plan.gap),
                "solver_s": earlier.plan.solver_s + plan.solver_s,
                "measured": earlier.plan.measured and plan.measured,
                "choices": tuple(
                    _renamed_choice(choice, decided.get(choice.group), number)
                    for choice in earlier.plan.choices
                ),
                "keep": keep,
            }
        ),
        floors=tuple(
            _renamed_floor(floor, floors[floor.group], number)
            if floor.group in decided and floor.group in floors
            else floor
            for floor in earlier.floors
        ),
        loop=(*earlier.loop, *later.loop),
        warning="\n".join(warnings) or None,
    )


def original_names(original: ChannelMap, keep: Keep, pruned: ChannelMap) -> dict[str, str]:
    """Return the name in the original network of every group that a pruned network has.

    A group is called after the first layer that makes its channels, and that layer may have gone
    with an emptied branch. So groups are recognised by the place of their filters: the channels
    that are left of a parameter keep their order. A group that was none before is left out.

    Args:
        original: the channel map before pruning.
        keep: per group of it the channels that stay.
        pruned: the channel map after pruning.
    """
    owners: dict[
        tuple[str, int], list[str | None]
    ] = {}  # per position; None: removed, "": no group
    for group in original.groups:
        stays = set(keep.get(group.name, range(group.width)))
        for part in group.slices:
            line = owners.setdefault((part.parameter, part.axis), [""] * len(part.units))
            for position, unit in enumerate(part.units):
                if unit >= 0:
                    line[position] = group.name if unit in stays else None
    left = {place: [name for name in line if name is not None] for place, line in owners.items()}
    names = {}
    for group in pruned.groups:
        part = next(part for part in group.slices if part.role == "filter")
        first = next(position for position, unit in enumerate(part.units) if unit >= 0)
        kept = left.get((part.parameter, part.axis), [])
        if first < len(kept) and kept[first]:
            names[group.name] = kept[first]
    return names


def _is_narrower(earlier: Choice, later: Choice) -> bool:
    """Tell whether the earlier round decided a width, and the later one left it."""
    return earlier.width < earlier.full and later.width == later.full


def _renamed_choice(earlier: Choice, later: Choice | None, number: int) -> Choice:
    """Return what the later round chose in terms of the original group; None: it chose nothing."""
    if later is None:
        return earlier
    detail = f"in round {number}, of {later.full}: {later.detail}" if later.detail else ""
    fields = {"group": earlier.group, "full": earlier.full, "detail": detail}
    return later.model_copy(update=fields)


def _renamed_floor(earlier: Floor, later: Floor, number: int) -> Floor:
    """Return the floor of the later round in terms of the original group."""
    detail = f"in round {number}, of {later.width}: {later.detail}" if later.detail else ""
    fields = {"group": earlier.group, "width": earlier.width, "detail": detail}
    return later.model_copy(update=fields)

"""From measured plans to the next one: what it may be predicted to take, and when to stop.

A table is not exact, least of all about the plan that an optimizer picks: it picks where the table
errs in its favour. So a plan is measured, the table learns what it took, and the next plan is made
with what the table now knows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hardware.intervals import Interval
from hardware.latency import predict as predicting
from hardware.latency.table import LatencyTable
from hardware.latency.variant import digest_of
from pipeline.diagnosis.diagnose import applicability_warning
from pipeline.errors import PlanError
from pipeline.networks.analyse import Subject
from pipeline.planning.plans import make_plan
from pipeline.planning.solve import Allocation, allocate
from pipeline.recipe import PlanSection
from pipeline.records import FittedPlan, Plan, PlanningInputs, Turn

# A plan aims a little below the target; it is good enough once it uses at least this share of it,
# or after so many turns at least the second.
AIM = 0.985
LEAST_USED, LEAST_USED_LATER = 0.97, 0.9
MANY_TURNS = 3
MOST_REPLANS = 3  # plans anew, at most, until costs and plan agree


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be planned: a network, what its widths are worth, and what it may take."""

    subject: Subject
    inputs: PlanningInputs
    section: PlanSection
    share: float  # of the full network's latency

    def full_ms(self, table: LatencyTable) -> float:
        """Return what the full network takes on the table's device.

        Raises:
            MissingLatencyError: nothing was measured of this network.
        """
        return table.full_ms(digest_of(self.subject.template))

    def target_ms(self, table: LatencyTable) -> float:
        """Return what the narrowed network may take on the table's device."""
        return self.share * self.full_ms(table)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A plan that was measured."""

    plan: Plan
    widths: Mapping[str, int]
    predicted_ms: float  # before it was measured
    measured_ms: float
    share: Interval  # of the full network's latency, as measured


def next_widths(
    request: Request, table: LatencyTable, trials: Sequence[Trial]
) -> Allocation | None:
    """Return the widths to measure next, None where no further turn is worth its time.

    Args:
        request: what is planned.
        table: with all that was measured so far.
        trials: the plans that were measured, in order.

    Raises:
        PlanError: there is no first plan, because no widths are predicted to meet the target.
    """
    target_ms, found = request.target_ms(table), best_of(request, trials)
    if is_enough(request, trials):
        return None
    spend_ms = what_to_spend(request, table, trials)
    around = trials[-1].widths if trials else None
    measured = [trial.widths for trial in trials]
    try:
        allocation = plan_widths(request, table, (spend_ms, target_ms), around)
        while allocation.widths in measured and found is None:  # it was too slow: spend less
            spend_ms *= AIM
            allocation = plan_widths(request, table, (spend_ms, spend_ms), around)
    except PlanError:
        if not trials:
            raise
        return None
    return None if allocation.widths in measured else allocation


def what_to_spend(request: Request, table: LatencyTable, trials: Sequence[Trial]) -> float:
    """Return what the next plan should be predicted to take, milliseconds.

    That is a little less than the target, over how wrong the table still is about the last plan,
    after it has learnt from it. Where that plan was too slow, it is over half of what the table
    learnt as well, because the next plan is again picked where the table errs; from the second such
    plan on, over all of it.
    """
    spend_ms = AIM * request.target_ms(table)
    if not trials:
        return spend_ms
    last = trials[-1]
    now_ms = predicting.predict_plan_ms(table, request.subject.layers, last.widths)
    error = last.share.estimate * request.full_ms(table) / now_ms
    if last.share.estimate > request.share:
        too_slow = sum(trial.share.estimate > request.share for trial in trials)
        before = last.measured_ms / last.predicted_ms
        error = max(error, before if too_slow > 1 else math.sqrt(error * before))
    return spend_ms / error


def is_enough(request: Request, trials: Sequence[Trial]) -> bool:
    """Tell whether the plans that were measured leave nothing to gain by another turn."""
    if len(trials) >= request.section.rounds_of_measuring:
        return True
    best = best_of(request, trials)
    if best is None:
        return False
    least = LEAST_USED if len(trials) < MANY_TURNS else LEAST_USED_LATER
    # Where the interval reaches the share that has to be used, more cannot be told from enough.
    return best.share.high >= least * request.share or not is_pruned(best.plan)


def best_of(request: Request, trials: Sequence[Trial]) -> Trial | None:
    """Return the most valuable of the plans that met the target as measured."""
    meeting = [trial for trial in trials if trial.share.estimate <= request.share]
    return max(meeting, key=lambda trial: trial.plan.value, default=None)


def fitted_plan(request: Request, trials: Sequence[Trial]) -> FittedPlan:
    """Return the best measured plan, with every turn that led to it.

    Raises:
        PlanError: none of them met the target.
    """
    best = best_of(request, trials)
    if best is None:
        fastest = min(trials, key=lambda trial: trial.share.estimate)
        full_ms = fastest.measured_ms / fastest.share.estimate
        raise PlanError(
            f"None of {len(trials)} measured plans took {request.share * full_ms:.4f} ms or less; "
            f"the fastest took {fastest.measured_ms:.4f} ms. Raise the target, or "
            "plan.rounds_of_measuring."
        )
    return FittedPlan(
        plan=best.plan,
        floors=request.inputs.floors,
        loop=tuple(
            Turn(
                predicted_ms=trial.predicted_ms,
                measured_ms=trial.measured_ms,
                target_ms=trial.plan.target_ms,
                value=trial.plan.value,
            )
            for trial in trials
        ),
        warning=warning_of(request, best.plan),
    )


def warning_of(request: Request, plan: Plan) -> str | None:
    """Return what is doubtful about a plan, None where nothing is."""
    return applicability_warning(plan, request.inputs.inapplicable, request.section.criterion)


def plan_widths(
    request: Request,
    table: LatencyTable,
    limits_ms: tuple[float, float],
    around: Mapping[str, int] | None,
) -> Allocation:
    """Return the widths of most value by what layers cost in a network of about these widths.

    Costs depend a little on the plan that they lead to. Without a plan to start from, they are
    those of the full network or, where no plan meets the target at these, of the narrowest; then
    the plan is made anew at its own costs until it stays the same, a few times at most. Of these
    plans the most valuable is taken that is predicted to take what it may at its own costs, or the
    fastest.

    Args:
        request: what is planned.
        table: latencies measured so far.
        limits_ms: what the plan should be predicted to take, and what it may take where that is
            impossible.
        around: widths of the plan before; None: there is none.

    Raises:
        PlanError: no plan meets the target.
    """
    layers, inputs = request.subject.layers, request.inputs
    spend_ms, target_ms = limits_ms

    def found(near: Mapping[str, int] | None) -> Allocation:
        costs = predicting.costs(table, layers, inputs.candidates, near)
        limit_s = request.section.time_limit_s
        return allocate(inputs, costs, 1000 * target_ms, 1000 * spend_ms, limit_s)

    if around is not None:
        return found(around)
    try:
        tried = [found(None)]
    except PlanError:  # at the costs of a network that is much larger than any plan
        tried = [found({name: min(widths) for name, widths in inputs.candidates.items()})]
    for _ in range(MOST_REPLANS):
        try:
            allocation = found(tried[-1].widths)
        except PlanError:  # it was possible a moment ago: measuring tells
            break
        if any(allocation.widths == before.widths for before in tried):
            break
        tried.append(allocation)
    taking_ms = [predicting.predict_plan_ms(table, layers, one.widths) for one in tried]
    meeting = [one for one, ms in zip(tried, taking_ms, strict=True) if ms <= spend_ms]
    if meeting:
        return max(meeting, key=lambda one: one.value)
    return tried[taking_ms.index(min(taking_ms))]


def plan_of(request: Request, table: LatencyTable, allocation: Allocation) -> Plan:
    """Return the plan of these widths, explained by what layers cost at them."""
    inputs = request.inputs
    return make_plan(
        inputs,
        predicting.costs(table, request.subject.layers, inputs.candidates, allocation.widths),
        allocation,
        target_ms=request.target_ms(table),
        baseline_ms=request.full_ms(table),
        objective=request.section.objective,
    )


def is_pruned(plan: Plan) -> bool:
    """Tell whether a plan removes anything."""
    return any(choice.width < choice.full for choice in plan.choices)

"""The choice of widths as an exact mixed-integer program, solved by HiGHS with its gap."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import OptimizeResult

from hardware.graph.channel_map import Branch, ChannelMap
from hardware.latency.predict import Candidates, LayerCost
from pipeline.errors import PlanError
from pipeline.planning.program import CostModel, Program, model_costs
from pipeline.records import Array, Floor, PlanningInputs, Values

# HiGHS stops at an absolute gap of 1e-6, so the objective is scaled until that is nothing.
OBJECTIVE_RANGE = 1e4
ROUNDING = 1e-6  # relative; what the solver's sums may be off
INFEASIBLE = 2  # status of scipy.optimize.milp; 0 = proven best, 1 = limit reached


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The widths that keep the most value within the target, and how certain that is."""

    widths: dict[str, int]  # of every group with candidates
    value: float
    bound: float  # no widths within the target are worth more
    gap: float  # (bound - value) / |value|; 0 = proven best
    cost_us: float
    seconds: float


def allocate(
    inputs: PlanningInputs,
    costs: Sequence[LayerCost],
    target_us: float,
    spend_us: float | None = None,
    time_limit_s: float = 60.0,
) -> Allocation:
    """Return the widths of most value whose costs add up to what may be spent at most.

    Every group takes exactly one of its candidate widths; width 0 only where a branch is emptied,
    which empties all groups of the branch. A layer that depends on two groups costs
    `sum_ij cost[i, j] * x_i * z_j`; the products are exact linear variables `y_ij` with
    `sum_j y_ij = x_i` and `sum_i y_ij = z_j`. Where values are flat, the wider width is preferred
    (by a billionth of the range of values per width), and what is still free in the end is given
    back by `give_back`. Where no widths cost as little as may be spent, but some meet the target,
    the most valuable of the fastest widths are taken.

    Args:
        inputs: candidates, their values, the branches, and the floors that errors name.
        costs: of every layer, over the candidates of the groups that it depends on.
        target_us: the latency allowed, microseconds.
        spend_us: what a plan should cost, at most the target; None: the target.
        time_limit_s: for the solver; past it the best found so far, with its gap.

    Returns:
        The allocation, with gap 0 where it is proven best.

    Raises:
        PlanError: no widths meet the target, or none were found in time.
    """
    started = time.perf_counter()
    candidates, values = inputs.candidates, inputs.values
    model = model_costs(candidates, costs)
    program = Program(model, _branches_of(inputs.channels, candidates))
    worth = program.spread(_worth(candidates, values))
    scale = _scale(worth)
    limit_us = target_us if spend_us is None else spend_us
    result = program.solve(-worth * scale, limit_us, time_limit_s)
    if result.status == INFEASIBLE:
        fastest = program.solve(program.cost_us, None, time_limit_s)
        least_us = math.inf if fastest.x is None else model.total_us(program.choice(fastest.x))
        if limit_us >= target_us or least_us > target_us:
            raise PlanError(_what_can_be_met(program, fastest, target_us, inputs.floors))
        limit_us = min(least_us * (1 + ROUNDING), target_us)
        result = program.solve(-worth * scale, limit_us, time_limit_s)
    if result.x is None:
        raise PlanError(
            f"No plan was found within {time_limit_s:g} s for {target_us / 1000:.4f} ms "
            f"({result.message}). Raise plan.time_limit_s, or plan.step for fewer candidates."
        )
    choice = give_back(model, values, program.choice(result.x), limit_us)
    value = sum(values[group][candidates[group][index]] for group, index in choice.items())
    bound = max(value, -float(result.mip_dual_bound) / scale) if result.status else value
    return Allocation(
        widths={group: candidates[group][index] for group, index in choice.items()},
        value=value,
        bound=bound,
        gap=(bound - value) / max(abs(value), np.finfo(float).tiny) if bound > value else 0.0,
        cost_us=model.total_us(choice),
        seconds=time.perf_counter() - started,
    )


def give_back(
    model: CostModel, values: Values, choice: Mapping[str, int], target_us: float
) -> dict[str, int]:
    """Return the choice with every filter given back whose removal buys no time.

    A group is widened as long as a wider candidate costs no more in all, and is worth no less.
    Emptied groups stay empty: that is a decision about their branch.

    Args:
        model: the costs.
        values: what each width is worth.
        choice: per group an index into its candidates.
        target_us: never exceeded by widening.
    """
    found, spent = dict(choice), model.total_us(choice)
    changed = True
    while changed:
        changed = False
        for group, widths in model.candidates.items():
            for index in range(len(widths) - 1, found[group], -1):
                wider = {**found, group: index}
                cost = model.total_us(wider)
                gain = values[group][widths[index]] - values[group][widths[found[group]]]
                if widths[found[group]] and cost <= spent and cost <= target_us and gain >= 0:
                    found, spent, changed = wider, cost, True
                    break
    return found


def _branches_of(channels: ChannelMap, candidates: Candidates) -> list[Branch]:
    """Return the branches whose groups may all take width 0."""
    return [
        branch
        for branch in channels.branches
        if branch.groups and all(0 in candidates.get(group, ()) for group in branch.groups)
    ]


def _worth(candidates: Candidates, values: Values) -> dict[str, Array]:
    """Return the values per group as an array over its candidates, wider ones a trace better.

    Raises:
        PlanError: a value is missing or not a number.
    """
    worth: dict[str, Array] = {}
    for group, widths in candidates.items():
        if missing := [width for width in widths if width not in values.get(group, {})]:
            raise PlanError(f"Group {group} has no value at widths {missing}.")
        worth[group] = np.array([values[group][width] for width in widths], dtype=np.float64)
        if not np.isfinite(worth[group]).all():
            raise PlanError(
                f"Group {group} has values that are not numbers: {worth[group].tolist()} at widths "
                f"{list(widths)}. Check the network's weights and the calibration images."
            )
    trace = 1e-9 * sum(float(np.ptp(line)) for line in worth.values())
    return {group: line + trace * np.arange(len(line)) for group, line in worth.items()}


def _scale(worth: Array) -> float:
    extent = float(np.ptp(worth))
    return OBJECTIVE_RANGE / extent if extent > 0 else 1.0


def _what_can_be_met(
    program: Program, fastest: OptimizeResult, target_us: float, floors: Sequence[Floor]
) -> str:
    """Return the error's text: the least latency, who is at the floor there, and what to change."""
    model = program.model
    text = f"No widths meet the target of {target_us / 1000:.4f} ms."
    if fastest.x is None:
        return f"{text} The least latency was not found in time ({fastest.message})."
    choice = program.choice(fastest.x)
    least_us, full_us = model.total_us(choice), model.total_us(model.full())
    floor_of = {floor.group: floor.floor for floor in floors}
    shares = _shares(model, choice)
    binding = [
        f"{group} ({model.candidates[group][index]} of {model.candidates[group][-1]} filters"
        + (f", floor {floor_of[group]}" if group in floor_of else "")
        + f", {100 * shares[group]:.0f} % of that time)"
        for group, index in sorted(choice.items(), key=lambda item: -shares[item[0]])
        if index == _narrowest(model.candidates[group]) and model.candidates[group][index]
    ]
    more = f" and {len(binding) - 6} more" if len(binding) > 6 else ""
    return (
        f"{text} The least that can be met above the redundancy floors is "
        f"{least_us / 1000:.4f} ms, "
        f"{100 * least_us / full_us:.1f} % of the full network's {full_us / 1000:.4f} ms. "
        f"At their narrowest there: {', '.join(binding[:6]) or 'none'}{more}. "
        "Raise target.latency_ms or target.latency_ratio; or allow more: "
        "plan.empty_branches: true, a smaller plan.step, or plan.redundancy: none for no floors."
    )


def _narrowest(widths: Sequence[int]) -> int:
    """Return the index of the least width that is not 0."""
    return 1 if widths[0] == 0 else 0


def _shares(model: CostModel, choice: Mapping[str, int]) -> dict[str, float]:
    """Return each group's share of the cost; a layer of two groups counts half to each."""
    cost = dict.fromkeys(model.candidates, 0.0)
    for group, line in model.single_us.items():
        cost[group] += float(line[choice[group]])
    for (one, two), table in model.pair_us.items():
        for group in (one, two):
            cost[group] += float(table[choice[one], choice[two]]) / 2
    total = max(model.total_us(choice), np.finfo(float).tiny)
    return {group: part / total for group, part in cost.items()}

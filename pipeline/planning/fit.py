"""From a network and a target to a plan that rests on measurements: plan, measure, plan again.

This file, `delivering.py` and `run.py` put stages together; stages do not know one another.
"""

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from hardware.graph.carve import carve
from hardware.graph.channel_map import ChannelMap
from hardware.latency import predict as predicting
from hardware.latency import sweep as sweeping
from hardware.latency.end_to_end import LOADS, time_engines
from hardware.latency.table import LatencyTable
from hardware.latency.variant import Template, digest_of
from hardware.records import Record
from hardware.runtimes.base import EngineSettings, Runtime
from pipeline import criteria, redundancy
from pipeline.diagnosis.diagnose import applicability_warning, inapplicable_groups
from pipeline.errors import PlanError, RecipeError
from pipeline.evidence.sensitivity import measure_damage
from pipeline.evidence.views import group_views
from pipeline.networks.analyse import Subject
from pipeline.planning import widths as planning
from pipeline.planning.solve import Allocation
from pipeline.recipe import PlanSection, Recipe
from pipeline.records import Floor, Plan
from pipeline.redundancy.graph import removals
from pipeline.tasks.data import Data

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
# Names a stage and yields its progress callback.
Stages = Callable[[str], AbstractContextManager[Progress]]
Values = Mapping[str, Mapping[int, float]]
Entry = TypeVar("Entry")

# A plan aims a little below the target; the loop ends when one uses at least this share of it,
# or when what the planner may spend is known this closely.
AIM = 0.985
LEAST_USED = 0.97
CLOSED = 0.004
SETTLING = 3  # plans anew, at most, before the first one is measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What measures: a runtime with its settings, and the table that it fills."""

    runtime: Runtime
    settings: EngineSettings
    path: Path
    minutes: float = 1.0  # that a sweep takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the planner trades: the widths a group may have, and what each is worth."""

    floors: tuple[Floor, ...]
    saliency: Mapping[str, Tensor]
    candidates: Mapping[str, tuple[int, ...]]
    values: Values
    blind: frozenset[str] = frozenset()  # groups in which the criterion is no more than chance


class Round(Record):
    """One turn of the loop: what a plan was predicted to take, and what it took."""

    predicted_ms: float
    measured_ms: float
    value: float


@dataclass(frozen=True, slots=True)
class Aims:
    """What the planner may spend, as a share of the target: found by bracketing.

    A table is not exact, least of all about the plan that an optimizer picks: it picks where the
    table errs in its favour. So a plan that took too long narrows the bracket from above, one that
    met the target from below.
    """

    aim: float = AIM
    low: float = 0.0  # the largest aim whose plan met the target
    high: float = math.inf  # the least whose plan did not

    @property
    def is_closed(self) -> bool:
        """No aim in between is worth another build."""
        return self.high - self.low <= CLOSED

    def after(self, used: float) -> "Aims":
        """Return the next aim, after a plan that took `used` of the target."""
        if used <= 1:
            low, high = max(self.low, self.aim), self.high if self.aim < self.high else math.inf
        else:
            low, high = self.low if self.low < self.aim else 0.0, min(self.high, self.aim)
        aim = self.aim * AIM / used
        if not low < aim < high:
            aim = (low + high) / 2
        return Aims(aim, low, high)


class FittedPlan(Record):
    """A plan, and the measurements that it was fitted to."""

    plan: Plan
    floors: tuple[Floor, ...]
    loop: tuple[Round, ...]
    warning: str | None = None  # where the criterion chose by chance among many channels


def weigh(
    subject: Subject, data: Data, section: PlanSection, cache: Path, seed: int, progress: Progress
) -> Wishes:
    """Return floors by redundancy, candidate widths, and what each width is worth.

    Raises:
        RecipeError: there is no such criterion or measure.
    """
    network, channels = subject.network, subject.channels
    criterion = _named(criteria.CRITERIA, section.criterion, "plan.criterion")
    measure = _named(redundancy.MEASURES, section.redundancy, "plan.redundancy")
    batches = tuple(data.calibration(section.calibration_images, seed))
    wanted = (criteria.NEEDS.get(section.criterion), redundancy.NEEDS.get(section.redundancy))
    views = group_views(network, channels, batches, needs=[need for need in wanted if need])
    floors = tuple(measure(view) for view in views)
    saliency = {view.name: criterion(view) for view in views}
    candidates = planning.candidate_widths(
        channels, floors, step=section.step, empty_branches=section.empty_branches
    )
    if section.objective == "saliency":
        values: Values = planning.values_from_saliency(saliency, candidates)
    elif section.objective == "redundancy":
        values = planning.values_from_removals(removals(views), candidates)
    else:
        damage = measure_damage(
            network, channels, saliency, candidates, batches, progress=progress, cache=cache
        )
        values = planning.values_from_damage(damage, candidates)
    return Wishes(
        floors=floors,
        saliency=saliency,
        candidates=candidates,
        values=values,
        blind=inapplicable_groups(views, section.criterion, criterion, saliency),
    )


def _named(known: Mapping[str, Entry], name: str, key: str) -> Entry:
    """Return the entry of that name.

    Raises:
        RecipeError: there is none.
    """
    if name not in known:
        raise RecipeError(f"{key} is {name!r}; there are {', '.join(known)}.")
    return known[name]


def profile(
    subject: Subject,
    candidates: Mapping[str, tuple[int, ...]],
    bench: Bench,
    table: LatencyTable,
    seed: int,
    progress: Progress,
) -> LatencyTable:
    """Return the table with every layer of the network measured at designed widths, in context."""
    goal = sweeping.Goal(candidates=candidates, minutes=bench.minutes, seed=seed)
    return sweeping.sweep(_place(subject, bench), goal, table, progress)


def _place(subject: Subject, bench: Bench) -> sweeping.Place:
    """Return where the network is measured: as its template, on the device, into the table."""
    return sweeping.Place(
        template=Template(model=subject.template, channels=subject.channels, layers=subject.layers),
        runtime=bench.runtime,
        settings=bench.settings,
        path=bench.path,
    )


def fit_plan(
    subject: Subject,
    wishes: Wishes,
    bench: Bench,
    table: LatencyTable,
    share: float,
    recipe: Recipe,
    progress: Progress,
) -> FittedPlan:
    """Return the best plan whose measured latency meets the target.

    Plans, measures the planned network as a whole and layer by layer, and plans again with what
    was measured, until a plan rests on measured entries only, meets the target when timed as
    thoroughly as a delivered engine, and uses at least 97 % of it; or, after
    `rounds_of_measuring` turns, the most valuable measured plan that does.

    Args:
        subject: the network to narrow.
        wishes: floors, candidates and their values.
        bench: the device's side.
        table: latencies measured so far; extended on disk.
        share: the target, as a share of the full network's latency.
        recipe: for the planner's options.
        progress: told after every turn.

    Raises:
        PlanError: no plan meets the target, in the table's prediction or as measured.
    """
    loop: list[Round] = []
    best: Plan | None = None
    aims, around = Aims(), None
    target_ms = share * table.full_ms(digest_of(subject.template))
    for turn in range(1, recipe.plan.rounds_of_measuring + 1):
        try:
            spend_ms = aims.aim * target_ms
            table, plan, done = _turn(subject, wishes, bench, table, spend_ms, around, recipe)
        except PlanError:
            if best is None:
                raise
            break
        if done.measured_ms <= target_ms:  # worth a closer look: training for it takes long
            measured_ms = _confirmed(subject, plan, bench) * plan.baseline_ms
            done = done.model_copy(update={"measured_ms": measured_ms})
        loop.append(done)
        progress(turn, recipe.plan.rounds_of_measuring, _told(done, target_ms))
        used = done.measured_ms / target_ms
        if used <= 1 and (best is None or plan.value > best.value):
            best = plan
        aims, around = aims.after(used), plan.widths
        enough = LEAST_USED <= used <= 1 or aims.is_closed or not is_pruned(plan)
        if best is not None and enough:
            break
    if best is None:
        raise PlanError(
            f"None of {len(loop)} measured plans took {target_ms:.4f} ms or less; the last took "
            f"{loop[-1].measured_ms:.4f} ms. Raise the target, or plan.rounds_of_measuring."
        )
    best = best.model_copy(update={"target_ms": target_ms})
    return FittedPlan(
        plan=best,
        floors=wishes.floors,
        loop=tuple(loop),
        warning=applicability_warning(best, wishes.blind, recipe.plan.criterion),
    )


def _turn(
    subject: Subject,
    wishes: Wishes,
    bench: Bench,
    table: LatencyTable,
    spend_ms: float,
    around: Mapping[str, int] | None,
    recipe: Recipe,
) -> tuple[LatencyTable, Plan, Round]:
    """Plan for a latency, measure that plan, and explain it by the table that knows it now."""
    baseline_ms = table.full_ms(digest_of(subject.template))
    allocation = allocate_settled(subject, wishes, table, spend_ms, around, recipe.plan)
    predicted_ms = predicting.predict_plan_ms(table, subject.layers, allocation.widths)
    table, measured_share = _measure(subject, allocation.widths, bench, table)
    plan = planning.make_plan(
        subject.channels,
        wishes.floors,
        wishes.saliency,
        wishes.candidates,
        wishes.values,
        predicting.costs(table, subject.layers, wishes.candidates, allocation.widths),
        allocation,
        target_ms=spend_ms,
        baseline_ms=baseline_ms,
        objective=recipe.plan.objective,
    )
    done = Round(
        predicted_ms=predicted_ms,
        measured_ms=measured_share * baseline_ms,
        value=allocation.value,
    )
    return table, plan, done


def allocate_settled(
    subject: Subject,
    wishes: Wishes,
    table: LatencyTable,
    spend_ms: float,
    around: Mapping[str, int] | None,
    section: PlanSection,
) -> Allocation:
    """Return the widths of most value by what layers cost in a network of about these widths.

    Costs depend a little on the plan that they lead to. Without a plan to start from, they are
    those of the full network, where no plan meets the target at these, of the narrowest; then the
    plan is made anew at its own costs until it stays the same, a few times at most. Of these plans
    the most valuable is taken that meets the target at its own costs.

    Args:
        subject: the network to narrow.
        wishes: floors, candidates and their values.
        table: latencies measured so far.
        spend_ms: what the plan may be predicted to take.
        around: widths of the plan before; None: there is none.
        section: the planner's options.

    Raises:
        PlanError: no plan meets the target.
    """

    def found(near: Mapping[str, int] | None) -> Allocation:
        return planning.allocate(
            subject.channels,
            wishes.candidates,
            wishes.values,
            predicting.costs(table, subject.layers, wishes.candidates, near),
            target_us=1000 * spend_ms,
            time_limit_s=section.time_limit_s,
            floors=wishes.floors,
        )

    if around is not None:
        return found(around)
    try:
        allocation = found(None)
    except PlanError:  # at the costs of a network that is much larger than any plan
        allocation = found({name: min(widths) for name, widths in wishes.candidates.items()})
    tried = [allocation]
    for _ in range(SETTLING):
        try:
            allocation = found(tried[-1].widths)
        except PlanError:  # it was possible a moment ago: measuring tells
            break
        if any(allocation.widths == before.widths for before in tried):
            break
        tried.append(allocation)
    meeting = [
        one
        for one in tried
        if predicting.predict_plan_ms(table, subject.layers, one.widths) <= spend_ms
    ]
    return max(meeting, key=lambda one: one.value) if meeting else tried[-1]


def _measure(
    subject: Subject, widths: Mapping[str, int], bench: Bench, table: LatencyTable
) -> tuple[LatencyTable, float]:
    """Return the table with one more variant, and its share of the full network's latency."""
    table, variant = sweeping.measure(_place(subject, bench), widths, table)
    table.save(bench.path)
    # Both were timed in turns, so their ratio is free of the machine's drift.
    return table, variant.end_to_end.median_ms / variant.full_ms


def _confirmed(subject: Subject, plan: Plan, bench: Bench) -> float:
    """Return the planned network's share of the latency, timed as the delivered one will be.

    A plan is chosen because its one measurement was low, so that is low by chance as a rule.
    """
    narrowed = carve(subject.template, subject.channels, plan.keep)
    baselines, delivered = (
        [bench.runtime.build(model, bench.settings) for _ in range(LOADS)]
        for model in (subject.template, narrowed)
    )
    timing = time_engines(baselines, delivered)
    return timing.delivered.median_ms / timing.baseline.median_ms


def _told(turn: Round, target_ms: float) -> str:
    text = f"predicted {turn.predicted_ms:.4g}, measured {turn.measured_ms:.4g}"
    log.info("%s ms", text)
    return f"{text} of {target_ms:.4g} ms"


def is_pruned(plan: Plan) -> bool:
    """Tell whether a plan removes anything."""
    return any(choice.width < choice.full for choice in plan.choices)


def full_widths(channels: ChannelMap) -> dict[str, int]:
    """Return the width of every prunable group, unpruned."""
    return {group.name: group.width for group in channels.prunable}

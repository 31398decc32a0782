"""The whole program: every stage in order, each finished one saved, a killed run continued."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hardware.graph.channel_map import Keep
from hardware.latency.end_to_end import time_engines
from hardware.latency.table import LatencyTable, open_table
from hardware.runtimes import check_measurable, get_runtime
from hardware.runtimes.base import EngineSettings
from pipeline.delivery.deliver import Shaped, deliver
from pipeline.networks.analyse import Subject, analyse
from pipeline.networks.load import load_network
from pipeline.planning import widths as planning
from pipeline.planning.away import is_away, plan_from_table, refuse_away
from pipeline.planning.fit import (
    Bench,
    FittedPlan,
    Progress,
    Stages,
    fit_plan,
    profile,
    weigh,
)
from pipeline.recipe import Recipe
from pipeline.records import EpochRecord, Network, Verdict
from pipeline.surgery.proof import prove
from pipeline.surgery.remove import prune
from pipeline.tasks.data import Data, load_data
from pipeline.training.stages import finetune, sparsify
from pipeline.training.training import TrainingJob
from pipeline.workspace import Workspace

log = logging.getLogger(__name__)

# A delivered engine that misses its target is planned again, trained again, at most so often.
ATTEMPTS = 3


@contextmanager
def quiet(_stage: str) -> Iterator[Progress]:
    """Show nothing: the default of the functions below when they are used from Python."""
    yield lambda done, total, text: None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A recipe with everything that it names loaded."""

    recipe: Recipe
    network: Network  # as the user brought it: the teacher
    data: Data
    subject: Subject
    bench: Bench
    table: LatencyTable


def compress(recipe: Recipe, stages: Stages = quiet, *, restart: bool = False) -> Verdict:
    """Run every stage in order; `recipe.out` then holds the model, the engine and the report.

    The same call after a kill continues from the last finished stage or epoch. A delivered engine
    that misses its latency target is planned again with the target tightened by what was measured.

    Args:
        recipe: what to do.
        stages: told of every stage and its progress.
        restart: discard what an earlier run left in `recipe.out`.

    Raises:
        PipelineError, HardwareError: with what happened and what to do.
    """
    refuse_away(recipe.target, "the engine")
    place = Workspace(recipe, restart=restart)
    if (done := place.load(Verdict, "verdict")) is not None:
        return done
    job = prepare(recipe, stages)
    share = target_share(job)
    for attempt in range(1, ATTEMPTS + 1):
        shaped = shape(job, place, f"attempt-{attempt}", share, stages)
        verdict = deliver(job.subject, shaped, job.data, job.bench, recipe, stages)
        if verdict.measured_ms <= verdict.target_ms:
            break
        log.warning("attempt %d: %s; planning again", attempt, verdict.reasons[0])
        share *= verdict.target_ms / verdict.measured_ms
    place.save(verdict, "verdict")
    return verdict


def make_plan(recipe: Recipe, stages: Stages = quiet, *, restart: bool = False) -> FittedPlan:
    """Run everything up to the first plan; no weight is changed. `compress` continues from it.

    For a device that is another machine the plan rests on that device's table alone.
    """
    if is_away(recipe.target):
        return _with_warning(plan_from_table(recipe, stages, restart=restart))
    place = Workspace(recipe, restart=restart)
    job = prepare(recipe, stages)
    return plan_round(job, job.subject, place, "attempt-1-round-1", target_share(job), stages)


def make_table(recipe: Recipe, stages: Stages = quiet) -> tuple[Path, LatencyTable]:
    """Measure the recipe's network at designed widths; return the latency table and its path."""
    refuse_away(recipe.target, "its latency table")
    job = prepare(recipe, stages)
    candidates = planning.candidate_widths(
        job.subject.channels, (), recipe.plan.step, recipe.plan.empty_branches
    )
    with stages("Measuring latency on the device") as progress:
        table = profile(job.subject, candidates, job.bench, job.table, recipe.seed, progress)
    return job.bench.path, table


def prepare(recipe: Recipe, stages: Stages) -> Job:
    """Load the network and the images, find the pruning groups, open the device's table."""
    target = recipe.target
    runtime = get_runtime(target.runtime)
    settings = EngineSettings(precision=target.precision, threads=target.threads)
    check_measurable(runtime, settings)
    table, path = open_table(recipe.profiles, target.table, runtime, settings, target.batch)
    with stages("Loading the network") as progress:
        network = load_network(recipe.model)
        progress(1, 1, network.spec)
    with stages("Loading the images") as progress:
        data = load_data(recipe.data, network.input_shape, recipe.seed, progress)
    with stages("Finding pruning groups") as progress:
        subject = analyse(network, target.batch, recipe.surgery)
        prunable = len(subject.channels.prunable)
        progress(1, 1, f"{prunable} groups can be pruned, in {subject.form.taken} form")
    bench = Bench(runtime=runtime, settings=settings, path=path, minutes=target.table_minutes)
    return Job(recipe=recipe, network=network, data=data, subject=subject, bench=bench, table=table)


def target_share(job: Job) -> float:
    """Return the target as a share of the full network's latency on this device."""
    target = job.recipe.target
    if target.latency_ratio is not None:
        return target.latency_ratio
    assert target.latency_ms is not None  # the recipe demands one of the two
    engine = job.bench.runtime.build(job.subject.template, job.bench.settings)
    baseline_ms = time_engines([engine], [engine]).baseline.median_ms
    return min(1.0, target.latency_ms / baseline_ms)


def shape(job: Job, place: Workspace, name: str, share: float, stages: Stages) -> Shaped:
    """Return the network after all rounds of planning, pruning and fine-tuning.

    With several rounds, the latency falls by the same factor in each: first the widths of all
    layers are chosen, then the filters within them; after fine-tuning, floors, saliency and damage
    are estimated anew. That is the hierarchical schedule of Zhou et al., "A Hierarchical Pruning
    Algorithm by Effective Filters", 2022, arXiv:2206.03596 (its order is in a summary; the steps of
    latency, and an exact choice of the widths, are ours).
    """
    rounds, form = job.recipe.plan.rounds, job.subject.form.taken
    current, keep = job.subject.network, everything(job.subject)
    proof_error, predicted_share = 0.0, 1.0
    epochs: list[EpochRecord] = []
    sparse_epochs: list[EpochRecord] = []
    for number in range(1, rounds + 1):
        label = f"{name}-round-{number}"
        subject = job.subject if number == 1 else analyse(current, job.recipe.target.batch, form)
        fitted = plan_round(job, subject, place, label, share ** (1 / rounds), stages)
        if job.recipe.sparsify.method != "none":
            with stages("Sparsifying") as progress:
                training = training_job(job, current, place.state / f"{label}-sparse", progress)
                section, chosen = job.recipe.sparsify, fitted.plan.keep
                sparse = sparsify(training, section, subject.channels, chosen)
            current, fitted = sparse.network, keeping(fitted, sparse.keep)
            sparse_epochs += sparse.epochs
        with stages("Pruning, and proving it") as progress:
            pruned = prune(current, subject.channels, fitted.plan.keep)
            error = prove(current, subject.channels, fitted.plan.keep)
            progress(1, 1, f"removed and masked agree to {error:.0e}")
        with stages("Fine-tuning") as progress:
            training = training_job(job, pruned, place.state / label, progress)
            current, history = finetune(training, job.recipe.finetune)
        keep = compose(keep, fitted.plan.keep)
        proof_error = max(proof_error, error)
        predicted_share *= fitted.plan.predicted_ms / fitted.plan.baseline_ms
        epochs += history
    return Shaped(
        network=current,
        fitted=fitted,
        keep=keep,
        predicted_share=predicted_share,
        proof_error=proof_error,
        epochs=tuple(epochs),
        sparse_epochs=tuple(sparse_epochs),
    )


def plan_round(
    job: Job, subject: Subject, place: Workspace, label: str, share: float, stages: Stages
) -> FittedPlan:
    """Return the saved plan of this round, or make it: weigh, measure the device, plan."""
    if (done := place.load(FittedPlan, f"{label}-plan")) is not None:
        return _with_warning(done)
    recipe = job.recipe
    with stages("Measuring what each filter is worth") as progress:
        cache = place.state / f"{label}-damage.json"
        wishes = weigh(subject, job.data, recipe.plan, cache, recipe.seed, progress)
    with stages("Measuring latency on the device") as progress:
        table = profile(subject, wishes.candidates, job.bench, job.table, recipe.seed, progress)
    with stages("Planning") as progress:
        fitted = fit_plan(subject, wishes, job.bench, table, share, recipe, progress)
    place.save(fitted, f"{label}-plan")
    return _with_warning(fitted)


def _with_warning(fitted: FittedPlan) -> FittedPlan:
    """Return the plan after saying aloud what is doubtful about it."""
    if fitted.warning is not None:
        log.warning("%s", fitted.warning)
    return fitted


def training_job(job: Job, network: Network, folder: Path, progress: Progress) -> TrainingJob:
    """Return the training of a network on the recipe's images, taught by the original network."""
    return TrainingJob(
        network=network,
        teacher=job.network,
        data=job.data,
        folder=folder,
        seed=job.recipe.seed,
        progress=progress,
    )


def keeping(fitted: FittedPlan, keep: Keep) -> FittedPlan:
    """Return the same widths with another choice of units."""
    return fitted.model_copy(update={"plan": fitted.plan.model_copy(update={"keep": dict(keep)})})


def everything(subject: Subject) -> dict[str, tuple[int, ...]]:
    """Return the choice that keeps every unit of every prunable group."""
    return {group.name: tuple(range(group.width)) for group in subject.channels.prunable}


def compose(earlier: Keep, later: Keep) -> dict[str, tuple[int, ...]]:
    """Return two rounds of pruning as one choice among the units before the first.

    The later round counts the units that the earlier one left; a group that it does not name
    stays as it was.
    """
    return {
        name: tuple(units[index] for index in later[name]) if name in later else tuple(units)
        for name, units in earlier.items()
    }

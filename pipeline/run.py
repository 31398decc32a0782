"""From a recipe to an engine: every stage in order, each finished one saved for the next call.

Three loops lie inside one another: attempts (`compress`), rounds of pruning and fine-tuning
(`shape`), and turns of planning and measuring (`plan_and_measure`).
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hardware.graph.channel_map import Keep
from hardware.latency.predict import predict_plan_ms
from hardware.latency.table import LatencyTable
from hardware.records import Record
from pipeline.delivery.deliver import Shaped, describe, facts_of, write_engines, write_results
from pipeline.delivery.verify import judge, measure_parity, measure_quality
from pipeline.errors import PlanError
from pipeline.networks.analyse import Subject, analyse
from pipeline.networks.load import load_network
from pipeline.planning.away import is_away, plan_from_table, refuse_away
from pipeline.planning.inputs import gather_inputs
from pipeline.planning.plans import join_rounds
from pipeline.planning.turns import Request, Trial, fitted_plan, next_widths, plan_of
from pipeline.planning.widths import swept_widths
from pipeline.recipe import Recipe
from pipeline.records import EpochRecord, FittedPlan, Network, Progress, Stages, Verdict
from pipeline.rig import Rig, open_rig
from pipeline.surgery.proof import prove
from pipeline.surgery.remove import prune
from pipeline.tasks.data import Data, load_data
from pipeline.tasks.evaluate import require_classes
from pipeline.training.stages import finetune, sparsify
from pipeline.training.training import TrainingJob
from pipeline.workspace import Workspace, open_workspace

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
    rig: Rig


class TargetShare(Record):
    """What the network may take; saved, so that a continued run plans for the same target."""

    share: float  # of the full network's latency
    baseline_ms: float  # of the full network, when a target in milliseconds was held against it


def compress(recipe: Recipe, stages: Stages = quiet, *, restart: bool = False) -> Verdict:
    """Run every stage in order; `recipe.out` then holds the model, the engine and the report.

    The same call after a kill continues from the last finished stage or epoch. A delivered engine
    that misses its latency target is planned again with the target tightened by what was measured.

    Args:
        recipe: what to do.
        stages: shows every stage and its progress.
        restart: discard what an earlier run left in `recipe.out`.

    Raises:
        PipelineError, HardwareError: with what happened and what to do.
    """
    refuse_away(recipe.target, "the engine")
    with open_workspace(recipe, restart=restart) as place:
        if (done := place.load(Verdict, "verdict")) is not None:
            return done
        job = prepare(recipe, stages)
        if recipe.finetune.epochs:  # else only after minutes of measuring
            require_classes(job.network, job.data.classes)
        share = target_share(job, place)
        verdict: Verdict | None = None
        for attempt in range(1, ATTEMPTS + 1):
            name = f"attempt-{attempt}"
            try:
                verdict = place.load(Verdict, f"{name}-verdict") or deliver(
                    job, shape(job, place, name, share, stages), stages
                )
            except PlanError as error:
                if verdict is None:
                    raise
                log.warning("%s cannot be planned, so %s stays: %s", name, recipe.out, error)
                break
            place.save(verdict, f"{name}-verdict")
            if verdict.measured_ms <= verdict.target_ms:
                break
            log.warning("%s: %s; planning again", name, verdict.reasons[0])
            share *= verdict.target_ms / verdict.measured_ms
        assert verdict is not None  # the first attempt delivers or raises
        place.save(verdict, "verdict")
        return verdict


def make_plan(recipe: Recipe, stages: Stages = quiet, *, restart: bool = False) -> FittedPlan:
    """Run everything up to the first plan; no weight is changed. `compress` continues from it.

    For a device that is another machine the plan rests on that device's table alone.
    """
    if is_away(recipe.target):
        return _with_warning(plan_from_table(recipe, stages, restart=restart))
    with open_workspace(recipe, restart=restart) as place:
        job = prepare(recipe, stages)
        share = target_share(job, place) ** (1 / recipe.plan.rounds)
        return plan_round(job, job.subject, place, "attempt-1-round-1", share, stages)


def make_table(recipe: Recipe, stages: Stages = quiet) -> tuple[Path, LatencyTable]:
    """Measure the recipe's network at designed widths; return the latency table and its path."""
    refuse_away(recipe.target, "its latency table")
    job = prepare(recipe, stages)
    with stages("Measuring latency on the device") as progress:
        widths = swept_widths(job.subject.channels, recipe.plan)
        table = job.rig.profile(job.subject, widths, recipe.seed, progress)
    return job.rig.path, table


def prepare(recipe: Recipe, stages: Stages) -> Job:
    """Load the network and the images, find the pruning groups, open the device's table."""
    rig = open_rig(recipe)
    with stages("Loading the network") as progress:
        network = load_network(recipe.model)
        progress(1, 1, network.spec)
    with stages("Loading the images") as progress:
        data = load_data(recipe.data, network.input_shape, recipe.seed, progress)
    with stages("Finding pruning groups") as progress:
        subject = analyse(network, recipe.target.batch, recipe.surgery)
        prunable = len(subject.channels.prunable)
        progress(1, 1, f"{prunable} groups can be pruned, in {subject.form.taken} form")
    return Job(recipe=recipe, network=network, data=data, subject=subject, rig=rig)


def target_share(job: Job, place: Workspace) -> float:
    """Return the target as a share of the full network's latency on this device."""
    target = job.recipe.target
    if target.latency_ratio is not None:
        return target.latency_ratio
    assert target.latency_ms is not None  # the recipe demands one of the two
    if (saved := place.load(TargetShare, "target")) is not None:
        return saved.share
    baseline_ms = job.rig.baseline_ms(job.subject)
    share = min(1.0, target.latency_ms / baseline_ms)
    place.save(TargetShare(share=share, baseline_ms=baseline_ms), "target")
    return share


def shape(job: Job, place: Workspace, name: str, share: float, stages: Stages) -> Shaped:
    """Return the network after all rounds of planning, pruning and fine-tuning.

    With several rounds, the latency falls by the same factor in each: first the widths of all
    layers are chosen, then the filters within them; after fine-tuning, floors, saliency and damage
    are estimated anew. That is the hierarchical schedule of Zhou et al., "A Hierarchical Pruning
    Algorithm by Effective Filters", 2022, arXiv:2206.03596 (its order is in a summary; the steps of
    latency, and an exact choice of the widths, are ours).
    """
    recipe, current, subject = job.recipe, job.subject.network, job.subject
    whole: FittedPlan | None = None  # of all rounds so far, for the original network
    proof_error = 0.0
    epochs: list[EpochRecord] = []
    sparse_epochs: list[EpochRecord] = []
    for number in range(1, recipe.plan.rounds + 1):
        label = f"{name}-round-{number}"
        if number > 1:
            subject = analyse(current, recipe.target.batch, job.subject.form.taken)
        fitted = plan_round(job, subject, place, label, share ** (1 / recipe.plan.rounds), stages)
        if recipe.sparsify.method != "none":
            with stages("Sparsifying") as progress:
                training = training_job(job, current, place.state / f"{label}-sparse", progress)
                section, chosen = recipe.sparsify, fitted.plan.keep
                sparse = sparsify(training, section, subject.channels, chosen)
            current, fitted = sparse.network, keeping(fitted, sparse.keep)
            sparse_epochs += sparse.epochs
        whole = (
            fitted
            if whole is None
            else join_rounds(whole, job.subject.channels, fitted, subject.channels, number)
        )
        with stages("Pruning, and proving it") as progress:
            pruned = prune(current, subject.channels, fitted.plan.keep)
            error = prove(current, subject.channels, fitted.plan.keep)
            progress(1, 1, f"removed and masked agree to {error:.0e}")
        with stages("Fine-tuning") as progress:
            training = training_job(job, pruned, place.state / label, progress)
            current, history = finetune(training, recipe.finetune)
        proof_error = max(proof_error, error)
        epochs += history
    assert whole is not None  # a recipe has one round at the least
    return Shaped(
        network=current,
        fitted=whole,
        proof_error=proof_error,
        epochs=tuple(epochs),
        sparse_epochs=tuple(sparse_epochs),
    )


def plan_round(
    job: Job, subject: Subject, place: Workspace, label: str, share: float, stages: Stages
) -> FittedPlan:
    """Return the saved plan of this round, or make it: evidence, latency table, plan.

    Args:
        job: the recipe and what it names.
        subject: the network as this round finds it.
        place: where the plan is saved.
        label: names the round there.
        share: of that network's latency, what the plan may take.
        stages: shows every stage and its progress.
    """
    if (done := place.load(FittedPlan, f"{label}-plan")) is not None:
        return _with_warning(done)
    recipe = job.recipe
    with stages("Measuring what each filter is worth") as progress:
        cache = place.state / f"{label}-damage.json"
        inputs = gather_inputs(subject, job.data, recipe.plan, cache, recipe.seed, progress)
    with stages("Measuring latency on the device") as progress:
        widths = swept_widths(subject.channels, recipe.plan)
        table = job.rig.profile(subject, widths, recipe.seed, progress)
    with stages("Planning") as progress:
        request = Request(subject=subject, inputs=inputs, section=recipe.plan, share=share)
        try:
            fitted = plan_and_measure(request, table, job.rig, progress)
        except PlanError as error:
            raise PlanError(f"{error} (The recipe asks for {recipe.target.asked}.)") from error
    place.save(fitted, f"{label}-plan")
    return _with_warning(fitted)


def plan_and_measure(
    request: Request, table: LatencyTable, rig: Rig, progress: Progress
) -> FittedPlan:
    """Return the best plan whose measured latency meets the target.

    Plans, measures the planned network as a whole and layer by layer, and plans again with what
    was measured, until a plan meets the target when several loads of it are timed for longer, and
    leaves little of it unused, or nothing new is proposed.

    Raises:
        PlanError: no plan meets the target, in the table's prediction or as measured.
    """
    trials: list[Trial] = []
    while (allocation := next_widths(request, table, trials)) is not None:
        predicted_ms = predict_plan_ms(table, request.subject.layers, allocation.widths)
        table, share = rig.measure(request.subject, allocation.widths)
        if share.low <= request.share:  # worth a closer look: training for it takes long
            share = rig.confirm(request.subject, allocation.widths)
        trial = Trial(
            plan=plan_of(request, table, allocation),
            widths=allocation.widths,
            predicted_ms=predicted_ms,
            measured_ms=share.estimate * request.full_ms(table),
            share=share,
        )
        trials.append(trial)
        text = f"predicted {predicted_ms:.4g}, measured {trial.measured_ms:.4g}"
        log.info("turn %d: %s ms", len(trials), text)
        most = request.section.rounds_of_measuring
        progress(len(trials), most, f"{text} of {request.target_ms(table):.4g} ms")
    return fitted_plan(request, trials)


def deliver(job: Job, shaped: Shaped, stages: Stages) -> Verdict:
    """Write model, engine, report and manifest into `recipe.out`; return what was measured on them.

    Raises:
        BuildError: the runtime refused the network.
        StorageError: the folder cannot be written.
    """
    recipe, data = job.recipe, job.data
    with stages("Building the engine") as progress:
        engines = write_engines(job.subject, shaped, job.rig, recipe)
        progress(1, 1, str(engines.path))
    with stages("Verifying latency") as progress:
        timing = job.rig.compare(engines.baselines, engines.delivered, progress)
    with stages("Verifying accuracy") as progress:
        baseline, engine = engines.baselines[0], engines.delivered[0]
        parity = measure_parity(engine, shaped.network, next(data.validation_batches())[0])
        quality = measure_quality(
            baseline, engine, shaped.network, data.test_batches, data.sizes["test"], progress
        )
    facts = facts_of(job.subject, shaped, engines.path, recipe.out)
    verdict = judge(recipe.target, recipe.limits, facts, timing, quality, parity)
    with stages("Writing the report") as progress:
        report = describe(job.subject, shaped, job.rig, recipe, verdict)
        write_results(report, data, job.rig, recipe)
        progress(1, 1, str(recipe.out / "report.html"))
    return verdict


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
    """Return the same widths with another choice of channels."""
    return fitted.model_copy(update={"plan": fitted.plan.model_copy(update={"keep": dict(keep)})})

"""Prune one network by every criterion to the same widths, and fine-tune it with every seed."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.criteria.records import Comparison, Result
from hardware.graph.channel_map import Keep
from hardware.records import load_record, save_record
from pipeline.criteria import CRITERIA
from pipeline.criteria.chance import random
from pipeline.errors import PlanError
from pipeline.evidence.needs import GRADIENTS, RESPONSES
from pipeline.evidence.recalibrate import recalibrate
from pipeline.evidence.sensitivity import most_salient
from pipeline.evidence.views import group_views
from pipeline.recipe import Recipe
from pipeline.records import FittedPlan, GroupView, Network, Stages
from pipeline.run import Job, plan_round, target_share
from pipeline.surgery.remove import prune
from pipeline.tasks.data import Data, load_data
from pipeline.tasks.evaluate import accuracy, torch_predictor
from pipeline.training.stages import RECALIBRATION_IMAGES, finetune
from pipeline.training.training import TrainingJob
from pipeline.workspace import open_workspace

# Small, so that few images give the gradients of many batches.
VIEWED_BATCH = 32


def setting_of(recipe: Recipe, images: int) -> dict[str, object]:
    """Return what the results depend on, besides criterion and seed."""
    sections = ("model", "data", "target", "finetune")
    body = recipe.model_dump(mode="json", include=set(sections))
    return {**body, "calibration_images": images}


def opened(path: Path, setting: Mapping[str, object]) -> Comparison:
    """Return the comparison in a file, or a new one.

    Raises:
        SystemExit: the file holds results of another setting.
        StorageError: it is damaged.
    """
    if not path.exists():
        return Comparison(setting=setting)
    found = load_record(Comparison, path)
    if found.setting != setting:
        keys = [key for key in setting if found.setting.get(key) != setting[key]]
        raise SystemExit(f"{path} holds results of another {', '.join(keys)}. Choose another file.")
    return found


def compare_criteria(
    job: Job, names: tuple[str, ...], seeds: int, path: Path, images: int, stages: Stages
) -> Comparison:
    """Return the results of every criterion and seed at the widths of one plan.

    Every result is saved at once, and what the file holds is not run again.
    """
    recipe = job.recipe
    found = opened(path, setting_of(recipe, images))
    if not found.widths:
        plan, share = _plan(job, stages)
        found = found.model_copy(update={"widths": plan.plan.widths, "plan_share": share})
        found = found.model_copy(update={"baseline_pct": _score(job.subject.network, job.data)})
        save_record(found, path)
    for seed in range(seeds):
        todo = [name for name in names if not found.has("criteria", name, seed)]
        if not todo:
            continue
        data = load_data(recipe.data, job.network.input_shape, seed)
        with stages(f"Looking at {images} images, seed {seed}"):
            views = viewed(job, seed, images)
        for name in todo:
            keep = chosen(views, found.widths, name, seed)
            share = found.plan_share
            result = _trained(job, data, keep, (name, seed, share), "criteria", stages)
            found = found.model_copy(update={"criteria": (*found.criteria, result)})
            save_record(found, path)
    return found


def compare_floors(
    job: Job, names: tuple[str, ...], seeds: int, path: Path, images: int, stages: Stages
) -> Comparison:
    """Return the results with the floors of every measure, all at the same latency.

    Every result is saved at once, and what the file holds is not run again.
    """
    recipe = job.recipe
    found = opened(path, setting_of(recipe, images))
    for name in names:
        todo = [seed for seed in range(seeds) if not found.has("floors", name, seed)]
        if not todo or name in found.impossible:
            continue
        asked = recipe.model_copy(
            update={
                "plan": recipe.plan.model_copy(update={"redundancy": name}),
                "out": recipe.out / f"floors-{name}",
            }
        )
        try:
            fitted, share = _plan(replace(job, recipe=asked), stages)
        except PlanError as error:
            impossible = {**found.impossible, name: str(error)}
            found = found.model_copy(update={"impossible": impossible})
            save_record(found, path)
            continue
        for seed in todo:
            data = load_data(recipe.data, job.network.input_shape, seed)
            keep = fitted.plan.keep
            result = _trained(job, data, keep, (name, seed, share), "floors", stages)
            found = found.model_copy(update={"floors": (*found.floors, result)})
            save_record(found, path)
    return found


def viewed(job: Job, seed: int, images: int) -> tuple[GroupView, ...]:
    """Return the groups with all that criteria need, on calibration images drawn by the seed."""
    recipe = job.recipe
    section = recipe.data.model_copy(update={"batch": VIEWED_BATCH, "augment": ()})
    data = load_data(section, job.network.input_shape, recipe.seed)
    batches = tuple(data.calibration(images, seed))
    network, channels = job.subject.network, job.subject.channels
    return group_views(network, channels, batches, needs=(GRADIENTS, RESPONSES))


def chosen(
    views: tuple[GroupView, ...], widths: Mapping[str, int], name: str, seed: int
) -> dict[str, tuple[int, ...]]:
    """Return the units that a criterion keeps at the plan's widths; chance draws by the seed."""
    criterion = CRITERIA[name]

    def score(view: GroupView) -> torch.Tensor:
        return random(view, seed) if criterion is random else criterion(view)

    return {view.name: most_salient(score(view), widths[view.name]) for view in views}


def _plan(job: Job, stages: Stages) -> tuple[FittedPlan, float]:
    """Return a plan, and the share of the full network's latency that it was measured to take."""
    with open_workspace(job.recipe) as place:
        share = target_share(job, place)
        fitted = plan_round(job, job.subject, place, "plan", share, stages)
    plan = fitted.plan
    turns = [turn.measured_ms for turn in fitted.loop if turn.value == plan.value]
    return fitted, (turns[0] if turns else plan.predicted_ms) / plan.baseline_ms


def _trained(
    job: Job,
    data: Data,
    keep: Keep,
    label: tuple[str, int, float],
    kind: str,
    stages: Stages,
) -> Result:
    """Return the accuracies of one choice of channels before and after fine-tuning."""
    name, seed, share = label
    recipe = job.recipe
    pruned = prune(job.subject.network, job.subject.channels, keep)
    with stages(f"{name}, seed {seed}: before fine-tuning"):
        before = _score(pruned, data)
        anew = recalibrate(pruned, data.calibration(RECALIBRATION_IMAGES, seed))
        recalibrated = _score(anew, data)
    with stages(f"{name}, seed {seed}: fine-tuning") as progress:
        training = TrainingJob(
            network=pruned,
            teacher=job.network,
            data=data,
            folder=recipe.out / kind / f"{name}-{seed}",
            seed=seed,
            progress=progress,
        )
        trained, _ = finetune(training, recipe.finetune)
    with stages(f"{name}, seed {seed}: testing"):
        after = _score(trained, data)
    return Result(
        name=name,
        seed=seed,
        before_pct=before,
        recalibrated_pct=recalibrated,
        after_pct=after,
        parameters=sum(parameter.numel() for parameter in trained.module.parameters()),
        plan_share=share,
    )


def _score(network: Network, data: Data) -> float:
    """Return the accuracy on the test images, %."""
    return accuracy(torch_predictor(network), data.test_batches()).accuracy_pct

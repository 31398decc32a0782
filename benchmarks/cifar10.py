"""Compare Espalier with plain global L2 pruning on a ResNet-20 or ResNet-56 and CIFAR-10.

Both start from the same weights, are pruned to the same measured latency, and are trained with the
same recipe. Global L2 ranks the inner filters of all blocks by their norm over the mean of their
layer, removes the smallest, and removes more until the measured latency fits.

    python -m benchmarks.cifar10 --depth 56 --weights resnet56-cifar10.safetensors \
        --images cifar10 --json benchmarks/results/cifar10-resnet56.json
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console

from espalier import Recipe, StageProgress, compress, read_recipe
from hardware.device import this_device
from hardware.graph.carve import carve
from hardware.graph.channel_map import Keep
from hardware.records import write_whole
from pipeline.criteria import CRITERIA
from pipeline.delivery.deliver import versions
from pipeline.delivery.verify import measure_quality
from pipeline.evidence.views import group_views
from pipeline.networks.export import export_graph
from pipeline.networks.fold_norms import fold_norms
from pipeline.records import Progress, Stages
from pipeline.run import Job, prepare, training_job
from pipeline.surgery.proof import prove
from pipeline.surgery.remove import prune
from pipeline.tasks.evaluate import accuracy, torch_predictor
from pipeline.training.stages import finetune

RECIPE = Path("benchmarks/cifar10.yaml")


def original(recipe: Recipe, stages: Stages) -> dict[str, object]:
    """Return the accuracy of the network as it came, in float32, on the test images."""
    job = prepare(recipe, stages)
    with stages("Testing the original network") as progress:
        score = accuracy(
            torch_predictor(job.network), job.data.test_batches(), progress, job.data.sizes["test"]
        )
    return {"accuracy_pct": score.accuracy_pct, "images": score.images}


def espalier(recipe: Recipe, stages: Stages) -> dict[str, object]:
    """Return what `espalier compress` delivers."""
    verdict = compress(recipe, stages)
    return verdict.model_dump(mode="json", exclude={"engine", "report"})


def global_l2(recipe: Recipe, stages: Stages) -> dict[str, object]:
    """Return what global L2 pruning to the same measured latency and the same training gives."""
    job = prepare(recipe, stages)
    assert recipe.target.latency_ratio is not None  # cifar10.yaml gives a ratio
    with stages("Global L2: pruning until the latency fits") as progress:
        keep, share = fit_threshold(job, recipe.target.latency_ratio, progress)
        pruned = prune(job.network, job.subject.channels, keep)
        error = prove(job.network, job.subject.channels, keep)
    with stages("Global L2: testing before fine-tuning"):
        raw = accuracy(torch_predictor(pruned), job.data.validation_batches())
    with stages("Global L2: fine-tuning") as progress:
        training = training_job(job, pruned, recipe.out / "global-l2", progress)
        trained, epochs = finetune(training, recipe.finetune)
    with stages("Global L2: verifying") as progress:
        model = fold_norms(export_graph(trained, recipe.target.batch))
        baseline, delivered = job.rig.loads(job.subject.template), job.rig.loads(model)
        timing = job.rig.compare(baseline, delivered, progress)
        test_images = job.data.sizes["test"]
        quality = measure_quality(
            baseline[0], delivered[0], trained, job.data.test_batches, test_images, progress
        )
    return {
        "searched_share": share,
        "baseline_ms": timing.baseline.median_ms,
        "measured_ms": timing.delivered.median_ms,
        "speedup": timing.baseline.median_ms / timing.delivered.median_ms,
        "baseline_accuracy_pct": quality.baseline.accuracy_pct,
        "accuracy_pct": quality.delivered.accuracy_pct,
        "validation_before_training_pct": raw.accuracy_pct,
        "proof_error": error,
        "widths": {name: len(units) for name, units in keep.items()},
        "epochs": [epoch.model_dump() for epoch in epochs],
    }


def fit_threshold(job: Job, share: float, progress: Progress) -> tuple[Keep, float]:
    """Return the largest global L2 choice that takes at most `share` of the latency, measured."""
    views = group_views(job.network, job.subject.channels)
    scores = {v.name: CRITERIA["l2"](v) for v in views if len(v.filters) == 1}
    full = job.rig.runtime.build(job.subject.template, job.rig.settings)
    ranked = torch.sort(torch.cat(list(scores.values()))).values
    low, high = 0, len(ranked) - 1
    best: tuple[Keep, float] | None = None
    turns = len(ranked).bit_length()
    for turn in range(1, turns + 1):
        middle = (low + high) // 2
        keep = above(scores, float(ranked[middle]))
        narrowed = carve(job.subject.template, job.subject.channels, keep)
        engine = job.rig.runtime.build(narrowed, job.rig.settings)
        timing = job.rig.compare([full], [engine])
        found = timing.delivered.median_ms / timing.baseline.median_ms
        progress(turn, turns, f"{middle} of {len(ranked)} filters removed: {found:.3f}")
        if found <= share:
            best, high = (keep, found), middle
        else:
            low = middle + 1
        if low >= high:
            break
    if best is None:
        raise SystemExit(f"Global L2 pruning cannot reach {share} of the latency.")
    return best


def above(scores: Mapping[str, torch.Tensor], threshold: float) -> Keep:
    """Return the units that score at least the threshold, in every group at least the best one."""
    kept = {}
    for name, score in scores.items():
        units = torch.nonzero(score >= min(threshold, float(score.max()))).flatten()
        kept[name] = tuple(units.tolist())
    return kept


METHODS = {"original": original, "espalier": espalier, "global-l2": global_l2}


def main() -> None:
    """Run the methods asked for and write what they gave."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=56, choices=(20, 56))
    parser.add_argument("--weights", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    changes = (
        f"model.arguments.depth={options.depth}",
        f"model.weights={options.weights}",
        f"data.source={options.images}",
        *options.set,
    )
    recipe = read_recipe(RECIPE, changes)
    found: dict[str, object] = {}
    if options.json and options.json.exists():
        found = json.loads(options.json.read_text())
    with StageProgress(Console(stderr=True)) as shown:
        for name in options.methods.split(","):
            found[name] = METHODS[name](recipe, shown.stage)
    found["device"] = this_device().model_dump(mode="json")
    found["versions"] = versions()
    found["finetune"] = recipe.finetune.model_dump(mode="json")
    text = json.dumps(found, indent=1)
    if options.json:
        write_whole(options.json, text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()

"""`make demo`: train a small CNN on digits, shape it for this machine twice, and compare.

Writes build/demo/<runtime>/ with verdict.json, report.html, the model and the engine.
"""

import sys
import time
from pathlib import Path

from rich.console import Console
from safetensors.torch import save_file

from espalier import FinetuneSection, Recipe, StageProgress, Verdict, compress, read_recipe
from pipeline.networks.load import load_network
from pipeline.records import Stages
from pipeline.report.tables import comparison_table
from pipeline.tasks.data import load_data
from pipeline.training.stages import finetune
from pipeline.training.training import TrainingJob

RECIPE = Path("benchmarks/demo.yaml")
RUNTIMES = ("ov", "ort")
TRAINING = FinetuneSection(epochs=10, learning_rate=0.05, distill=0.0, recalibrate=False)


def train(recipe: Recipe, stages: Stages) -> None:
    """Train the network of the recipe from scratch, unless its weights are there already."""
    weights = recipe.model.weights
    assert weights is not None  # demo.yaml names them
    if weights.exists():
        return
    network = load_network(recipe.model.model_copy(update={"weights": None}))
    data = load_data(recipe.data, network.input_shape, recipe.seed)
    with stages("Training the network to compress") as progress:
        job = TrainingJob(
            network=network,
            data=data,
            folder=weights.parent / "training",
            seed=recipe.seed,
            progress=progress,
        )
        trained, _ = finetune(job, TRAINING)
    save_file(trained.module.state_dict(), weights)


def main() -> int:
    """Run the demo; return 0 where every verdict passes, else 1."""
    started = time.monotonic()
    out, err = Console(), Console(stderr=True)
    verdicts: list[Verdict] = []
    with StageProgress(err) as shown:
        stages = shown.stage
        for runtime in RUNTIMES:
            settings = (f"target.runtime={runtime}", f"out=build/demo/{runtime}")
            recipe = read_recipe(RECIPE, settings)
            train(recipe, stages)
            verdicts.append(compress(recipe, stages))
    out.print(comparison_table(verdicts))
    out.print(f"{time.monotonic() - started:.0f} s in all. The reports: open them in a browser.")
    return 0 if all(verdict.passed for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Compare every criterion at the same widths, and every measure's floors at the same latency.

    python -m benchmarks.criteria --weights resnet20-cifar10.safetensors --images cifar10
    python -m benchmarks.criteria --cost

The first prunes a CIFAR-10 ResNet by every criterion to the widths of one plan, fine-tunes each
with every seed, then plans anew with the floors of every measure. Results go to a JSON file one by
one, and the same command continues after a kill; Markdown is written beside it. The second lists
how long everything takes on ResNet-50 with 256 calibration images.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.criteria.comparing import compare_criteria, compare_floors
from benchmarks.criteria.costs import measure_costs
from benchmarks.criteria.tables import cost_report, report
from espalier import ModelSection, StageProgress, read_recipe
from hardware.records import write_whole
from pipeline.criteria import CRITERIA
from pipeline.redundancy import MEASURES
from pipeline.run import prepare

RECIPE = Path("benchmarks/cifar10.yaml")


def main() -> None:
    """Compare, or measure costs; write what was found."""
    options = _options()
    with StageProgress(Console(stderr=True)) as shown:
        if options.cost:
            section = ModelSection(name=options.model, input_shape=(3, options.px, options.px))
            with shown.stage(f"Costs on {options.model}") as progress:
                costs = measure_costs(section, options.calibration, 64, progress)
            title = f"Costs on {options.model}, {options.calibration} images"
            text = cost_report(title, costs)
        else:
            job = prepare(read_recipe(RECIPE, _changes(options)), shown.stage)
            common = (options.seeds, options.json, options.calibration, shown.stage)
            criteria = tuple(filter(None, options.criteria.split(",")))
            measures = tuple(filter(None, options.measures.split(",")))
            found = compare_criteria(job, criteria, *common)
            if measures:
                found = compare_floors(job, measures, *common)
            text = report(found)
    write_whole(options.markdown or options.json.with_suffix(".md"), text)
    sys.stdout.write(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.criteria", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--weights", help="safetensors of the CIFAR-10 ResNet")
    parser.add_argument("--images", help="folder with train/<class>/* and test/<class>/*")
    parser.add_argument("--depth", type=int, default=20, choices=(20, 56))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--calibration", type=int, default=256, help="images")
    parser.add_argument("--criteria", default=",".join(CRITERIA))
    parser.add_argument("--measures", default=",".join(MEASURES), help="'' for none")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path, default=Path("build/criteria/criteria.json"))
    parser.add_argument("--markdown", type=Path, help="default: beside the JSON file")
    parser.add_argument("--cost", action="store_true", help="list costs instead")
    parser.add_argument("--model", default="torchvision:resnet50", help="for --cost")
    parser.add_argument("--px", type=int, default=224, help="for --cost: sides of the images")
    options = parser.parse_args()
    if not options.cost and not (options.weights and options.images):
        parser.error("give --weights and --images, or --cost")
    for given, known in ((options.criteria, CRITERIA), (options.measures, MEASURES)):
        if unknown := set(filter(None, given.split(","))) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if options.cost and options.json == parser.get_default("json"):
        options.json = Path("build/criteria/costs.json")
    return options


def _changes(options: argparse.Namespace) -> tuple[str, ...]:
    return (
        f"model.arguments.depth={options.depth}",
        f"model.weights={options.weights}",
        f"data.source={options.images}",
        f"finetune.epochs={options.epochs}",
        f"out={options.json.with_suffix('')}",  # of its own: another target is another run
        *options.set,
    )


if __name__ == "__main__":
    main()

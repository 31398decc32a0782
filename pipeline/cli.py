"""The command line. Results go to stdout, progress and errors to stderr; nothing else prints.

Heavy packages are imported inside the commands, so that `espalier devices` works on a device that
has only the base install, and `--help` answers at once.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.logging import RichHandler

from hardware.commands.bench import add_bench
from hardware.commands.build import build
from hardware.commands.console import INTERRUPTED, command_of, err, out, print_error
from hardware.commands.devices import devices
from hardware.commands.measure import measure
from hardware.commands.table import tables
from hardware.errors import HardwareError
from pipeline.errors import PipelineError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Shape a CNN to the device it will run on: measure, prune whole filters, fine-tune, "
    "and hand back an engine that meets its latency target as measured.",
)

RecipePath = Annotated[
    Path, typer.Argument(help="YAML recipe; every key is explained in pipeline/README.md")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key: target.latency_ratio=0.5; repeatable"
    ),
]
Restart = Annotated[
    bool, typer.Option("--restart", help="Discard what an earlier run left in `out`")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log every stage as it goes")]


@app.command()
def compress(
    recipe: RecipePath,
    overrides: Overrides = None,
    restart: Restart = False,
    verbose: Verbose = False,
) -> None:
    """Prune, fine-tune, build and verify: from a trained network to an engine within its target.

    Example: `espalier compress recipe.yaml --set target.latency_ratio=0.5`

    Leaves the engine, the pruned network, `verdict.json` and `report.html` in the recipe's `out`.
    After a kill or Ctrl-C the same command continues where it stopped.

    Exit codes: **0** the verdict passes, **1** it does not, **2** bad input (the message says what
    to do), **130** interrupted.
    """
    with reported(verbose):
        from pipeline.recipe import read_recipe
        from pipeline.report.progress import StageProgress
        from pipeline.report.tables import verdict_table
        from pipeline.run import compress as run

        with StageProgress(err) as stages:
            verdict = run(
                read_recipe(recipe, tuple(overrides or ())), stages.stage, restart=restart
            )
        out.print(verdict_table(verdict))
        raise typer.Exit(0 if verdict.passed else 1)


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    restart: Restart = False,
    verbose: Verbose = False,
) -> None:
    """Show what `compress` would prune and why, and what it would gain; changes no weight.

    Example: `espalier plan recipe.yaml --set plan.redundancy=none`

    Measures the device as far as the plan needs it. `compress` continues from this plan. With
    `--set target.device=FOLDER` the plan is for another device, by its table under `profiles`.

    Exit codes: **0** there is a plan, **2** bad input or no plan meets the target (the message says
    what can be met), **130** interrupted.
    """
    with reported(verbose):
        from pipeline.recipe import read_recipe
        from pipeline.report.progress import StageProgress
        from pipeline.report.tables import plan_table
        from pipeline.run import make_plan

        asked = read_recipe(recipe, tuple(overrides or ()))
        with StageProgress(err) as stages:
            fitted = make_plan(asked, stages.stage, restart=restart)
        out.print(plan_table(fitted.plan, fitted.floors))
        if not fitted.loop:
            out.print("Predicted by the device's table; the planned network was not measured.")
        elif asked.plan.rounds > 1:
            out.print(
                f"The first of {asked.plan.rounds} rounds; the others are planned when the network "
                "has been fine-tuned."
            )


@tables.command("run")
def profile(
    recipe: RecipePath,
    overrides: Overrides = None,
    bundle: Annotated[
        Path | None,
        typer.Option(help="Measure nothing; write what `espalier measure` needs on a device"),
    ] = None,
    with_weights: Annotated[
        bool, typer.Option("--with-weights", help="Put the weights into the bundle as well")
    ] = False,
    imported: Annotated[
        Path | None,
        typer.Option("--import", help="Measure nothing; take in a table that came from a device"),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Measure the layers of a recipe's network on this device, inside the network, into a table.

    Example: `espalier profile recipe.yaml` (`run` may be left out)

    For another device: `espalier profile recipe.yaml --bundle bundle.zip` here, `espalier measure`
    there, `espalier profile recipe.yaml --import table.json` here.

    Exit codes: **0** the table is written, **2** bad input, **130** interrupted; what was measured
    is saved.
    """
    with reported(verbose):
        from hardware.latency.trust import trust_of
        from pipeline.errors import RecipeError
        from pipeline.planning.away import import_table, make_bundle
        from pipeline.recipe import read_recipe
        from pipeline.report.progress import StageProgress
        from pipeline.report.tables import latency_table
        from pipeline.run import make_table

        if bundle is not None and imported is not None:
            raise RecipeError("--bundle writes and --import reads: give one of them.")
        if with_weights and bundle is None:
            raise RecipeError("--with-weights says what goes into a bundle: give --bundle FILE.")
        asked = read_recipe(recipe, tuple(overrides or ()))
        with StageProgress(err) as stages:
            if bundle is not None:
                manifest = make_bundle(asked, bundle, stages.stage, with_weights=with_weights)
            elif imported is not None:
                path, table = import_table(asked, imported, stages.stage)
            else:
                path, table = make_table(asked, stages.stage)
        if bundle is not None:
            out.print(
                f"{bundle}: bundle {manifest.digest[:12]}. On the device: espalier measure "
                f"{bundle.name} --runtime {asked.target.runtime} -o table.json",
                markup=False,
            )
            return
        out.print(latency_table(path, table, trust_of(table)))
        if imported is not None:
            out.print(f"Plan for it with --set target.device={table.key.folder}", markup=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspect:
    """What `espalier inspect` is asked for: a field for every argument and option."""

    model: Annotated[
        str,
        typer.Argument(
            help="timm:NAME, torchvision:NAME, package.module:factory, path/to/file.py:factory, "
            "FILE.onnx, or RECIPE.yaml"
        ),
    ]
    input_shape: Annotated[
        str | None,
        typer.Option(
            help="One image: channels,height,width; a recipe has its own",
            show_default="3,224,224",
        ),
    ] = None
    weights: Annotated[Path | None, typer.Option(help="Weights: a safetensors file")] = None
    html: Annotated[Path | None, typer.Option(help="Write an HTML page as well")] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables")] = False
    diagnose: Annotated[
        bool, typer.Option("--diagnose", help="Compare all criteria on the images of --data")
    ] = False
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, a folder of images, or a recipe whose data section is taken",
            show_default="MODEL's, where that is a recipe",
        ),
    ] = None
    images: Annotated[int, typer.Option(min=1, help="Training images for --diagnose")] = 256
    surgery: Annotated[
        Literal["auto", "class", "graph"] | None,
        typer.Option(help="The form to prune, as in a recipe", show_default="auto"),
    ] = None
    overrides: Overrides = None
    verbose: Verbose = False


def inspect(asked: Inspect) -> None:
    """Show the pruning groups of a network, how redundant each is, and what is frozen and why.

    Examples: `espalier inspect timm:resnet18 --html page.html`,
    `espalier inspect recipe.yaml --diagnose`

    With --diagnose: which criteria rank alike on this network, and where each can tell filters
    apart. Measures no latency and changes nothing.

    Exit codes: **0** shown, **2** bad input, **130** interrupted.
    """
    with reported(asked.verbose):
        from pipeline import wording
        from pipeline.report.diagnosis_tables import diagnosis_tables
        from pipeline.report.inspection import (
            inspect_model,
            question_of,
            summarize,
            write_inspection,
        )
        from pipeline.report.tables import frozen_table, groups_table

        question = question_of(
            asked.model,
            input_shape=asked.input_shape,
            weights=asked.weights,
            surgery=asked.surgery,
            diagnose=asked.diagnose,
            data=asked.data,
            overrides=tuple(asked.overrides or ()),
        )
        found = inspect_model(question, images=asked.images)
        if asked.html is not None:
            write_inspection(found, asked.html)
        if asked.as_json:
            out.print_json(summarize(found).model_dump_json())
        else:
            out.print(groups_table(found.channels, found.floors))
            out.print(frozen_table(found.channels))
            out.print(wording.form(found.form), markup=False, highlight=False)
            if found.diagnosis is not None:
                out.print(diagnosis_tables(found.diagnosis, found.network))


app.command()(command_of(Inspect, inspect))
add_bench(app)
app.command()(measure)
app.command()(build)
app.command()(devices)
app.add_typer(tables, name="profile")


@contextmanager
def reported(verbose: bool) -> Iterator[None]:
    """End with one message: exit code 2 for our errors, 130 for Ctrl-C."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=err, show_path=False)],
        force=True,
    )
    try:
        if find_spec("torch") is None:
            raise PipelineError(
                "This command needs torch, which is not installed. On the host: "
                "pip install 'espalier-cnn[host,onnxruntime,openvino]'. On a device, use "
                "`espalier devices`, `espalier measure` and `espalier bench`."
            )
        yield
    except (HardwareError, PipelineError) as error:
        print_error(error)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        err.print("Interrupted. What is finished is saved; the same command continues.")
        raise typer.Exit(INTERRUPTED) from None


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()

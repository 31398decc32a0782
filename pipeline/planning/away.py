"""A target that is not this machine: its bundle, its table, and plans that rest on the table."""

from pathlib import Path

from hardware.bundle import Contents, Manifest, pack, write_bundle
from hardware.device import this_device
from hardware.errors import DeviceMismatchError, MissingLatencyError, RuntimeMissingError
from hardware.latency.table import LatencyTable, TableKey, load_table, table_path
from hardware.latency.variant import digest_of
from hardware.remote import bring_home
from hardware.runtimes import get_runtime
from hardware.runtimes.base import EngineSettings
from pipeline.errors import PlanError, RecipeError
from pipeline.networks.analyse import Subject, analyse
from pipeline.networks.load import load_network
from pipeline.planning.inputs import gather_inputs
from pipeline.planning.turns import Request, plan_of, plan_widths, warning_of, what_to_spend
from pipeline.planning.widths import swept_widths
from pipeline.recipe import Recipe, TargetSection
from pipeline.records import FittedPlan, Stages
from pipeline.tasks.data import load_data
from pipeline.workspace import open_workspace


def make_bundle(
    recipe: Recipe, path: Path, stages: Stages, *, with_weights: bool = False
) -> Manifest:
    """Write what a device needs to measure the recipe's network; needs no runtime and no images.

    Args:
        recipe: names the network, the settings and the candidate widths.
        path: the zip file.
        stages: shows every stage.
        with_weights: send the weights too; latency does not depend on them.
    """
    subject = _subject(recipe, stages)
    manifest, parts = _packed(recipe, subject, with_weights)
    with stages("Writing the bundle") as progress:
        write_bundle(path, manifest, parts)
        progress(1, 1, str(path))
    return manifest


def import_table(recipe: Recipe, path: Path, stages: Stages) -> tuple[Path, LatencyTable]:
    """Check a table that was measured from the recipe's bundle, and merge it into the profiles.

    Returns:
        Where it lies now, and everything that lies there.
    """
    subject = _subject(recipe, stages)
    digests = [_packed(recipe, subject, weights)[0].digest for weights in (False, True)]
    with stages("Checking the table") as progress:
        place, table = bring_home(
            path,
            digests,
            digest_of(subject.template),
            subject.layers,
            _wanted(recipe.target),
            recipe.profiles,
        )
        progress(1, 1, f"{len(table.entries)} latencies of {table.key.device}")
    return place, table


def plan_from_table(recipe: Recipe, stages: Stages, *, restart: bool = False) -> FittedPlan:
    """Return the best plan for a device that is elsewhere, as its table predicts latency.

    Nothing is measured, so the plan is as good as the table: no round of measuring the planned
    network follows. `FittedPlan.loop` is empty.

    Raises:
        PlanError: no plan meets the target by the table's prediction.
        HardwareError: there is no table of that device, or not of this network.
    """
    table, path = _table_of(recipe)
    with open_workspace(recipe, restart=restart) as place:
        if (done := place.load(FittedPlan, "plan-from-table")) is not None:
            return done
        subject = _subject(recipe, stages)
        share = _share_of(recipe.target, table, path, subject) ** (1 / recipe.plan.rounds)
        with stages("Loading the images") as progress:
            data = load_data(recipe.data, subject.network.input_shape, recipe.seed, progress)
        with stages("Measuring what each filter is worth") as progress:
            cache = place.state / "damage.json"
            inputs = gather_inputs(subject, data, recipe.plan, cache, recipe.seed, progress)
        request = Request(subject=subject, inputs=inputs, section=recipe.plan, share=share)
        with stages("Planning") as progress:
            fitted = _fit(request, table, recipe.target)
            plan = fitted.plan
            progress(1, 1, f"predicted {plan.predicted_ms:.4g} of {plan.baseline_ms:.4g} ms")
        place.save(fitted, "plan-from-table")
        return fitted


def is_away(target: TargetSection) -> bool:
    """Tell whether the recipe's device is another one than its runtime has here."""
    return target.device not in (None, _here(target))


def refuse_away(target: TargetSection, what: str) -> None:
    """Refuse what has to be measured, where the recipe's device is another machine.

    Raises:
        RecipeError: it is; the message says what can be done instead.
    """
    if is_away(target):
        raise RecipeError(
            f"target.device is {target.device}, and this machine is {_here(target)}: {what} "
            "has to be measured there. From here, `espalier plan` works by that device's table "
            "(espalier profile RECIPE --bundle and --import); to deliver an engine, run "
            "`espalier compress` on the device."
        )


def _here(target: TargetSection) -> str:
    """Return the folder of the device that the recipe's runtime has on this machine."""
    try:
        return get_runtime(target.runtime).machine().slug
    except RuntimeMissingError:
        return this_device().slug


def _subject(recipe: Recipe, stages: Stages) -> Subject:
    with stages("Finding pruning groups") as progress:
        subject = analyse(load_network(recipe.model), recipe.target.batch, recipe.surgery)
        progress(1, 1, f"{len(subject.channels.prunable)} groups can be pruned")
    return subject


def _packed(
    recipe: Recipe, subject: Subject, with_weights: bool
) -> tuple[Manifest, dict[str, bytes]]:
    target = recipe.target
    contents = Contents(
        network=recipe.model.name,
        template=subject.template,
        channels=subject.channels,
        candidates=swept_widths(subject.channels, recipe.plan),
        settings=EngineSettings(precision=target.precision, threads=target.threads),
        batch=target.batch,
        seed=recipe.seed,
    )
    return pack(contents, with_weights=with_weights)


def _wanted(target: TargetSection) -> TableKey:
    """Return what the recipe says of a table; what it does not say is empty."""
    return TableKey(
        device="",
        fingerprint="",
        folder=target.device or "",
        runtime=target.runtime,
        version="",
        precision=target.precision,
        batch=target.batch,
        threads=target.threads,
    )


def _table_of(recipe: Recipe) -> tuple[LatencyTable, Path]:
    """Return the table of the recipe's device, and where it lies."""
    key = _wanted(recipe.target)
    path = recipe.target.table or table_path(recipe.profiles, key)
    if not path.exists():
        known = sorted(p.parent.name for p in recipe.profiles.glob(f"*/{path.name}"))
        raise MissingLatencyError(
            f"There is no {path}. Devices with such a table under {recipe.profiles}: "
            f"{', '.join(known) or 'none'}. Bring one home: espalier profile RECIPE --import FILE."
        )
    table = load_table(path)
    for field in ("folder", "runtime", "precision", "batch", "threads"):
        if getattr(table.key, field) != getattr(key, field):
            raise DeviceMismatchError(
                f"{path} is of {field} {getattr(table.key, field)}, the recipe asks for "
                f"{getattr(key, field)}. Latencies do not carry over."
            )
    return table, path


def _share_of(target: TargetSection, table: LatencyTable, path: Path, subject: Subject) -> float:
    """Return the target as a share of what the full network takes by the device's table."""
    try:
        full_ms = table.full_ms(digest_of(subject.template))
    except MissingLatencyError as error:
        raise MissingLatencyError(
            f"{path} holds no measurement of this network. Measure it on {table.key.device}: "
            "espalier profile RECIPE --bundle bundle.zip, there espalier measure bundle.zip, here "
            "espalier profile RECIPE --import table.json."
        ) from error
    if target.latency_ratio is not None:
        return target.latency_ratio
    assert target.latency_ms is not None  # the recipe demands one of the two
    return min(1.0, target.latency_ms / full_ms)


def _fit(request: Request, table: LatencyTable, target: TargetSection) -> FittedPlan:
    """Return the plan that the table predicts to meet the target."""
    target_ms = request.target_ms(table)
    limits_ms = (what_to_spend(request, table, ()), target_ms)
    try:
        plan = plan_of(request, table, plan_widths(request, table, limits_ms, None))
    except PlanError as error:
        raise PlanError(f"{error} (The recipe asks for {target.asked}.)") from error
    if plan.predicted_ms > target_ms:
        raise PlanError(
            f"The best plan found is predicted to take {plan.predicted_ms:.4f} ms, the target is "
            f"{target_ms:.4f} ms ({target.asked}). Raise the target, or measure more on the device."
        )
    floors = request.inputs.floors
    return FittedPlan(plan=plan, floors=floors, loop=(), warning=warning_of(request, plan))

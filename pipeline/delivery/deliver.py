"""What a run leaves behind: the pruned model, its engine, the report and the manifest."""

import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from hardware.device import Device, conditions
from hardware.latency.end_to_end import LOADS
from hardware.latency.layers import Layer, macs_of
from hardware.latency.predict import costs, layer_times
from hardware.latency.table import LatencyTable
from hardware.records import Record, file_digest, model_digest, save_record, write_whole
from hardware.runtimes.base import Engine
from pipeline.delivery.verify import Facts
from pipeline.networks import store as storing
from pipeline.networks.analyse import Subject
from pipeline.networks.export import export_graph
from pipeline.networks.fold_norms import fold_norms
from pipeline.recipe import Recipe, dump_recipe
from pipeline.records import EpochRecord, FittedPlan, Network, Plan, Verdict
from pipeline.report.report import LayerRow, Report, write_report
from pipeline.rig import Rig
from pipeline.tasks.data import Data

REPORT = "report.html"
DELIVERED = ("model.safetensors", "architecture.json", "model.onnx", "engine", REPORT)
PACKAGES = (
    "espalier-cnn",
    "torch",
    "torchvision",
    "timm",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "numpy",
    "scipy",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shaped:
    """What the rounds of pruning and fine-tuning made of a network."""

    network: Network
    fitted: FittedPlan  # of all rounds, for the original network
    proof_error: float  # the largest of all rounds
    epochs: tuple[EpochRecord, ...]
    sparse_epochs: tuple[EpochRecord, ...] = ()  # before surgery

    @property
    def plan(self) -> Plan:
        """What stays of the original network."""
        return self.fitted.plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """Several loads of the original network and of the delivered engine."""

    baselines: tuple[Engine, ...]
    delivered: tuple[Engine, ...]  # as read back from disk
    path: Path


class Manifest(Record):
    """Everything needed to make a delivered engine again, or to say why that is not possible."""

    command: str
    recipe: Mapping[str, Any]  # Any: a recipe's values, as resolved
    seed: int
    weights_sha256: str  # of the weights file given in the recipe, "" without one
    network_sha256: str = ""  # of the ONNX file that is the network, with its external data
    data_digest: str  # over the names of the images and what becomes of them, not over pixels
    table: str
    table_sha256: str
    device: Device
    conditions: Mapping[str, str]
    versions: Mapping[str, str]
    plan: Plan
    verdict: Verdict
    files_sha256: Mapping[str, str]  # what was delivered, by path relative to the output folder


def write_engines(subject: Subject, shaped: Shaped, rig: Rig, recipe: Recipe) -> Engines:
    """Write the pruned model and its engine; return loads of the baseline and of what was written.

    Raises:
        BuildError: the runtime refused the network.
        StorageError: the folder cannot be written.
    """
    folder, pruned = recipe.out, shaped.network
    storing.save_network(pruned, subject.network, subject.channels, shaped.plan.keep, folder)
    model = fold_norms(export_graph(pruned, recipe.target.batch))
    write_whole(folder / "model.onnx", model.SerializeToString())
    path = rig.runtime.build(model, rig.settings).save(folder / "engine")
    return Engines(
        baselines=tuple(rig.loads(subject.template)),
        delivered=tuple(rig.runtime.load(path, rig.settings) for _ in range(LOADS)),
        path=path,
    )


def facts_of(subject: Subject, shaped: Shaped, engine: Path, folder: Path) -> Facts:
    """Return what is known of the delivered network before it is measured."""
    plan, layers = shaped.plan, subject.layers
    return Facts(
        predicted_share=plan.predicted_ms / plan.baseline_ms,
        proof_error=shaped.proof_error,
        parameters=(_parameters(subject.network.module), _parameters(shaped.network.module)),
        macs=(macs_of(layers, {}), macs_of(layers, plan.widths)),
        engine=str(engine),
        report=str(folder / REPORT),
        form=subject.form,
    )


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def describe(
    subject: Subject, shaped: Shaped, rig: Rig, recipe: Recipe, verdict: Verdict
) -> Report:
    """Return everything that the report tells about a run."""
    return Report(
        title=f"{recipe.model.name} on {rig.runtime.device()}",
        device=rig.runtime.machine(),
        conditions=conditions(),
        channels=subject.channels,
        floors=shaped.fitted.floors,
        plan=shaped.plan,
        layers=layer_rows(subject, rig.table(), shaped.plan),
        loop=tuple(
            (turn.predicted_ms, turn.measured_ms, turn.target_ms) for turn in shaped.fitted.loop
        ),
        epochs=shaped.epochs,
        sparse_epochs=shaped.sparse_epochs,
        sparsified=recipe.sparsify.method,
        rounds=recipe.plan.rounds,
        verdict=verdict,
        recipe_yaml=dump_recipe(recipe),
        versions=versions(),
        command=shlex.join(["espalier", *sys.argv[1:]]),
    )


def layer_rows(subject: Subject, table: LatencyTable, plan: Plan) -> tuple[LayerRow, ...]:
    """Return channels, multiply-adds and latency of every layer, before and after.

    Raises:
        MissingLatencyError: the table does not know the network.
    """
    narrowed = [choice for choice in plan.choices if choice.width < choice.full]
    candidates = {choice.group: (choice.width, choice.full) for choice in narrowed}
    full = {choice.group: choice.full for choice in narrowed}
    widths = {choice.group: choice.width for choice in narrowed}
    layers = subject.layers
    before_us, _ = layer_times(costs(table, layers, candidates, full), candidates, full)
    after_us, measured = layer_times(costs(table, layers, candidates, widths), candidates, widths)
    return tuple(
        _layer_row(
            layer, widths, (before_us[layer.name], after_us[layer.name]), measured[layer.name]
        )
        for layer in layers
    )


def _layer_row(
    layer: Layer, widths: Mapping[str, int], times_us: tuple[float, float], measured: bool
) -> LayerRow:
    in_before, out_before = layer.channels_at({})
    in_after, out_after = (0, 0) if layer.is_emptied(widths) else layer.channels_at(widths)
    return LayerRow(
        layer=layer.name,
        operator=layer.key.operator,
        in_before=in_before,
        in_after=in_after,
        out_before=out_before,
        out_after=out_after,
        macs_before=macs_of((layer,), {}),
        macs_after=macs_of((layer,), widths),
        before_us=times_us[0],
        after_us=times_us[1],
        measured=measured,
    )


def write_results(report: Report, data: Data, rig: Rig, recipe: Recipe) -> None:
    """Write report, manifest and verdict beside the engine.

    Raises:
        StorageError: the folder cannot be written.
    """
    folder = recipe.out
    write_report(report, folder / REPORT)
    manifest = Manifest(
        command=report.command,
        recipe=recipe.model_dump(mode="json"),
        seed=recipe.seed,
        weights_sha256=file_digest(weights) if (weights := recipe.model.weights) else "",
        network_sha256=model_digest(file) if (file := recipe.model.file) else "",
        data_digest=data.digest,
        table=str(rig.path),
        table_sha256=file_digest(rig.path),
        device=report.device,
        conditions=report.conditions,
        versions=report.versions,
        plan=report.plan,
        verdict=report.verdict,
        files_sha256=digests(folder, DELIVERED),
    )
    save_record(manifest, folder / "manifest.json")
    save_record(report.verdict, folder / "verdict.json")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that decide the result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def digests(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Return the SHA-256 of the delivered files among `names` (files, or folders of files)."""
    found: dict[str, str] = {}
    for name in names:
        place = folder / name
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        found |= {str(f.relative_to(folder)): file_digest(f) for f in files if f.is_file()}
    return found

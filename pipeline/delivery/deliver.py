"""Write the pruned model, its engine and the report, and measure what was written."""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from hardware.device import conditions
from hardware.graph.channel_map import Keep
from hardware.graph.fold_norms import fold_norms
from hardware.latency import predict as predicting
from hardware.latency.end_to_end import LOADS, time_engines
from hardware.latency.layers import Layer, macs_of
from hardware.latency.table import LatencyTable, load_table
from hardware.records import file_digest, model_digest, save_record, write_whole
from hardware.runtimes.base import Engine
from pipeline.delivery.manifest import Manifest, digests, versions, write_manifest
from pipeline.delivery.verify import Facts, judge, measure_parity, measure_quality
from pipeline.networks import store as storing
from pipeline.networks.analyse import Subject
from pipeline.networks.export import export_graph
from pipeline.planning.fit import Bench, FittedPlan, Stages, full_widths
from pipeline.recipe import Recipe, dump_recipe
from pipeline.records import EpochRecord, Network, Verdict
from pipeline.report.report import LayerRow, Report, write_report
from pipeline.tasks.data import Data

DELIVERED = ("model.safetensors", "architecture.json", "model.onnx", "engine", "report.html")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shaped:
    """What the rounds of pruning and fine-tuning made of a network."""

    network: Network
    fitted: FittedPlan  # of the last round
    keep: Keep  # per group of the original network, after all rounds
    predicted_share: float  # latency over the original's, as predicted, after all rounds
    proof_error: float  # the largest of all rounds
    epochs: tuple[EpochRecord, ...]
    sparse_epochs: tuple[EpochRecord, ...] = ()  # before surgery


def deliver(
    subject: Subject, shaped: Shaped, data: Data, bench: Bench, recipe: Recipe, stages: Stages
) -> Verdict:
    """Write model, engine, report and manifest into `recipe.out`; return what was measured on them.

    Raises:
        BuildError: the runtime refused the network.
        StorageError: the folder cannot be written.
    """
    folder = recipe.out
    with stages("Building the engine") as progress:
        baselines, delivered, path = _build(subject, shaped, bench, recipe)
        progress(1, 1, str(path))
    with stages("Verifying latency") as progress:
        timing = time_engines(baselines, delivered, progress)
    with stages("Verifying accuracy") as progress:
        engine = delivered[0]
        parity = measure_parity(engine, shaped.network, next(data.validation_batches())[0])
        quality = measure_quality(
            baselines[0], engine, shaped.network, data.test_batches, data.sizes["test"], progress
        )
    facts = _facts(subject, shaped, path, folder / "report.html")
    verdict = judge(recipe.target, recipe.limits, facts, timing, quality, parity)
    with stages("Writing the report") as progress:
        write_report(_describe(subject, shaped, bench, recipe, verdict), folder / "report.html")
        write_manifest(_manifest(shaped, data, bench, recipe, verdict), folder)
        save_record(verdict, folder / "verdict.json")
        progress(1, 1, str(folder / "report.html"))
    return verdict


def _build(
    subject: Subject, shaped: Shaped, bench: Bench, recipe: Recipe
) -> tuple[list[Engine], list[Engine], Path]:
    """Return loads of the baseline, of the engine as read back from disk, and where it lies."""
    folder, pruned = recipe.out, shaped.network
    storing.save_network(pruned, subject.network, subject.channels, shaped.keep, folder)
    model = fold_norms(export_graph(pruned, recipe.target.batch))
    write_whole(folder / "model.onnx", model.SerializeToString())
    path = bench.runtime.build(model, bench.settings).save(folder / "engine")
    delivered = [bench.runtime.load(path, bench.settings) for _ in range(LOADS)]
    baselines = [bench.runtime.build(subject.template, bench.settings) for _ in range(LOADS)]
    return baselines, delivered, path


def _facts(subject: Subject, shaped: Shaped, engine: Path, report: Path) -> Facts:
    widths = final_widths(shaped)
    return Facts(
        predicted_share=shaped.predicted_share,
        proof_error=shaped.proof_error,
        parameters=(_parameters(subject.network.module), _parameters(shaped.network.module)),
        macs=(
            macs_of(subject.layers, full_widths(subject.channels)),
            macs_of(subject.layers, widths),
        ),
        engine=str(engine),
        report=str(report),
        form=subject.form,
    )


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def final_widths(shaped: Shaped) -> dict[str, int]:
    """Return the width of every pruned group of the original network, after all rounds."""
    return {name: len(units) for name, units in shaped.keep.items()}


def layer_rows(
    subject: Subject, table: LatencyTable, widths: Mapping[str, int]
) -> tuple[LayerRow, ...]:
    """Return channels, multiply-adds and latency of every layer, at full width and at `widths`."""
    full = full_widths(subject.channels)
    both = {name: tuple(sorted({full[name], widths[name]})) for name in full}
    before, _ = _times(table, subject, both, full)
    after, measured = _times(table, subject, both, {**full, **widths})
    return tuple(
        _layer_row(
            layer, (full, widths), (before[layer.name], after[layer.name]), measured[layer.name]
        )
        for layer in subject.layers
    )


def _times(
    table: LatencyTable,
    subject: Subject,
    candidates: Mapping[str, tuple[int, ...]],
    widths: Mapping[str, int],
) -> tuple[dict[str, float], dict[str, bool]]:
    costs = predicting.costs(table, subject.layers, candidates, around=widths)
    return predicting.layer_times(costs, candidates, widths)


def _layer_row(
    layer: Layer,
    widths: tuple[Mapping[str, int], Mapping[str, int]],
    times_us: tuple[float, float],
    measured: bool,
) -> LayerRow:
    gone = layer.is_emptied(widths[1])
    in_before, out_before = layer.channels_at(widths[0])
    in_after, out_after = (0, 0) if gone else layer.channels_at(widths[1])
    return LayerRow(
        layer=layer.name,
        operator=layer.key.operator,
        in_before=in_before,
        in_after=in_after,
        out_before=out_before,
        out_after=out_after,
        macs_before=macs_of((layer,), widths[0]),
        macs_after=macs_of((layer,), widths[1]),
        before_us=times_us[0],
        after_us=times_us[1],
        measured=measured,
    )


def _describe(
    subject: Subject, shaped: Shaped, bench: Bench, recipe: Recipe, verdict: Verdict
) -> Report:
    return Report(
        title=f"{recipe.model.name} on {bench.runtime.device()}",
        device=bench.runtime.machine(),
        conditions=conditions(),
        channels=subject.channels,
        floors=shaped.fitted.floors,
        plan=shaped.fitted.plan,
        layers=layer_rows(subject, load_table(bench.path), final_widths(shaped)),
        loop=tuple((turn.predicted_ms, turn.measured_ms) for turn in shaped.fitted.loop),
        epochs=shaped.epochs,
        sparse_epochs=shaped.sparse_epochs,
        sparsified=recipe.sparsify.method,
        verdict=verdict,
        recipe_yaml=dump_recipe(recipe),
        versions=versions(),
        command=shlex.join(["espalier", *sys.argv[1:]]),
    )


def _manifest(
    shaped: Shaped, data: Data, bench: Bench, recipe: Recipe, verdict: Verdict
) -> Manifest:
    return Manifest(
        command=shlex.join(["espalier", *sys.argv[1:]]),
        recipe=recipe.model_dump(mode="json"),
        seed=recipe.seed,
        weights_sha256=file_digest(weights) if (weights := recipe.model.weights) else "",
        network_sha256=model_digest(file) if (file := recipe.model.file) else "",
        data_digest=data.digest,
        table=str(bench.path),
        table_sha256=file_digest(bench.path),
        device=bench.runtime.machine(),
        conditions=conditions(),
        versions=versions(),
        plan=shaped.fitted.plan,
        verdict=verdict,
        files_sha256=digests(recipe.out, DELIVERED),
    )

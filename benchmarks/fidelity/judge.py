"""Predict kept plans from kept tables: in seconds, without a device, the same every time."""

from pathlib import Path

import numpy as np

from benchmarks.fidelity.measure import PLANS, TABLE
from benchmarks.fidelity.records import Errors, Judgement, Kept, errors_of, load_kept
from hardware.latency.predict import predict_keys_ms
from hardware.latency.table import load_table


def judge(folder: Path, builds: int | None = None) -> Judgement:
    """Return how well the table in a folder predicts the plans kept beside it.

    Args:
        folder: that `measure` filled.
        builds: as if the sweep had ended after so many networks; None: as it ended.

    Raises:
        StorageError: a file is damaged.
        MissingLatencyError: the shortened table lacks a kind of layer.
    """
    kept, table = load_kept(folder / PLANS), load_table(folder / TABLE)
    if builds is not None:
        table = table.without(table.variants[builds:])
    full_ms = table.full_ms(kept.template)
    measured = [float(np.median(plan.shares)) * full_ms for plan in kept.plans]
    predicted = [predict_keys_ms(table, keys) for keys in kept.networks()]
    per_mac = full_ms / kept.full_macs
    return Judgement(
        network=kept.network,
        runtime=kept.runtime,
        threads=kept.threads,
        builds=len(table.variants),
        sweep_s=kept.sweep_s,
        table=errors_of(predicted, measured),
        isolated=_isolated(kept, measured),
        macs=errors_of([per_mac * plan.macs for plan in kept.plans], measured),
        repeated=_repeated(kept),
        full_ms=round(full_ms, 4),
    )


def _isolated(kept: Kept, measured: list[float]) -> Errors | None:
    alone = [plan.isolated_ms for plan in kept.plans]
    if any(time_ms is None for time_ms in alone):
        return None
    return errors_of([time_ms or 0.0 for time_ms in alone], measured)


def _repeated(kept: Kept) -> Errors:
    """Return how far the first pass over a plan predicts the last, where there are two."""
    shares = [plan.shares for plan in kept.plans if len(plan.passes) > 1]
    return errors_of([first for first, *_ in shares], [last for *_, last in shares])

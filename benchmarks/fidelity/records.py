"""What the benchmark keeps of its measurements, and what it judges by them."""

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hardware.device import Device
from hardware.latency.layers import LayerKey
from hardware.records import Record, parse_record, write_whole


class Pass(Record):
    """One measurement of a plan, with engines loaded anew."""

    ms: float
    full_ms: float  # what the full network took, timed in turns with it


class KeptPlan(Record):
    """A plan that the table never saw, and what it took."""

    name: str  # "random", or the share of all groups
    widths: Mapping[str, int]
    layers: tuple[int, ...]  # what it executes: indices into the keys
    passes: tuple[Pass, ...]  # minutes apart
    macs: int
    isolated_ms: float | None = None  # sum of its layers timed alone, where that was asked for

    @property
    def shares(self) -> tuple[float, ...]:
        """What each pass took, over the full network beside it."""
        return tuple(one.ms / one.full_ms for one in self.passes)


class Kept(Record):
    """The measured plans of one network on one runtime; the swept table lies beside them."""

    network: str
    runtime: str
    threads: int
    template: str  # digest of the full network; the table knows it by that
    seed: int
    sweep_s: float
    full_macs: int
    device: Device
    versions: Mapping[str, str]
    keys: tuple[LayerKey, ...]
    plans: tuple[KeptPlan, ...]

    def networks(self) -> list[list[LayerKey]]:
        """Return what each plan executes."""
        return [[self.keys[i] for i in plan.layers] for plan in self.plans]


class Errors(Record):
    """How far predictions are off, percent of what was measured; `bias_pct` keeps the sign."""

    median_pct: float
    p95_pct: float
    worst_pct: float
    bias_pct: float  # median of the signed errors: above 0, predictions are too high


class Judgement(Record):
    """How well one kept table predicts the plans kept beside it."""

    network: str
    runtime: str
    threads: int
    builds: int
    sweep_s: float
    table: Errors
    isolated: Errors | None  # layers timed alone, added
    macs: Errors  # multiply-adds times a constant, the full network's
    repeated: Errors  # the first pass over a plan as a prediction of the last
    full_ms: float


def save_kept(kept: Kept, path: Path) -> None:
    """Write what was kept, compressed; the file appears whole."""
    body = {"schema": kept.SCHEMA, **kept.model_dump(mode="json", exclude_defaults=True)}
    write_whole(path, gzip.compress(json.dumps(body).encode(), mtime=0))


def load_kept(path: Path) -> Kept:
    """Return what was kept; raises StorageError where the file is damaged or of another version."""
    return parse_record(Kept, gzip.decompress(path.read_bytes()), str(path))


def errors_of(predicted: Sequence[float], measured: Sequence[float]) -> Errors:
    """Return how far predictions are off."""
    signed = 100 * (np.array(predicted) / np.array(measured) - 1)
    sizes = np.abs(signed)
    return Errors(
        median_pct=round(float(np.median(sizes)), 2),
        p95_pct=round(float(np.quantile(sizes, 0.95)), 2),
        worst_pct=round(float(sizes.max()), 2),
        bias_pct=round(float(np.median(signed)), 2),
    )

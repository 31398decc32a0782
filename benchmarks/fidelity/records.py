"""What a run of the benchmark found, as it is written to JSON."""

from collections.abc import Mapping, Sequence

import numpy as np

from hardware.device import Device
from hardware.disturbance import Disturbance
from hardware.records import Record

ONE_PACE = 1.1  # paces within this are of a machine in one state


class Errors(Record):
    """How far predictions are off, percent of what was measured; `bias_pct` keeps the sign."""

    median_error_pct: float
    p95_error_pct: float
    worst_error_pct: float
    bias_pct: float  # median of the signed errors: above 0, predictions are too high


class PlanTimes(Record):
    """One plan that the table had not seen, at the table's pace."""

    name: str  # "random", or the share of all groups
    widths: Mapping[str, int]
    predicted_ms: float
    measured_ms: float  # median of the passes at the table's pace
    passes_ms: tuple[float, ...]  # each with engines loaded anew, minutes apart
    paces: tuple[float, ...]  # how much slower than for the table each ran
    quiet: tuple[bool, ...] = ()  # whether others left the memory alone, as far as that was asked
    is_at_pace: bool = True  # one pass at least was at the table's pace, and quiet
    isolated_ms: float  # sum of layers that were timed alone
    macs_ms: float  # multiply-adds times a constant
    macs: int


class SecondRun(Record):
    """The same sweep with the table present."""

    builds: int
    seconds: float


class Coverage(Record):
    """How often a second sweep's figure lies in the interval that the first one states."""

    entries: int  # in both tables
    entries_covered_pct: float
    variants: int
    variants_covered_pct: float
    entry_change_pct: float  # median of how far the second figure is off the first
    variant_change_pct: float
    beside_variants: int | None = None  # measured while a neighbour spun, in the second sweep
    noticed_variants: int | None = None  # of these, marked; they were measured again


class Result(Record):
    """One network on one runtime."""

    network: str
    runtime: str
    runtime_version: str
    threads: int
    precision: str
    builds: int  # narrowed networks built and timed
    table_minutes: float = 1.0  # that it was given
    table_seconds: float
    median_error_pct: float
    p95_error_pct: float
    worst_error_pct: float
    bias_pct: float
    at_pace: Errors | None = None  # of the plans that met the machine as it was for the table
    plans_at_pace: int = 0
    quiet_ps: float | None = None  # memory is quiet where reading a byte takes at most this
    waited_s: float = 0.0  # for quiet memory, in all
    isolated: Errors
    isolated_scaled: Errors  # the same sums, times what makes the full network right
    isolated_builds: int
    macs: Errors  # the constant is the full network's
    repeated: Errors  # the first pass as a prediction of the last: how far plans repeat
    full_ms: float  # the full network, at the table's pace
    second_run: SecondRun
    after: Mapping[str, int] = {}  # networks measured before into the same table, and their builds
    coverage: Coverage | None = None
    crowded_variants: int  # measured beside a busy neighbour
    disturbance: Disturbance  # while the plans were measured
    plans: tuple[PlanTimes, ...]
    seed: int
    device: Device
    versions: Mapping[str, str]


def errors_of(predicted_ms: Sequence[float], measured_ms: Sequence[float]) -> Errors:
    """Return how far predictions are off."""
    signed = 100 * (np.array(predicted_ms) / np.array(measured_ms) - 1)
    sizes = np.abs(signed)
    return Errors(
        median_error_pct=round(float(np.median(sizes)), 3),
        p95_error_pct=round(float(np.quantile(sizes, 0.95)), 3),
        worst_error_pct=round(float(sizes.max()), 3),
        bias_pct=round(float(np.median(signed)), 3),
    )


def repeated_of(plans: Sequence[PlanTimes]) -> Errors:
    """Return how far the first pass over plans predicts the last, at about one pace."""
    pairs = [
        (plan.passes_ms[0], plan.passes_ms[-1])
        for plan in plans
        if max(plan.paces) <= ONE_PACE * min(plan.paces)
    ]
    first, last = zip(*(pairs or [(p.passes_ms[0], p.passes_ms[-1]) for p in plans]), strict=True)
    return errors_of(first, last)

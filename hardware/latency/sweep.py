"""Fill a latency table: carve designed variants, build them, time them, harvest their layers.

Every variant is predicted by the table just before it is measured. A sweep ends when the last few
predictions were close: then the table is good enough for plans to start from, and plans measure
what they touch themselves.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import inf, isinf
from pathlib import Path
from statistics import median

from hardware.errors import MissingLatencyError
from hardware.latency.design import design
from hardware.latency.layers import LayerKey
from hardware.latency.predict import predict_plan_ms
from hardware.latency.table import LatencyTable, Variant
from hardware.latency.variant import PROTOCOL, Rig, Template
from hardware.runtimes.base import EngineSettings, Runtime
from hardware.timing import Protocol

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
Candidates = Mapping[str, tuple[int, ...]]

# Two engines of one model differ by up to 3 % for as long as they live (where their memory lies):
# a plan is timed on several of them in turns.
PLAN_ENGINES = 2
LEAST_BUILDS = 12  # the corners of the design, and enough beyond to judge the table by
MOST_BUILDS = 200  # a small network may have fewer variants than the time allows
JUDGED = 5  # of the last variants, the median of whose errors decides
CLOSE = 0.05  # relative; a plan loop that starts so close ends within three turns
MUCH_DISTURBED = 0.25  # of the variants, before it is worth a warning
LEAST_SHARE = 1e-4  # of a network's time that a layer counts in the design, fused away or not


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a network is measured: the template, the device, and the file of its table."""

    template: Template
    runtime: Runtime
    settings: EngineSettings
    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What a sweep is for, and how long it may take.

    `builds` is the number of variants of the design to hold in the end; None: as many as it takes
    until predictions are close, at most as many as `minutes` allow.
    """

    candidates: Candidates  # widths per group that a planner may choose
    minutes: float = 0.5  # earlier sweeps of the same network count
    builds: int | None = None
    seed: int = 0  # of the design


def measure(
    place: Place,
    widths: Mapping[str, int],
    table: LatencyTable,
    *,
    protocol: Protocol = PROTOCOL,
) -> tuple[LatencyTable, Variant]:
    """Build a planned network, time it beside the full one, and layer by layer.

    Args:
        place: what is measured, and with what.
        widths: per group; groups that are not named stay whole.
        table: where the variant is added.
        protocol: of the end-to-end timing.

    Returns:
        The table with the variant, and the variant.

    Raises:
        BuildError, RunError: the runtime failed.
        CarveError: the template cannot be cut like this.
    """
    rig = Rig(place.template, place.runtime, place.settings, protocol)
    table = _measured(rig, widths, table, PLAN_ENGINES, "plan")
    return table, table.variants[-1]


def sweep(
    place: Place, goal: Goal, table: LatencyTable, progress: Progress | None = None
) -> LatencyTable:
    """Return the table with designed variants of a network measured, saving after each.

    Variants that the table holds are not built again, and layers that other networks measured are
    not sought again: a second sweep builds nothing, a related network needs few builds.

    Args:
        place: what is measured, and with what.
        goal: which widths, and for how long.
        table: measured so far.
        progress: called with (variants measured, expected, text) after each.

    Raises:
        BuildError, RunError: the runtime failed; what was measured is saved.
        CarveError: the template cannot be cut.
        StorageError: the table cannot be written.
    """
    template, digest = place.template, place.template.digest
    before = table.swept.get(digest, 0.0)
    if goal.builds is None and before >= goal.minutes:
        return table
    tell = progress or _silent
    until_s = time.monotonic() + 60 * (goal.minutes - before)
    elsewhere = _seen_elsewhere(table, digest)
    shares: dict[str, float] = {}
    rig: Rig | None = None
    plans = design(
        template.layers, goal.candidates, template.channels.branches, elsewhere, shares, goal.seed
    )
    most = goal.builds or MOST_BUILDS
    for number, planned in enumerate(islice(plans, most), start=1):
        widths = template.complete(planned)
        if not table.holds(digest, widths):
            if goal.builds is None and _is_enough(table, digest, until_s):
                break
            rig = rig or Rig(template, place.runtime, place.settings)
            table = _measured(rig, widths, table)
            table.save(place.path)
        if number == 1:
            shares.update(_shares(table, template, widths))
        tell(number, max(number, goal.builds or LEAST_BUILDS), _told(table, digest))
    if goal.builds is None:
        table = table.model_copy(update={"swept": {**table.swept, digest: goal.minutes}})
        table.save(place.path)
    _warn_of_others(table.variants_of(digest))
    tell(1, 1, f"{len(table.entries)} latencies")
    return table


def _warn_of_others(variants: Sequence[Variant]) -> None:
    """Say aloud that a table was measured beside others, where that was so for much of it."""
    count = sum(v.disturbance is not None and v.disturbance.is_disturbed for v in variants)
    if count > MUCH_DISTURBED * len(variants):
        log.warning(
            "Others used this device while %d of %d networks were measured; entries may be off. "
            "To measure all anew when it is quiet, delete the table and profile again.",
            count,
            len(variants),
        )


def prediction_errors(table: LatencyTable, variants: Sequence[Variant]) -> list[float]:
    """Return how far each variant was off its prediction, relative; those without one left out."""
    return [
        variant.predicted_ms / table.usual_ms(variant) - 1
        for variant in variants
        if variant.predicted_ms is not None
    ]


def _is_enough(table: LatencyTable, digest: str, until_s: float) -> bool:
    """Tell whether the time is up, or the last variants were predicted closely enough."""
    designed = [variant for variant in table.variants_of(digest) if not variant.purpose]
    if len(designed) < LEAST_BUILDS:
        return False
    return time.monotonic() > until_s or _last_error(table, designed) <= CLOSE


def _last_error(table: LatencyTable, designed: Sequence[Variant]) -> float:
    """Return the median error of the last predictions, relative; infinite where they are few."""
    errors = prediction_errors(table, designed)[-JUDGED:]
    return median(abs(error) for error in errors) if len(errors) == JUDGED else inf


def _measured(
    rig: Rig, widths: Mapping[str, int], table: LatencyTable, engines: int = 1, purpose: str = ""
) -> LatencyTable:
    """Return the table with one more variant, predicted by the table before it was measured."""
    widths = rig.template.complete(widths)
    try:
        predicted_ms = predict_plan_ms(table, rig.template.layers, widths)
    except MissingLatencyError:  # the first variants: some kind of layer is not known yet
        predicted_ms = None
    variant, keys = rig.measure(widths, engines=engines, purpose=purpose, seed=len(table.variants))
    return table.adding(variant.model_copy(update={"predicted_ms": predicted_ms}), keys)


def _seen_elsewhere(table: LatencyTable, digest: str) -> list[LayerKey]:
    """Return what other templates executed: known before this sweep, however often resumed."""
    places = {i for v in table.variants if v.template != digest for i in v.entries}
    return [table.entries[i].key for i in sorted(places)]


def _shares(table: LatencyTable, template: Template, widths: Mapping[str, int]) -> dict[str, float]:
    """Return each layer's share of a variant's time in which no layer is emptied."""
    variant = next(v for v in table.variants_of(template.digest) if v.widths == widths)
    times = zip(template.layers, variant.times_us, strict=True)
    return {layer.name: max(time_us / variant.sum_us, LEAST_SHARE) for layer, time_us in times}


def _told(table: LatencyTable, digest: str) -> str:
    """Return what to tell after a variant: how far the table was off lately."""
    designed = [variant for variant in table.variants_of(digest) if not variant.purpose]
    error = _last_error(table, designed)
    return "narrowed networks measured" + (
        "" if isinf(error) else f", the last {JUDGED} predicted within {error:.1%}"
    )


def _silent(done: int, total: int, text: str) -> None:
    """Tell nobody."""

"""What was measured of an engine, how, and whether two measurements may be compared."""

from collections.abc import Sequence
from math import log
from typing import ClassVar

import numpy as np

from hardware.device import Device, differences
from hardware.errors import DeviceMismatchError
from hardware.gate.sample import UnitSamples
from hardware.gate.sequential_test import SequentialTest
from hardware.intervals import Interval, median, median_interval
from hardware.records import Record

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
# A quantile rests on samples beyond it: units are joined until there are this many in each tail.
TAIL_SAMPLES = 2


class Subject(Record):
    """An engine file, and how it was run."""

    path: str
    sha256: str
    runtime: str
    version: str
    precision: str
    threads: int
    inputs: tuple[tuple[str, tuple[int, ...]], ...]  # dtype and shape of each, sorted
    is_cold: bool = False  # caches emptied before every sample


class Measurement(Record):
    """Everything that was sampled of one engine in one session, with the reference beside it."""

    SCHEMA: ClassVar[int] = 2
    device: Device
    subject: Subject
    started: str  # ISO 8601, UTC
    units: tuple[UnitSamples, ...]
    reference: tuple[UnitSamples, ...] = ()  # of the reference model, timed in turns with it
    reference_version: int = 0  # 0: it was not timed
    images_per_s: float | None = None
    concurrency: int = 1
    peak_bytes: int | None = None  # resident memory that loading and running added

    def p50(self) -> Interval:
        """Return the median of all samples, and the 95 % interval of the units' medians, ms."""
        estimate = whole("p50", self.units)
        found = median_interval([whole("p50", [unit]) for unit in self.units])
        return Interval(estimate, min(found.low, estimate), max(found.high, estimate))


def whole(metric: str, units: Sequence[UnitSamples]) -> float:
    """Return a metric of several units taken as one, ms: p50, p90, p99, load, first."""
    if metric == "load":
        return median([unit.load_ms for unit in units])
    if metric == "first":
        return median([unit.first_ms for unit in units])
    samples = [sample for unit in units for sample in unit.samples_ms]
    return float(np.quantile(samples, QUANTILES[metric]))


def pair(
    metric: str, candidate: Sequence[UnitSamples], reference: Sequence[UnitSamples]
) -> list[tuple[tuple[UnitSamples, ...], tuple[UnitSamples, ...], int]]:
    """Return stretches of units that are long enough for the metric, of both, with their load.

    A unit that is too short for a tail is joined with the next ones. Loading happens once for all
    units of a load: for `load` only the first of them counts. What is left at the end waits for
    more.
    """
    found = []
    start = 0
    for end in range(1, len(candidate) + 1):
        ours, theirs = tuple(candidate[start:end]), tuple(reference[start:end])
        if metric == "load":
            if start == 0 or candidate[start - 1].load != candidate[start].load:
                found.append((ours, theirs, candidate[start].load))
            start = end
            continue
        needed = TAIL_SAMPLES / (1 - QUANTILES[metric]) if metric != "p50" else 1
        if min(sum(len(u.samples_ms) for u in side) for side in (ours, theirs)) >= needed:
            found.append((ours, theirs, candidate[start].load))
            start = end
    return found


class Feeder:
    """Feeds a sequential test from the units of two engines as they come in."""

    def __init__(self, test: SequentialTest) -> None:
        self.test = test
        self.candidate: list[UnitSamples] = []
        self.reference: list[UnitSamples] = []
        self.last_load = -1

    def add(self, candidate: UnitSamples, reference: UnitSamples) -> None:
        """Take a unit into account; tails wait until there are samples enough beyond them."""
        metric = self.test.limit.metric
        if metric == "load":
            if candidate.load == self.last_load:
                return
            self.last_load = candidate.load
        self.candidate.append(candidate)
        self.reference.append(reference)
        for ours, theirs, load in pair(metric, self.candidate, self.reference):
            self.test.add(log(whole(metric, ours) / whole(metric, theirs)), load)
            self.candidate.clear()
            self.reference.clear()


def recorded_interval(measured: Measurement, metric: str, confidence: float) -> Interval:
    """Return the log of a recorded engine over the reference model, with its interval.

    Raises:
        DeviceMismatchError: it holds too little for this metric and confidence.
    """
    logs = [
        log(whole(metric, ours) / whole(metric, theirs))
        for ours, theirs, _ in pair(metric, measured.units, measured.reference)
    ]
    found = median_interval(logs, confidence) if logs else Interval(0.0, -np.inf, np.inf)
    if not (np.isfinite(found.low) and np.isfinite(found.high)):
        raise DeviceMismatchError(
            f"The recorded measurement of {measured.subject.path} holds {len(logs)} stretches of "
            f"{metric}: too few for a confidence of {100 * confidence:g} %. Record it again with a "
            "larger --budget."
        )
    return found


def require_same_inputs(baseline: Subject, candidate: Subject) -> None:
    """Refuse two engines that do not compute on the same kind of input; raises DeviceMismatchError.

    Runtimes, precisions and threads may differ: that is what may be compared side by side.
    """
    if baseline.inputs != candidate.inputs:
        raise DeviceMismatchError(
            f"Not comparable: {candidate.path} takes {_said(candidate.inputs)}, and the baseline "
            f"{baseline.path} takes {_said(baseline.inputs)}. Build both for the same inputs."
        )


def require_comparable(
    recorded: Measurement, device: Device, subject: Subject, reference_version: int
) -> None:
    """Refuse a recorded measurement that was made elsewhere or otherwise.

    Args:
        recorded: the measurement.
        device: that the engine runs on now.
        subject: the engine, as it runs now.
        reference_version: of the reference model that it is timed with now.

    Raises:
        DeviceMismatchError: another device, runtime, version, precision, threads, inputs or cache.
    """
    found = list(differences(device, recorded.device))
    for field in ("runtime", "version", "precision", "threads", "inputs", "is_cold"):
        ours, theirs = getattr(subject, field), getattr(recorded.subject, field)
        if ours != theirs:
            found.append(f"{field}: {_said(ours)} against {_said(theirs)}")
    if (version := recorded.reference_version) != reference_version:
        found.append(f"reference model: {reference_version} against {version or 'none'}")
    if found:
        raise DeviceMismatchError(
            f"Not comparable with the recorded measurement of {recorded.subject.path}: "
            f"{'; '.join(found)} (now against then). Give the baseline engine itself, to measure "
            "both now, or record it anew here with --save."
        )


def _said(value: object) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return ", ".join(f"{dtype} {shape}" for dtype, shape in value)

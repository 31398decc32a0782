"""Time engines against a baseline until it is sure whether one of them got slower."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone

from hardware.device import Device, foreign_cpu_s
from hardware.gate.engines import (
    REFERENCE,
    REFERENCE_VERSION,
    EngineFile,
    describe,
    loader,
    reference_loader,
)
from hardware.gate.sample import Loader, Schedule, Unit, UnitSamples, sample_units
from hardware.gate.sequential_test import (
    ASSUMED_ALLOWANCE,
    EXACT,
    NO_ALLOWANCE,
    Allowance,
    Comparison,
    Limit,
    SequentialTest,
    Verdict,
)
from hardware.gate.session import (
    Feeder,
    Measurement,
    Subject,
    recorded_interval,
    require_comparable,
    require_same_inputs,
)

CORES_BUSY = 0.25  # used by others: worth saying
RECORDED_PARTS = 3  # that share the error of a comparison with a record

Found = tuple[tuple[Comparison, ...], ...]
"""Per candidate, one comparison for every limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What counts as a regression, and how long to look for it."""

    limits: tuple[Limit, ...] = (Limit("p50", 0.02),)
    confidence: float = 0.99  # of all verdicts together
    schedule: Schedule = field(default_factory=Schedule)
    allowances: Mapping[str, Allowance] = field(default_factory=dict)  # by metric; else as assumed
    # Time the reference model too, and spend the whole budget: the measurement is to be a baseline.
    with_reference: bool = False
    seed: int | None = None  # of all orders; None: by chance, so that no schedule repeats

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise ValueError(f"A confidence lies between 0 and 1; got {self.confidence}.")

    def error(self, engines: int) -> float:
        """Return the error that one verdict may have, so that all together keep the confidence."""
        return (1 - self.confidence) / (engines * len(self.limits))


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What a bench found; `is_complete` is false where Ctrl-C ended it."""

    mode: str  # "paired" | "recorded" | "alone"
    started: str  # ISO 8601, UTC
    measurements: tuple[Measurement, ...]  # one per candidate
    baseline: Measurement | None
    comparisons: Found  # () per candidate where there was no baseline
    confidence: float
    seconds: float
    foreign_cores: float  # used by others meanwhile, on average
    is_complete: bool

    @property
    def verdict(self) -> Verdict | None:
        """The worst of all verdicts; None where there was nothing to compare with."""
        return overall(comparison for found in self.comparisons for comparison in found)

    def updated(self, more: Sequence[Mapping[str, object]]) -> "Session":
        """Return the session with more fields of each measurement: a baseline at hand, then all."""
        base = self.baseline
        if self.mode == "paired" and base is not None:
            base, more = base.model_copy(update=more[0]), more[1:]
        measured = zip(self.measurements, more, strict=True)
        return replace(
            self,
            baseline=base,
            measurements=tuple(one.model_copy(update=fields) for one, fields in measured),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What is known after a unit."""

    seconds: float  # since the start
    subjects: Sequence[Subject]  # the candidates
    unit: Sequence[UnitSamples]  # what each of them took in the last unit
    reference: str  # what they are timed in turns with: the reference model, or a baseline's hash
    beside: UnitSamples  # what it took
    comparisons: Found


Listen = Callable[[Progress], None]


def overall(comparisons: Iterable[Comparison]) -> Verdict | None:
    """Return the worst of the verdicts: regression, then inconclusive, then pass; None: none."""
    found = {comparison.verdict for comparison in comparisons}
    for verdict in (Verdict.REGRESSION, Verdict.INCONCLUSIVE, Verdict.PASS):
        if verdict in found:
            return verdict
    return None


def bench(
    engines: Sequence[EngineFile],
    baseline: EngineFile | Measurement | None,
    rules: Rules = Rules(),
    listen: Listen = lambda progress: None,
) -> Session:
    """Sample until every verdict is sure, one is a regression, or the budget is spent.

    With a baseline engine all are timed in turns (paired). With a recorded baseline every engine is
    timed in turns with the reference model, and the ratios to it are compared. Without a baseline,
    and where the measurement is to be one, the whole budget is spent. Ctrl-C ends the sampling;
    what was measured until then is returned.

    Raises:
        DeviceMismatchError: the baseline cannot be compared with.
        HardwareError: an engine does not load, or failed while it ran.
        KeyboardInterrupt: nothing had been measured yet.
    """
    lineup = _line_up(engines, baseline, rules)
    started, start_s, foreign_s = _now(), time.monotonic(), foreign_cpu_s()
    is_complete = True
    try:
        for unit in sample_units(lineup.loaders, rules.schedule, seed=rules.seed):
            found = lineup.add(unit)
            listen(lineup.progress(unit, time.monotonic() - start_s, found))
            verdict = overall(c for each in found for c in each)
            if verdict in (Verdict.REGRESSION, Verdict.PASS) and not rules.with_reference:
                break
    except KeyboardInterrupt:
        if not lineup.units:
            raise
        is_complete = False
    seconds = time.monotonic() - start_s
    measured = lineup.measurements(started)
    recorded = baseline if isinstance(baseline, Measurement) else None
    return Session(
        mode="paired" if lineup.is_paired else "recorded" if recorded else "alone",
        started=started,
        measurements=measured[1:] if lineup.is_paired else measured,
        baseline=measured[0] if lineup.is_paired else recorded,
        comparisons=lineup.compare(),
        confidence=rules.confidence,
        seconds=seconds,
        foreign_cores=max(0.0, foreign_cpu_s() - foreign_s) / max(seconds, 1e-9),
        is_complete=is_complete,
    )


@dataclass(slots=True, kw_only=True)
class _Lineup:
    """Who is timed: the baseline where it is at hand, the candidates, the reference model."""

    devices: list[Device]  # one per subject
    subjects: list[Subject]  # without the reference model
    loaders: list[Loader]
    feeders: list[tuple[Feeder, ...]]  # per candidate, one per limit
    is_paired: bool
    has_reference: bool  # whether the reference model is timed, last of all
    units: list[Unit] = field(default_factory=list)

    def add(self, unit: Unit) -> Found:
        """Take a unit into account and return what the comparisons come to."""
        self.units.append(unit)
        for column, feeders in zip(self.candidates(unit), self.feeders, strict=True):
            for feeder in feeders:
                feeder.add(column, self.beside(unit))
        return self.compare()

    @property
    def reference(self) -> str:
        """Name what the candidates are timed in turns with."""
        return self.subjects[0].sha256 if self.is_paired else REFERENCE

    def beside(self, unit: Unit) -> UnitSamples:
        """Return the reference's part of a unit."""
        return unit[0] if self.is_paired else unit[-1]

    def candidates(self, unit: Unit) -> Unit:
        """Return the candidates' part of a unit."""
        return unit[int(self.is_paired) : len(self.subjects)]

    def progress(self, unit: Unit, seconds: float, found: Found) -> Progress:
        """Return what is known after a unit."""
        return Progress(
            seconds=seconds,
            subjects=self.subjects[int(self.is_paired) :],
            unit=self.candidates(unit),
            reference=self.reference,
            beside=self.beside(unit),
            comparisons=found,
        )

    def compare(self) -> Found:
        """Return what the comparisons come to at this moment."""
        return tuple(tuple(f.test.comparison() for f in feeders) for feeders in self.feeders)

    def measurements(self, started: str) -> tuple[Measurement, ...]:
        """Return what was sampled of all but the reference model, in the order of the subjects."""
        return tuple(
            Measurement(
                device=device,
                subject=subject,
                started=started,
                units=tuple(unit[index] for unit in self.units),
                reference=tuple(unit[-1] for unit in self.units) if self.has_reference else (),
                reference_version=REFERENCE_VERSION if self.has_reference else 0,
            )
            for index, (device, subject) in enumerate(zip(self.devices, self.subjects, strict=True))
        )


def _line_up(
    engines: Sequence[EngineFile], baseline: EngineFile | Measurement | None, rules: Rules
) -> _Lineup:
    is_cold = rules.schedule.is_cold
    subjects = [describe(engine, is_cold=is_cold) for engine in engines]
    if isinstance(baseline, Measurement):
        for engine, subject in zip(engines, subjects, strict=True):
            require_comparable(baseline, engine.device(), subject, REFERENCE_VERSION)
    elif baseline is not None:
        first = describe(baseline, is_cold=is_cold)
        for subject in subjects:
            require_same_inputs(first, subject)
        subjects.insert(0, first)
        engines = [baseline, *engines]
    is_paired = isinstance(baseline, EngineFile)
    has_reference = rules.with_reference or not is_paired
    loaders = [loader(engine.load) for engine in engines]
    if has_reference:
        loaders.append(reference_loader(engines[0].runtime, engines[0].settings))
    return _Lineup(
        devices=[engine.device() for engine in engines],
        subjects=subjects,
        loaders=loaders,
        feeders=_feeders(len(subjects) - int(is_paired), baseline, rules),
        is_paired=is_paired,
        has_reference=has_reference,
    )


def _feeders(
    count: int, baseline: EngineFile | Measurement | None, rules: Rules
) -> list[tuple[Feeder, ...]]:
    """Return the tests of every candidate; they share the error that is allowed in equal parts."""
    if baseline is None:
        return [() for _ in range(count)]
    error = rules.error(count)
    if isinstance(baseline, EngineFile):
        tests = [(limit, 1 - error, EXACT, NO_ALLOWANCE) for limit in rules.limits]
    else:  # the candidate, the record and the allowance between them may each err in a third
        tests = [
            (
                limit,
                1 - error / RECORDED_PARTS,
                recorded_interval(baseline, limit.metric, 1 - error / RECORDED_PARTS),
                rules.allowances.get(limit.metric, ASSUMED_ALLOWANCE),
            )
            for limit in rules.limits
        ]
    return [tuple(Feeder(SequentialTest(*test)) for test in tests) for _ in range(count)]


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")

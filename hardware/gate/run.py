"""`espalier bench` as one call: lock the machine, find the baseline, measure, note it, save it."""

import re
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from hardware.errors import DeviceMismatchError, StorageError
from hardware.gate.bench import RECORDED_PARTS, Progress, Rules, Session, bench
from hardware.gate.capacity import (
    WINDOWS,
    Values,
    compare_until_sure,
    sample_peaks,
    sample_rates,
)
from hardware.gate.engines import EngineFile, engine_file
from hardware.gate.history import History, read_history, session_allowance
from hardware.gate.outcome import Outcome, outcome
from hardware.gate.sequential_test import (
    CAPACITIES,
    Allowance,
    Comparison,
    Limit,
    SequentialTest,
)
from hardware.gate.session import Measurement
from hardware.lock import machine_lock
from hardware.records import load_record, model_digest, save_record
from hardware.runtimes.base import EngineSettings

Show = Callable[[float, Sequence[Sequence[Comparison]]], None]
"""Gets the seconds since the start, and per candidate what is known of each limit."""

SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be benched, against what, and what to keep."""

    engines: tuple[Path, ...]
    history: Path  # folder
    baseline: Path | None = None  # an engine, or a measurement that `save` wrote
    is_recorded: bool = False  # compare with the record although its engine is at hand
    allowance: Allowance | None = None  # between sessions; None: as the history tells
    runtime: str | None = None  # None: by the names of the files
    settings: EngineSettings = field(default_factory=EngineSettings)
    baseline_threads: int | None = None  # None: as many as the engines
    rules: Rules = field(default_factory=Rules)
    concurrency: int = 0  # measure throughput with so many inferences at a time; 0: do not
    with_memory: bool = False
    save: Path | None = None

    def __post_init__(self) -> None:
        if self.save is not None and len(self.engines) != 1:
            raise ValueError(f"A record holds one engine; got {len(self.engines)} to save.")
        if self.concurrency < 0:
            raise ValueError(f"A concurrency is 1 or more; got {self.concurrency}.")
        if not self.rules.limits:
            raise ValueError("There is no limit. Give one, like p50:2%.")
        if "throughput" in self.limits_of(CAPACITIES) and not self.concurrency:
            raise ValueError("A limit of throughput needs --concurrency N.")

    def limits_of(self, metrics: Sequence[str]) -> dict[str, Limit]:
        """Return the limits of these metrics."""
        return {limit.metric: limit for limit in self.rules.limits if limit.metric in metrics}


def gate(request: Request, show: Show = lambda seconds, found: None) -> Outcome:
    """Bench as asked; every unit is in the history before the next begins.

    Raises:
        BusyError: another process measures on this machine.
        DeviceMismatchError: the baseline cannot be compared with.
        HardwareError: an engine does not load or run, or a file cannot be written.
        KeyboardInterrupt: nothing had been measured yet.
    """
    engines = [engine_file(path, request.runtime, request.settings) for path in request.engines]
    with machine_lock(f"timing {', '.join(path.name for path in request.engines)}"):
        baseline = find_baseline(request)
        history = History(history_path(request), uuid.uuid4().hex)
        begun: list[str] = []

        def listen(progress: Progress) -> None:
            if not begun:
                history.begin(progress.subjects, progress.reference)
                begun.append(history.session)
            history.add(progress.subjects, progress.unit, progress.beside)
            show(progress.seconds, progress.comparisons)

        session = bench(engines, baseline, _latency_rules(request, baseline), listen)
        session = replace(session, confidence=request.rules.confidence)
        if session.is_complete:
            try:
                session = _with_capacity(session, engines, baseline, request, show)
            except KeyboardInterrupt:
                session = replace(session, is_complete=False)
        found = outcome(session)
        history.end(found)
    if request.save is not None and session.is_complete:
        save_record(session.measurements[0], request.save)
    return found


def history_path(request: Request) -> Path:
    """Return the file of the history of the device that the (first) engine runs on."""
    first = engine_file(request.engines[0], request.runtime, request.settings)
    return request.history / f"{first.device().slug}.jsonl"


def find_baseline(request: Request) -> EngineFile | Measurement | None:
    """Return the baseline: the engine where it is at hand, else what was recorded of it.

    Raises:
        StorageError: no such file, or it is no record.
        BuildError: its name tells no runtime.
    """
    path, settings = request.baseline, request.settings
    if path is None:
        return None
    if request.baseline_threads is not None:
        settings = replace(settings, threads=request.baseline_threads)
    if path.suffix != ".json":
        return engine_file(path, request.runtime, settings)
    if not path.is_file():
        raise StorageError(
            f"There is no file {path}. Make it with: espalier bench ... --save {path}"
        )
    recorded = load_record(Measurement, path)
    engine = Path(recorded.subject.path)
    is_here = engine.is_file() and model_digest(engine) == recorded.subject.sha256
    if request.is_recorded or not is_here:
        return recorded
    return engine_file(engine, recorded.subject.runtime, settings)


def _latency_rules(request: Request, baseline: EngineFile | Measurement | None) -> Rules:
    """Return the rules of the latencies, which have their part of the error."""
    is_recorded = isinstance(baseline, Measurement)
    capacities = request.limits_of(CAPACITIES)
    if is_recorded and capacities:
        raise DeviceMismatchError(
            f"Not comparable: a record has no samples of {' and '.join(capacities)}. Give the "
            "baseline engine itself, or leave that limit out."
        )
    limits = tuple(one for one in request.rules.limits if one.metric not in capacities)
    error = (1 - request.rules.confidence) * len(limits) / len(request.rules.limits)
    return replace(
        request.rules,
        limits=limits,
        confidence=1 - error if limits else request.rules.confidence,
        with_reference=request.save is not None,
        allowances=_allowances(request) if is_recorded else {},
    )


def _allowances(request: Request) -> dict[str, Allowance]:
    """Return what is tolerated of every metric on top of its limit; raises StorageError."""
    metrics = {limit.metric for limit in request.rules.limits}
    if request.allowance is not None:
        return dict.fromkeys(metrics, request.allowance)
    past = read_history(history_path(request))
    error = request.rules.error(len(request.engines)) / RECORDED_PARTS
    return {metric: session_allowance(past, metric, error) for metric in metrics}


def _with_capacity(
    session: Session,
    engines: list[EngineFile],
    baseline: EngineFile | Measurement | None,
    request: Request,
    show: Show,
) -> Session:
    """Return the session with throughput and memory of all engines that are at hand."""
    is_paired = isinstance(baseline, EngineFile)
    everyone = [baseline, *engines] if isinstance(baseline, EngineFile) else engines
    limits = request.limits_of(CAPACITIES) if is_paired else {}
    budget_s, seed = request.rules.schedule.budget_s, request.rules.seed
    sources: dict[str, tuple[Iterable[Values], int]] = {}
    if request.concurrency:
        rates = sample_rates(everyone, request.concurrency, budget_s, seed=seed)
        sources["throughput"] = (rates, WINDOWS)
    if request.with_memory or "memory" in limits:
        sources["memory"] = (sample_peaks(everyone, budget_s, seed=seed), 1)
    confidence = 1 - request.rules.error(len(engines))
    start_s = time.monotonic()
    for metric, (units, enough) in sources.items():
        tests = [SequentialTest(limits[metric], confidence) for _ in engines if metric in limits]
        medians, found = compare_until_sure(
            units, tests, enough, lambda c: show(time.monotonic() - start_s, [(one,) for one in c])
        )
        session = _noted(session, metric, medians, found, request.concurrency)
    return session


def _noted(
    session: Session,
    metric: str,
    medians: Values,
    found: Sequence[Comparison],
    concurrency: int,
) -> Session:
    """Return the session with a capacity of all engines and what it comes to for each candidate."""
    if metric == "throughput":
        session = session.updated(
            [{"images_per_s": rate, "concurrency": concurrency} for rate in medians]
        )
    else:
        session = session.updated([{"peak_bytes": round(peak)} for peak in medians])
    if not found:
        return session
    both = zip(session.comparisons, found, strict=True)
    return replace(session, comparisons=tuple((*old, new) for old, new in both))


def parse_seconds(text: str) -> float:
    """Return the seconds of `60s`, `1.5m`, `500ms` or a plain number.

    Raises:
        ValueError: not a time.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-z]*)\s*", text)
    if match is None or match[2] not in SECONDS:
        raise ValueError(
            f"A time is a number with ms, s, m or h behind it, like 60s; got {text!r}."
        )
    return float(match[1]) * SECONDS[match[2]]

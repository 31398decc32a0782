"""`espalier bench` as one call: lock the machine, find the baseline, measure, note it, save it."""

import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from hardware.benching import RECORDED_PARTS, Glimpse, Rules, Session, bench
from hardware.capacity import measure_peak_bytes, measure_throughput
from hardware.comparing import Drift
from hardware.contenders import Contender, contender
from hardware.device import this_device
from hardware.drifting import session_drift
from hardware.errors import StorageError
from hardware.histories import History, read_history
from hardware.locking import default_lock, machine_lock
from hardware.measuring import Measurement, file_hash
from hardware.outcomes import Outcome, outcome
from hardware.runtimes.base import EngineSettings
from hardware.storing import load_record, save_record

SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be benched, against what, and what to keep."""

    engines: tuple[Path, ...]
    history: Path  # folder
    baseline: Path | None = None  # an engine, or a measurement that `save` wrote
    is_recorded: bool = False  # compare with the record although its engine is at hand
    drift: Drift | None = None  # tolerated against a record; None: as the history tells
    runtime: str | None = None  # None: by the names of the files
    settings: EngineSettings = field(default_factory=EngineSettings)
    rules: Rules = field(default_factory=Rules)
    concurrency: int = 0  # measure throughput with so many inferences at a time; 0: do not
    with_memory: bool = False
    save: Path | None = None

    def __post_init__(self) -> None:
        if self.save is not None and len(self.engines) != 1:
            raise ValueError(f"A record holds one engine; got {len(self.engines)} to save.")
        if self.concurrency < 0:
            raise ValueError(f"A concurrency is 1 or more; got {self.concurrency}.")


def gate(request: Request, tell: Callable[[Glimpse], None] = lambda glimpse: None) -> Outcome:
    """Bench as asked; every unit is in the history before the next begins.

    Raises:
        BusyError: another bench runs on this machine.
        DeviceMismatchError: the baseline cannot be compared with.
        HardwareError: an engine does not load or run, or a file cannot be written.
        KeyboardInterrupt: nothing had been measured yet.
    """
    engines = [contender(path, request.runtime, request.settings) for path in request.engines]
    with machine_lock(default_lock()):
        baseline = find_baseline(request)
        history = History(history_path(request.history), uuid.uuid4().hex)
        begun: list[str] = []

        def listen(glimpse: Glimpse) -> None:
            if not begun:
                history.begin(glimpse.subjects, glimpse.reference)
                begun.append(history.session)
            history.add(glimpse.subjects, glimpse.unit, glimpse.beside)
            tell(glimpse)

        rules = replace(
            request.rules,
            with_anchor=request.save is not None,
            drifts=_drifts(request) if isinstance(baseline, Measurement) else {},
        )
        session = bench(engines, baseline, rules, listen)
        if session.is_complete:
            session = _with_capacity(session, engines, baseline, request)
        found = outcome(session)
        history.end(found)
    if request.save is not None and session.is_complete:
        save_record(session.measurements[0], request.save)
    return found


def history_path(folder: Path) -> Path:
    """Return the file of this device's history."""
    return folder / f"{this_device().slug}.jsonl"


def find_baseline(request: Request) -> Contender | Measurement | None:
    """Return the baseline: the engine where it is at hand, else what was recorded of it.

    Raises:
        StorageError: no such file, or it is no record.
        BuildError: its name tells no runtime.
    """
    path = request.baseline
    if path is None:
        return None
    if path.suffix != ".json":
        return contender(path, request.runtime, request.settings)
    if not path.is_file():
        raise StorageError(
            f"There is no file {path}. Make it with: espalier bench ... --save {path}"
        )
    recorded = load_record(Measurement, path)
    engine = Path(recorded.subject.path)
    is_here = engine.is_file() and file_hash(engine) == recorded.subject.sha256
    if request.is_recorded or not is_here:
        return recorded
    return contender(engine, recorded.subject.runtime, request.settings)


def _drifts(request: Request) -> dict[str, Drift]:
    """Return what is tolerated of every metric on top of its limit; raises StorageError."""
    metrics = {limit.metric for limit in request.rules.limits}
    if request.drift is not None:
        return dict.fromkeys(metrics, request.drift)
    past = read_history(history_path(request.history))
    error = request.rules.error(len(request.engines)) / RECORDED_PARTS
    return {metric: session_drift(past, metric, error) for metric in metrics}


def _with_capacity(
    session: Session,
    engines: list[Contender],
    baseline: Contender | Measurement | None,
    request: Request,
) -> Session:
    """Return the session with throughput and memory of all engines that are at hand."""
    everyone = [*([baseline] if isinstance(baseline, Contender) else []), *engines]
    rates: tuple[float | None, ...] = (None,) * len(everyone)
    if request.concurrency:
        rates = measure_throughput(everyone, request.concurrency, seed=request.rules.seed)
    peaks = [measure_peak_bytes(engine) if request.with_memory else None for engine in everyone]
    more = [
        {"images_per_s": rate, "peak_bytes": peak, "concurrency": max(request.concurrency, 1)}
        for rate, peak in zip(rates, peaks, strict=True)
    ]
    return session.updated(more)


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

"""The history of a device: one file to which every bench appends what it measures, as it goes.

Lines are JSON. A process that is killed in the middle of a line leaves a torn one: readers skip it,
and the next bench cuts it off before it appends.

The history tells how far two sessions of one engine differ although nothing changed. A recorded
baseline is compared through the reference model, which is timed in turns with the engine in either
session. What moves both alike divides out; what is left is another layout of memory, another system
service, another kernel. Engines that were benched more than once show how large it is.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import expm1, log, sqrt
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from scipy.stats import t as students_t

from hardware.errors import StorageError
from hardware.gate.engines import REFERENCE
from hardware.gate.outcome import Outcome
from hardware.gate.sample import UnitSamples
from hardware.gate.sequential_test import ASSUMED_ALLOWANCE, Allowance
from hardware.gate.session import QUANTILES, Subject, whole
from hardware.intervals import median
from hardware.records import Record

LEAST_REPEATS = 4  # sessions beyond the first of their engine that make an estimate
LEAST_UNITS = 5  # of a session, for its median to mean something


class Begun(Record):
    """A session began."""

    kind: str = "begun"
    session: str
    subjects: tuple[Subject, ...]  # the candidates
    reference: str = ""  # what they were timed in turns with: the reference model, or a hash


class Times(Record):
    """What a unit took."""

    samples: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    load_ms: float
    first_ms: float


class Measured(Times):
    """One unit of one engine."""

    kind: str = "unit"
    session: str
    sha256: str
    reference: Times | None = None  # what the session's reference took in the same unit


class Ended(Record):
    """A session came to its end, or was interrupted by Ctrl-C."""

    kind: str = "ended"
    session: str
    outcome: Outcome


Line = Begun | Measured | Ended
KINDS: dict[str, type[Line]] = {"begun": Begun, "unit": Measured, "ended": Ended}


@dataclass(frozen=True, slots=True)
class Past:
    """One session of the history; `outcome` is None where the process was killed."""

    session: str
    subjects: tuple[Subject, ...]
    reference: str
    units: tuple[Measured, ...]
    outcome: Outcome | None


class History:
    """Appends to the file of one device."""

    def __init__(self, path: Path, session: str) -> None:
        self.path, self.session = path, session

    def begin(self, subjects: Sequence[Subject], reference: str = "") -> None:
        """Note that a session begins; raises StorageError."""
        begun = Begun(session=self.session, subjects=tuple(subjects), reference=reference)
        self._append([begun])

    def add(
        self,
        subjects: Sequence[Subject],
        unit: Sequence[UnitSamples],
        reference: UnitSamples | None = None,
    ) -> None:
        """Note a unit of every candidate, and of the reference; raises StorageError."""
        beside = None if reference is None else Times(**_times(reference))
        self._append(
            [
                Measured(
                    session=self.session,
                    sha256=subject.sha256,
                    reference=beside,
                    **_times(samples),
                )
                for subject, samples in zip(subjects, unit, strict=True)
            ]
        )

    def end(self, outcome: Outcome) -> None:
        """Note what the session came to; raises StorageError."""
        self._append([Ended(session=self.session, outcome=outcome)])

    def _append(self, lines: Sequence[Line]) -> None:
        text = "".join(json.dumps(line.model_dump(mode="json")) + "\n" for line in lines)
        with _opened(self.path) as handle:
            _cut_torn_line(handle)
            rest = text.encode()
            while rest:  # a full disk may take a part, and says so at the next call
                rest = rest[os.write(handle, rest) :]


def _times(unit: UnitSamples) -> dict[str, Any]:  # Any: as pydantic takes fields
    quantiles = {f"{name}_ms": whole(name, [unit]) for name in QUANTILES}
    loading = {"load_ms": unit.load_ms, "first_ms": unit.first_ms}
    return {"samples": len(unit.samples_ms), **quantiles, **loading}


def read_history(path: Path) -> tuple[Past, ...]:
    """Return every session in the order of its beginning, () where there is no file.

    Raises:
        StorageError: it cannot be read, or a whole line is damaged.
    """
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise StorageError(f"Cannot read {path}: {error.strerror or error}.") from error
    begun: dict[str, Begun] = {}
    units: dict[str, list[Measured]] = {}
    ended: dict[str, Outcome] = {}
    for number, text in enumerate(content.split(b"\n")[:-1], start=1):
        line = _parsed(text, f"{path}, line {number}")
        if isinstance(line, Begun):
            begun[line.session] = line
        elif isinstance(line, Measured):
            units.setdefault(line.session, []).append(line)
        else:
            ended[line.session] = line.outcome
    return tuple(
        Past(name, first.subjects, first.reference, tuple(units.get(name, ())), ended.get(name))
        for name, first in begun.items()
    )


def _parsed(text: bytes, place: str) -> Line:
    try:
        body = json.loads(text)
        return TypeAdapter(KINDS[body["kind"]]).validate_python(body)
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise StorageError(
            f"{place} is damaged or from another version of Espalier: {error}. Delete the line."
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Open the file for appending, alone."""
    handle: int | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    except OSError as error:
        raise StorageError(
            f"Cannot write the history {path}: {error.strerror or error}. "
            "Free space or choose another folder with --history."
        ) from error
    finally:
        if handle is not None:
            os.close(handle)


def _cut_torn_line(handle: int) -> None:
    """Cut off what follows the last newline."""
    size = end = os.fstat(handle).st_size
    while end:
        start = max(0, end - 4096)
        block = os.pread(handle, end - start, start)
        if (at := block.rfind(b"\n")) >= 0:
            end = start + at + 1
            break
        end = start
    if end < size:
        os.ftruncate(handle, end)


def session_allowance(sessions: Sequence[Past], metric: str, error: float) -> Allowance:
    """Return how much slower one session may come out than another one of the same engine.

    The log-ratios of engine and reference model scatter around the mean of their engine; the
    scatter of all engines is pooled, and the difference of two new sessions is predicted from it.
    Unlike the paired comparison, this assumes a distribution (normal, the same for all engines),
    and that the future scatters like the past: sessions of several days teach more than those of
    one hour.

    Args:
        sessions: the device's history.
        metric: "p50", "p90", "p99", "load".
        error: the probability that a session exceeds the bound, 0 to 1.

    Returns:
        The one-sided bound; `ASSUMED_ALLOWANCE` where too few sessions repeat an engine.

    Reference:
        Hahn and Meeker, "Statistical Intervals", 1991, ch. 4: the prediction bound for a future
        observation of a normal distribution; pooled, and for the difference of two, it is ours.
    """
    groups = [found for found in _by_engine(sessions, metric).values() if len(found) > 1]
    repeats = sum(len(found) - 1 for found in groups)
    if repeats < LEAST_REPEATS:
        return ASSUMED_ALLOWANCE
    scatter = sqrt(sum(_squares(found) for found in groups) / repeats)
    bound = float(students_t.isf(error, repeats)) * scatter * sqrt(2)
    return Allowance(expm1(bound), sum(map(len, groups)))


def _by_engine(sessions: Iterable[Past], metric: str) -> dict[Subject, list[float]]:
    """Return the log-ratio of every session with the reference model, by engine and setting."""
    found: dict[Subject, list[float]] = {}
    for past in (past for past in sessions if past.reference == REFERENCE):
        for subject in past.subjects:
            units = [unit for unit in past.units if unit.sha256 == subject.sha256]
            ratios = [ratio for unit in units if (ratio := _log_ratio(unit, metric)) is not None]
            if len(ratios) >= LEAST_UNITS:
                # The same bytes are the same engine wherever the file lies.
                key = subject.model_copy(update={"path": ""})
                found.setdefault(key, []).append(median(ratios))
    return found


def _log_ratio(unit: Measured, metric: str) -> float | None:
    if unit.reference is None:
        return None
    return log(getattr(unit, f"{metric}_ms") / getattr(unit.reference, f"{metric}_ms"))


def _squares(values: Sequence[float]) -> float:
    """Return the sum of squared distances from the mean."""
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values)

"""How far two sessions on a device differ although nothing changed, as its history tells.

A recorded baseline is compared through an anchor, a fixed network that is timed in turns with the
engine in either session. What moves both alike divides out; what is left is the drift: another
layout of memory, another system service, another kernel. Engines that were benched more than once
show how large it is on this device.
"""

from collections.abc import Iterable, Sequence
from math import expm1, log, sqrt

from scipy.stats import t as students_t

from hardware.gate.history import Measured, Past
from hardware.gate.reference import NAME
from hardware.gate.sequential_test import ASSUMED_DRIFT, Drift
from hardware.gate.session import Subject
from hardware.intervals import median

LEAST_REPEATS = 4  # sessions beyond the first of their engine that make an estimate
LEAST_UNITS = 5  # of a session, for its median to mean something


def session_drift(sessions: Sequence[Past], metric: str, error: float) -> Drift:
    """Return how much slower one session may come out than another one of the same engine.

    The log-ratios of engine and anchor scatter around the mean of their engine; the scatter of all
    engines is pooled, and the difference of two new sessions is predicted from it. Unlike the
    paired comparison, this assumes a distribution (normal, the same for all engines), and that the
    future drifts like the past: sessions of several days teach more than those of one hour.

    Args:
        sessions: the device's history.
        metric: "p50", "p90", "p99", "load".
        error: the probability that a session exceeds the bound, 0 to 1.

    Returns:
        The one-sided bound; `ASSUMED_DRIFT` where too few sessions repeat an engine.

    Reference:
        Hahn and Meeker, "Statistical Intervals", 1991, ch. 4: the prediction bound for a future
        observation of a normal distribution; pooled, and for the difference of two, it is ours.
    """
    groups = [found for found in _by_engine(sessions, metric).values() if len(found) > 1]
    repeats = sum(len(found) - 1 for found in groups)
    if repeats < LEAST_REPEATS:
        return ASSUMED_DRIFT
    scatter = sqrt(sum(_squares(found) for found in groups) / repeats)
    bound = float(students_t.isf(error, repeats)) * scatter * sqrt(2)
    return Drift(expm1(bound), sum(map(len, groups)))


def _by_engine(sessions: Iterable[Past], metric: str) -> dict[Subject, list[float]]:
    """Return the log-ratio of every session with an anchor, by engine and setting."""
    found: dict[Subject, list[float]] = {}
    for past in (past for past in sessions if past.reference == NAME):
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

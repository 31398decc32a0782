"""Judge the same samples by every method, and count how often each errs."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import beta, mannwhitneyu, ttest_ind

from benchmarks.gate.cases import SLOWER_PCT
from hardware.gate.bench import Session
from hardware.gate.sequential_test import Verdict
from hardware.intervals import median
from hardware.records import Record

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]
Rates = dict[str, Any]  # Any: JSON, nested
OURS = "espalier"
# As commonly used: no tolerance in the tests, and all samples taken as independent.
OTHERS: dict[str, Callable[[Floats, Floats], bool]] = {
    "fixed 5 % on the median": lambda new, old: bool(np.median(new) > 1.05 * np.median(old)),
    "Welch's t-test, p < 0.05": lambda new, old: bool(
        ttest_ind(new, old, equal_var=False, alternative="greater").pvalue < 0.05
    ),
    "Mann-Whitney, p < 0.05": lambda new, old: bool(
        mannwhitneyu(new, old, alternative="greater").pvalue < 0.05
    ),
}
THREADS = "threads "


class Run(Record):
    """One comparison of two engines, and what every method says of it."""

    kind: str
    beside: bool
    runtime: str
    seconds: float  # of sampling
    wall_s: float  # of everything
    slower_pct: float  # as measured in this run
    said: dict[str, Verdict]  # by method


def judge(session: Session, kind: str, *, beside: bool, runtime: str, wall_s: float) -> Run:
    """Return what every method says of the samples that the bench took until it was sure."""
    assert session.baseline is not None and session.verdict is not None
    new, old = (
        np.array([sample for unit in one.units for sample in unit.samples_ms])
        for one in (session.measurements[0], session.baseline)
    )
    said = {OURS: session.verdict}
    for name, is_slower in OTHERS.items():
        said[name] = Verdict.REGRESSION if is_slower(new, old) else Verdict.PASS
    return Run(
        kind=kind,
        beside=beside,
        runtime=runtime,
        seconds=session.seconds,
        wall_s=wall_s,
        slower_pct=100 * (session.comparisons[0][0].ratio.estimate - 1),
        said=said,
    )


def report(runs: Sequence[Run]) -> Rates:
    """Return the error rates of all methods, with and without a neighbour; percent."""
    alone = [run for run in runs if not run.beside]
    beside = [run for run in runs if run.beside]
    return {
        **rates(alone, OURS),
        "with_neighbour": rates(beside, OURS),
        "others": {
            name: {**rates(alone, name), "with_neighbour": rates(beside, name)} for name in OTHERS
        },
    }


def rates(runs: Sequence[Run], method: str) -> Rates:
    """Return the error rates of one method, percent; None where nothing was run."""
    said = {kind: [run.said[method] for run in runs if run.kind == kind] for kind in _kinds(runs)}
    equal = said.get("aa", [])
    found: Rates = {
        "aa_runs": len(equal),
        "false_alarm_pct": _share(equal, Verdict.REGRESSION),
        "false_alarm_upper_pct": _upper(equal, Verdict.REGRESSION),
        "inconclusive_pct": _share(equal, Verdict.INCONCLUSIVE),
        "runs": {str(p): len(said.get(str(p), [])) for p in SLOWER_PCT},
        "detection_pct": {
            str(p): _share(said.get(str(p), []), Verdict.REGRESSION) for p in SLOWER_PCT
        },
    }
    if any(kind.startswith(THREADS) for kind in said):
        found["detection_by_threads_pct"] = {
            str(p): _share(said.get(f"{THREADS}{p}", []), Verdict.REGRESSION) for p in SLOWER_PCT
        }
    if method == OURS:
        found["measured_slow_down_pct"] = {
            kind: round(median([r.slower_pct for r in runs if r.kind == kind]), 2) for kind in said
        }
        found["median_seconds"] = {
            kind: round(median([r.seconds for r in runs if r.kind == kind]), 1) for kind in said
        }
    return found


def _kinds(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(run.kind for run in runs))


def _share(said: Sequence[Verdict], verdict: Verdict) -> float | None:
    return 100 * said.count(verdict) / len(said) if said else None


def _upper(said: Sequence[Verdict], verdict: Verdict) -> float | None:
    """Return the 95 % upper bound of the rate (Clopper and Pearson), percent."""
    if not said:
        return None
    hits = said.count(verdict)
    return (
        100.0 if hits == len(said) else round(100 * beta.ppf(0.95, hits + 1, len(said) - hits), 2)
    )


def shortfalls(found: Rates) -> list[str]:
    """Return in words where the summary misses what the gate promises, [] where nothing."""
    missed = []
    for where, part in (("alone", found), ("beside a neighbour", found["with_neighbour"])):
        alarms, detection = part["false_alarm_pct"], part["detection_pct"]
        if alarms is not None and alarms > 1:
            missed.append(f"{where}: {alarms:.1f} % false alarms, not 1 % at most")
        for percent, least in (("5", 99), ("10", 100)):
            if detection[percent] is not None and detection[percent] < least:
                missed.append(
                    f"{where}: {detection[percent]:.1f} % of the slow-downs of {percent} % found, "
                    f"not {least} %"
                )
    return missed

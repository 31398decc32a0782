"""What a bench came to, as a record: for the history, for reports, and for people."""

from hardware.gate.bench import Session
from hardware.gate.sequential_test import Comparison, Verdict
from hardware.gate.session import QUANTILES, Measurement, Subject, whole
from hardware.intervals import Interval
from hardware.records import Record


class Checked(Record):
    """One limit and what it came to; a bound or an effect that is not known yet is None."""

    metric: str
    limit_pct: float
    verdict: Verdict
    slower_pct: float  # the candidate against the baseline; negative: it is faster
    low_pct: float | None
    high_pct: float | None
    detectable_pct: float | None  # the least slow-down that this run would have called a regression
    units: int
    # The allowance between sessions, on top of the limit; called so in histories from the start.
    drift_pct: float = 0.0
    drift_sessions: int = 0  # that it was estimated from; 0: assumed, or given


class Figures(Record):
    """What one engine took; intervals are those of the median over units, at 95 %."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    p50_low_ms: float | None
    p50_high_ms: float | None
    load_ms: float
    first_ms: float  # the first inference after loading
    samples: int
    loads: int
    images_per_s: float | None = None
    concurrency: int = 1
    peak_bytes: int | None = None


class Row(Record):
    """One engine."""

    subject: Subject
    figures: Figures
    checks: tuple[Checked, ...] = ()


class Outcome(Record):
    """What a bench came to."""

    mode: str  # "paired" | "recorded" | "alone"
    started: str
    seconds: float
    device: str  # what the engines run on; several where their runtimes differ
    fingerprint: str  # of the first one's
    confidence_pct: float
    foreign_cores: float
    is_complete: bool
    verdict: Verdict | None
    baseline: Row | None
    rows: tuple[Row, ...]


def outcome(session: Session) -> Outcome:
    """Return the record of a session."""
    devices = [measured.device for measured in session.measurements]
    return Outcome(
        mode=session.mode,
        started=session.started,
        seconds=round(session.seconds, 2),
        device=", ".join(dict.fromkeys(device.name for device in devices)),
        fingerprint=devices[0].fingerprint,
        confidence_pct=100 * session.confidence,
        foreign_cores=round(session.foreign_cores, 2),
        is_complete=session.is_complete,
        verdict=session.verdict,
        baseline=None if session.baseline is None else _row(session.baseline, ()),
        rows=tuple(
            _row(measured, comparisons)
            for measured, comparisons in zip(session.measurements, session.comparisons, strict=True)
        ),
    )


# What a comparison is called, and what its limit is there to notice.
NAMES = {
    "throughput": ("throughput: time per image", "slow-down"),
    "memory": ("peak memory", "increase"),
}


def sentence(check: Checked, confidence_pct: float) -> str:
    """Return what a check says, for people."""
    if check.low_pct is None or check.high_pct is None:
        known = "too few units for an interval"
    else:
        known = (
            f"between {check.low_pct:+.1f} % and {check.high_pct:+.1f} % "
            f"at {confidence_pct:g} % confidence"
        )
    name, effect = NAMES.get(check.metric, (check.metric, "slow-down"))
    said = f"{name} {check.slower_pct:+.1f} % ({known}), limit {check.limit_pct:g} %"
    if check.drift_pct:
        source = f", from {check.drift_sessions} sessions" if check.drift_sessions else ""
        said += f" and {check.drift_pct:.1f} % allowed between sessions{source}"
    if check.detectable_pct is None:
        return f"{said}; no {effect} could have been seen in this run"
    article = "an" if effect.startswith("i") else "a"
    return f"{said}; {article} {effect} of {check.detectable_pct:.1f} % would have been seen"


def _row(measured: Measurement, comparisons: tuple[Comparison, ...]) -> Row:
    return Row(
        subject=measured.subject,
        figures=_figures(measured),
        checks=tuple(_checked(comparison) for comparison in comparisons),
    )


def _figures(measured: Measurement) -> Figures:
    p50 = measured.p50()
    quantiles = {f"{name}_ms": whole(name, measured.units) for name in QUANTILES}
    return Figures(
        **quantiles,
        p50_low_ms=_finite(p50.low),
        p50_high_ms=_finite(p50.high),
        load_ms=whole("load", measured.units),
        first_ms=whole("first", measured.units),
        samples=sum(len(unit.samples_ms) for unit in measured.units),
        loads=len({unit.load for unit in measured.units}),
        images_per_s=measured.images_per_s,
        concurrency=measured.concurrency,
        peak_bytes=measured.peak_bytes,
    )


def _checked(comparison: Comparison) -> Checked:
    ratio: Interval = comparison.ratio
    bounded = _finite(ratio.high) is not None and ratio.low > 0
    return Checked(
        metric=comparison.limit.metric,
        limit_pct=100 * comparison.limit.tolerated,
        verdict=comparison.verdict,
        slower_pct=100 * (ratio.estimate - 1),
        low_pct=100 * (ratio.low - 1) if bounded else None,
        high_pct=100 * (ratio.high - 1) if bounded else None,
        detectable_pct=_finite(100 * comparison.detectable),
        units=comparison.units,
        drift_pct=100 * comparison.allowance.share,
        drift_sessions=comparison.allowance.sessions,
    )


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None

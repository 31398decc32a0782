"""The history of a device as one page: the median of every engine over time, changes marked."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from hardware.gate.history import Measured, Past, session_allowance
from hardware.gate.sequential_test import Allowance, Verdict
from hardware.gate.session import Subject
from hardware.intervals import Interval, median, median_interval
from hardware.pages import html_page, legible

CHANGE_ERROR = 0.005  # how often a change may be marked where nothing changed
WIDTH, HEIGHT, LEFT, EDGE = 720, 200, 64, 16  # px, of one chart


@dataclass(frozen=True, slots=True)
class Point:
    """One engine in one session."""

    session: str
    started: str
    p50_ms: float
    low_ms: float
    high_ms: float
    reference: str  # what it was timed in turns with
    relative: Interval | None  # times as long as the reference
    verdict: Verdict | None
    change_pct: float | None  # since the point before, where it is more than sessions differ


def page(title: str, sessions: Sequence[Past]) -> str:
    """Return a page of one HTML file, without scripts or links."""
    allowance = session_allowance(sessions, "p50", CHANGE_ERROR)
    source = f"from {allowance.sessions} sessions" if allowance.sessions else "assumed"
    about = (
        "<p>Median latency of each session with the 95 % interval of its units. A change is marked "
        "where two sessions that follow one another were timed in turns with the same reference "
        "(the reference model, or one baseline) and their ratios to it differ by more than their "
        f"intervals and the {100 * allowance.share:.1f} % ({source}) by which sessions differ "
        "although nothing changed: clocks that differ between two days mark nothing.</p>"
    )
    found = [_section(name, points) for name, points in series(sessions, allowance).items()]
    body = "\n".join(found) or "<p>Nothing was measured yet.</p>"
    return html_page(title, f"{about}\n{body}")


def series(sessions: Sequence[Past], allowance: Allowance) -> dict[str, list[Point]]:
    """Return the points of every engine and setting, in the order of the sessions."""
    found: dict[str, list[Point]] = {}
    for past in sessions:
        for subject in past.subjects:
            points = found.setdefault(_name(subject), [])
            point = _point(past, subject)
            if point is not None:
                change = _change_pct(points[-1], point, allowance) if points else None
                points.append(replace(point, change_pct=change))
    return {name: points for name, points in found.items() if points}


def _name(subject: Subject) -> str:
    cache = ", cold caches" if subject.is_cold else ""
    threads = f"{subject.threads} thread{'s' if subject.threads > 1 else ''}"
    return f"{subject.path} ({subject.runtime}, {subject.precision}, {threads}{cache})"


def _point(past: Past, subject: Subject) -> Point | None:
    """Return the session's point, from its units: those exist however it ended."""
    units = [unit for unit in past.units if unit.sha256 == subject.sha256]
    if not units:
        return None
    took_ms = _interval([unit.p50_ms for unit in units])
    return Point(
        session=past.session,
        started=past.outcome.started if past.outcome else "killed",
        p50_ms=took_ms.estimate,
        low_ms=took_ms.low,
        high_ms=took_ms.high,
        reference=past.reference,
        relative=_relative(units),
        verdict=past.outcome.verdict if past.outcome else None,
        change_pct=None,
    )


def _relative(units: Sequence[Measured]) -> Interval | None:
    """Return how many times as long as the reference it took; None where there is none."""
    ratios = [u.p50_ms / u.reference.p50_ms for u in units if u.reference is not None]
    return _interval(ratios) if ratios else None


def _interval(values: Sequence[float]) -> Interval:
    """Return the 95 % interval of the median; of few values, all that they span."""
    found = median_interval(values)
    return Interval(median(values), max(found.low, min(values)), min(found.high, max(values)))


def _change_pct(before: Point, now: Point, allowance: Allowance) -> float | None:
    """Return how much slower than before, percent; None where sessions differ as much.

    Only ratios to one and the same reference are compared.
    """
    then, found = before.relative, now.relative
    if then is None or found is None or before.reference != now.reference:
        return None
    slack = 1 + allowance.share
    if found.low > then.high * slack or found.high * slack < then.low:
        return 100 * (found.estimate / then.estimate - 1)
    return None


def _section(name: str, points: Sequence[Point]) -> str:
    rows = [
        f"<tr><td>{escape(p.started)}</td><td>{p.p50_ms:.3f} ms</td>"
        f"<td>{p.low_ms:.3f} to {p.high_ms:.3f}</td><td>{p.verdict.value if p.verdict else ''}</td>"
        f'<td class="changed">{"" if p.change_pct is None else f"{p.change_pct:+.1f} %"}</td></tr>'
        for p in points
    ]
    return (
        f"<section>\n<h2>{escape(name)}</h2>\n{_chart(points)}\n<table>\n<tr><th>session</th>"
        "<th>median</th><th>interval</th><th>verdict</th><th>change</th></tr>\n"
        + "\n".join(rows)
        + "\n</table>\n</section>"
    )


def _chart(points: Sequence[Point]) -> str:
    """Return an SVG: a line through the medians, bars for the intervals, rings where it changed."""
    low, high = min(p.low_ms for p in points), max(p.high_ms for p in points)
    low, high = low - 0.05 * high, high * 1.05
    step = (WIDTH - LEFT - 2 * EDGE) / max(len(points) - 1, 1)

    def x(index: int) -> float:
        return LEFT + EDGE + index * step

    def y(milliseconds: float) -> float:
        return EDGE + (HEIGHT - 2 * EDGE) * (high - milliseconds) / (high - low)

    marks = [
        f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y(value):.1f}" y2="{y(value):.1f}" '
        f'stroke="var(--rule)"/><text x="{LEFT - 8}" y="{y(value) + 4:.1f}" '
        f'text-anchor="end">{legible(value)} ms</text>'
        for value in (low, (low + high) / 2, high)
    ]
    line = " ".join(f"{x(i):.1f},{y(p.p50_ms):.1f}" for i, p in enumerate(points))
    marks.append(f'<polyline points="{line}" fill="none" stroke="var(--line)"/>')
    for i, p in enumerate(points):
        color = "var(--line)" if p.change_pct is None else "var(--bad)"
        size = 3 if p.change_pct is None else 6
        marks.append(
            f'<line x1="{x(i):.1f}" x2="{x(i):.1f}" y1="{y(p.low_ms):.1f}" y2="{y(p.high_ms):.1f}" '
            f'stroke="{color}"/><circle cx="{x(i):.1f}" cy="{y(p.p50_ms):.1f}" r="{size}" '
            f'fill="{color}"><title>{escape(p.started)}: {p.p50_ms:.3f} ms</title></circle>'
        )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Median latency by session">'
        + "".join(marks)
        + "</svg>"
    )

"""What the staircases of a latency table look like: as an HTML page, and in a terminal."""

from collections.abc import Sequence
from html import escape

from rich.markup import escape as escape_markup
from rich.table import Table

from hardware.latency.staircase import Staircase
from hardware.latency.table import LatencyTable
from hardware.pages import html_page, legible

WIDTH, HEIGHT, LEFT, BOTTOM, EDGE = 720, 240, 64, 28, 16  # px, of one chart
BAR = 40  # characters of the longest bar in a terminal
TICKS = 8  # labels on the horizontal axis, about


def staircase_page(table: LatencyTable, found: Sequence[Staircase]) -> str:
    """Return the page: one chart per kind of layer, in the order given."""
    key = table.key
    title = f"{key.runtime} {key.version} on {key.device}"
    low, middle, high = table.additivity
    return html_page(
        title,
        f"<p>{escape(key.precision)}, batch {key.batch}, threads: {key.threads}; "
        f"{len(table.entries)} latencies from {len(table.variants)} networks. End-to-end time over "
        f"the sum of the layers: {middle:.3f} ({low:.3f} to {high:.3f}). Dots are measured, each "
        "the median over the networks that executed it, with its spread; paler dots have fewer "
        "channels on the other side. Plans reckon with the dots, and between them with the line, "
        "which is drawn at the largest layer's channels on the other side.</p>\n"
        + "\n".join(_section(stairs) for stairs in found),
    )


def _section(stairs: Staircase) -> str:
    beside = "" if stairs.other is None else f", {stairs.other} {_other_side(stairs)}"
    return (
        f"<section>\n<h2>{escape(stairs.label)}{beside}</h2>\n{_chart(stairs)}\n"
        f"<p>µs by {'output' if stairs.axis == 'out' else 'input'} channels; "
        f"{len(stairs.entries)} measured</p>\n</section>"
    )


def _other_side(stairs: Staircase) -> str:
    return "in" if stairs.axis == "out" else "out"


def _chart(stairs: Staircase) -> str:
    """Return an SVG: the fitted line, and a dot with its spread for everything measured."""
    widest = stairs.curve[-1][0]
    highest = max(us for _, us in stairs.curve)
    highest = max(highest, *(e.median_us + e.mad_us for e in stairs.entries)) or 1.0

    def x(width: float) -> float:
        return LEFT + EDGE + (WIDTH - LEFT - 2 * EDGE) * width / widest

    def y(time_us: float) -> float:
        return EDGE + (HEIGHT - EDGE - BOTTOM) * (1 - time_us / highest)

    marks = [
        f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y(us):.1f}" y2="{y(us):.1f}" stroke="var(--rule)"/>'
        f'<text x="{LEFT - 8}" y="{y(us) + 4:.1f}" text-anchor="end">{legible(us)}</text>'
        for us in (0.0, highest / 2, highest)
    ]
    step = max(1, round(widest / TICKS))
    marks += [
        f'<text x="{x(width):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{width}</text>'
        for width in range(step, widest + 1, step)
    ]
    line = " ".join(f"{x(width):.1f},{y(us):.1f}" for width, us in stairs.curve)
    marks.append(f'<polyline points="{line}" fill="none" stroke="var(--line)"/>')
    for entry in stairs.entries:
        place, key = x(stairs.width_of(entry)), entry.key
        share = 1.0 if stairs.other is None else min(stairs.across(entry) / stairs.other, 1.0)
        low, high = entry.median_us - entry.mad_us, entry.median_us + entry.mad_us
        marks.append(
            f'<g opacity="{0.25 + 0.75 * share:.2f}"><line x1="{place:.1f}" x2="{place:.1f}" '
            f'y1="{y(low):.1f}" y2="{y(high):.1f}" stroke="var(--line)"/>'
            f'<circle cx="{place:.1f}" cy="{y(entry.median_us):.1f}" r="2.5" fill="var(--line)">'
            f"<title>{key.in_channels} in, {key.out_channels} out: {entry.median_us:.1f} µs "
            f"± {entry.mad_us:.1f}, {entry.builds} builds</title></circle></g>"
        )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Latency of {escape(stairs.label, quote=True)} by width">'
        + "".join(marks)
        + "</svg>"
    )


def staircase_bars(stairs: Staircase) -> Table:
    """Return one staircase as bars for a terminal: a row per width that was measured."""
    beside = "" if stairs.other is None else f", {stairs.other} {_other_side(stairs)}"
    shown = Table(
        stairs.axis,
        "µs",
        "",
        "",
        title=f"\n{escape_markup(stairs.label)}{beside}",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    longest = max(row.time_us for row in stairs.rows) or 1.0
    for row in stairs.rows:
        bar = "█" * max(1, round(BAR * row.time_us / longest))
        source = "measured" if row.exact else f"estimated from {row.entries} measured"
        shown.add_row(str(row.width), f"{row.time_us:.1f}", bar, source)
    return shown

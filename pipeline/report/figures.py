"""The figures of a report: inline SVG whose text is text and whose colours are the page's.

Every figure is drawn twice, for wide and for narrow screens; the page's style shows one of them.
One unit of the SVG is one pixel of the page, so that letters have the size of the text around.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Placeholders that become CSS variables, so that one drawing serves light and dark.
INK, MUTED, RULE, BEFORE, AFTER, LIMIT = (f"#0a0b0{digit}" for digit in range(1, 7))
_VARIABLES = dict(
    zip(
        (INK, MUTED, RULE, BEFORE, AFTER, LIMIT),
        ("ink", "muted", "rule", "before", "after", "limit"),
        strict=True,
    )
)
WIDE_PX, NARROW_PX = 960, 360
_LETTER_PX = 7.0  # mean advance of a 12 px sans serif letter, on the safe side
_ROW_PX = 19


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """One figure at both sizes; `label` says in words what it shows."""

    wide: str
    narrow: str
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One row of a bar chart: what was before, what is left of it."""

    name: str
    before: float
    after: float
    note: str = ""  # written behind the bar
    measured: bool = True  # an estimate is drawn as an outline


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A measured value and its confidence interval."""

    name: str
    value: float
    low: float
    high: float


def draw(name: str, label: str, paint: Callable[[int], Figure]) -> Drawing:
    """Return the figure that `paint` draws for a width in pixels, at both widths.

    Args:
        name: makes the ids of this figure different from those of its neighbours.
        label: what the figure shows, in words, for a reader who cannot see it.
        paint: width in pixels to figure.
    """
    return Drawing(
        wide=_as_svg(f"{name}-wide", label, paint, WIDE_PX),
        narrow=_as_svg(f"{name}-narrow", label, paint, NARROW_PX),
        label=label,
    )


def latency_spans(before: Span, after: Span, target_ms: float, width_px: int) -> Figure:
    """Return two bars with their confidence intervals, and the target as a line."""
    figure, axes = _axes(width_px, height_px=126, left_px=58, bottom_px=40, top_px=20)
    for row, (span, colour) in enumerate(((before, BEFORE), (after, AFTER))):
        axes.barh(row, _finite(span.value), height=0.62, color=colour, linewidth=0)
        axes.plot((_finite(span.low), _finite(span.high)), (row, row), color=INK, linewidth=2)
    axes.set_yticks((0, 1), labels=(before.name, after.name), fontsize=12, color=INK)
    axes.set_ylim(1.5, -0.5)
    limit = _finite(target_ms)
    axes.set_xlim(0, 1.04 * max(_finite(before.high), _finite(after.high), limit, 1e-9))
    axes.axvline(limit, color=LIMIT, linewidth=1.5)
    right = limit > 0.75 * axes.get_xlim()[1]
    axes.annotate(
        "target",
        (limit, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-4 if right else 4, 5),
        textcoords="offset points",
        ha="right" if right else "left",
        color=LIMIT,
        fontsize=12,
    )
    _rule_x(axes, "milliseconds for one inference", width_px)
    return figure


def paired_bars(bars: Sequence[Bar], unit: str, width_px: int) -> Figure:
    """Return one row per bar, in order: before as a wide pale bar, after as a slim dark one."""
    letters = 16 if width_px < WIDE_PX // 2 else 38
    names = [shortened(bar.name, letters) for bar in bars]
    left_px = 14 + _LETTER_PX * max((len(name) for name in names), default=1)
    height_px = 44 + _ROW_PX * max(len(bars), 1)
    figure, axes = _axes(width_px, height_px, left_px, bottom_px=40, top_px=4)
    longest = max((_length(bar) for bar in bars), default=0.0)
    for row, bar in enumerate(bars):
        _paired_bar(axes, row, bar, inside=_length(bar) > 0.7 * longest)
    axes.set_yticks(range(len(bars)), labels=names, fontsize=12, color=INK)
    axes.set_ylim(max(len(bars), 1) - 0.4, -0.6)
    axes.set_xlim(0, 1.04 * max(longest, 1e-9))
    _rule_x(axes, unit, width_px)
    return figure


def training_curves(
    epochs: Sequence[str],
    accuracy_pct: Sequence[float],
    losses: dict[str, Sequence[float]],
    width_px: int,
) -> Figure:
    """Return validation accuracy and the losses per epoch; the best epoch is marked.

    Args:
        epochs: names of the epochs, in order.
        accuracy_pct: on the validation split, one per epoch.
        losses: at most two series, one value per epoch each.
        width_px: of the figure.
    """
    side_by_side = width_px >= WIDE_PX // 2
    figure = Figure(figsize=(width_px / 72, (230 if side_by_side else 430) / 72), dpi=72)
    shape = (1, 2) if side_by_side else (2, 1)
    upper, lower = figure.subplots(*shape)
    figure.subplots_adjust(left=44 / width_px, right=1 - 8 / width_px, wspace=0.14, hspace=0.42)
    figure.subplots_adjust(bottom=0.19 if side_by_side else 0.1, top=0.9 if side_by_side else 0.95)
    _curve(upper, accuracy_pct, AFTER, "solid")
    best = _best(accuracy_pct)
    if best is not None:
        upper.plot([best], [accuracy_pct[best]], "o", markersize=7, color=AFTER)
    upper.set_title("validation accuracy, %", fontsize=12, color=INK, loc="left")
    for (name, values), style in zip(losses.items(), ("solid", "dashed"), strict=False):
        _curve(lower, values, AFTER if style == "solid" else MUTED, style, name)
    lower.set_title("loss", fontsize=12, color=INK, loc="left")
    lower.legend(loc="upper right", fontsize=12, frameon=False, labelcolor=INK)
    for axes in (upper, lower):
        _bare(axes)
        axes.grid(axis="y", color=RULE, linewidth=1)
        step = max(1, math.ceil(len(epochs) / (10 if side_by_side else 8)))
        places = range(0, len(epochs), step)
        axes.set_xticks(places, labels=[epochs[i] for i in places], fontsize=12, color=MUTED)
        axes.set_xlabel("epoch", fontsize=12, color=MUTED)
    return figure


def _as_svg(name: str, label: str, paint: Callable[[int], Figure], width_px: int) -> str:
    settings: dict[Any, Any] = {  # Any: as matplotlib declares its settings
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": name,  # the same ids in every run
        "text.parse_math": False,  # a layer's name may hold a dollar sign
        "path.simplify": True,
    }
    with mpl.rc_context(settings), warnings.catch_warnings():
        # The page's fonts are the reader's; that matplotlib's lacks a letter does not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        figure = paint(width_px)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
        figure.clear()
    return _inline(buffer.getvalue(), label)


def _inline(svg: str, label: str) -> str:
    """Return an SVG file as an element of a page: no prolog, no stray ids, colours by variable."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]+)"', body)
    assert box is not None, "matplotlib writes a viewBox"
    used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', body))
    body = re.sub(r' id="([\w.-]+)"', lambda m: m[0] if m[1] in used else "", body)
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    for placeholder, variable in _VARIABLES.items():
        body = body.replace(placeholder, f"var(--{variable})")
    words = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return re.sub(
        r"^<svg[^>]*>", f'<svg viewBox="{box[1]}" role="img" aria-label="{words}">', body, count=1
    )


def _axes(
    width_px: int, height_px: float, left_px: float, bottom_px: float, top_px: float
) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width_px / 72, height_px / 72), dpi=72)
    axes = figure.add_axes(
        (
            left_px / width_px,
            bottom_px / height_px,
            1 - (left_px + 14) / width_px,
            1 - (bottom_px + top_px) / height_px,
        )
    )
    _bare(axes)
    return figure, axes


def _bare(axes: Axes) -> None:
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0, pad=5, labelsize=12, labelcolor=MUTED)
    axes.set_axisbelow(True)


def _rule_x(axes: Axes, unit: str, width_px: int) -> None:
    axes.xaxis.set_major_locator(
        MaxNLocator(4 if width_px < WIDE_PX // 2 else 8, steps=(1, 2, 2.5, 5, 10))
    )
    axes.grid(axis="x", color=RULE, linewidth=1)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_xlabel(unit, fontsize=12, color=MUTED)


def _paired_bar(axes: Axes, row: int, bar: Bar, inside: bool) -> None:
    before, after = _finite(bar.before), _finite(bar.after)
    axes.barh(row, before, height=0.74, color=BEFORE, linewidth=0)
    if bar.measured:
        axes.barh(row, after, height=0.36, color=AFTER, linewidth=0)
    else:
        axes.barh(row, after, height=0.36, facecolor="none", edgecolor=AFTER, linewidth=1.5)
    if bar.note:
        axes.annotate(
            bar.note,
            (_length(bar), row),
            xytext=(-6 if inside else 6, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            fontsize=12,
            color=INK,
        )


def _curve(
    axes: Axes, values: Sequence[float], colour: str, style: str, name: str | None = None
) -> None:
    # A value that is not a number leaves a gap in the line; it is never drawn as zero.
    shown = [value if math.isfinite(value) else math.nan for value in values]
    marker = "o" if len(shown) == 1 else None
    axes.plot(
        range(len(shown)),
        shown,
        color=colour,
        linestyle=style,
        linewidth=2,
        label=name,
        marker=marker,
    )


def _best(values: Sequence[float]) -> int | None:
    finite = [(value, -place) for place, value in enumerate(values) if math.isfinite(value)]
    return -max(finite)[1] if finite else None


def _length(bar: Bar) -> float:
    return max(_finite(bar.before), _finite(bar.after))


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def shortened(name: str, letters: int) -> str:
    """Return a name with its middle cut out: the ends of layer names tell them apart."""
    if len(name) <= letters:
        return name
    head = (letters - 1) // 3
    return f"{name[:head]}…{name[-(letters - 1 - head) :]}"

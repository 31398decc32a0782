"""The figures of a diagnosis: maps of values, in the colours of the page."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pipeline import wording
from pipeline.diagnosis.diagnose import Diagnosis, Spread, mean_spearman
from pipeline.redundancy.network import NetworkRedundancy
from pipeline.report import figures as drawing

CELL_PX, LETTER_PX = 21, 7.0
LARGE_SPREAD = 2.0  # of the scores over the null: from here on a cell is drawn full
FULLEST = 0.75  # how opaque a cell gets: numbers stay legible on it
WRITTEN_PX = 34  # cells at least as wide hold their numbers

Cells = Sequence[Sequence[float | None]]


def diagnosis_figures(
    diagnosis: Diagnosis | None, network: NetworkRedundancy | None
) -> dict[str, drawing.Drawing]:
    """Return the figures of what was found, by the names that the page calls them by."""
    figures = {}
    if diagnosis is not None and diagnosis.groups:
        figures["criteria"] = criteria_map(diagnosis)
        figures["applicability"] = applicability_map(diagnosis)
    if network is not None and network.groups:
        figures["similarity"] = similarity_map(network)
    return figures


def criteria_map(diagnosis: Diagnosis) -> drawing.Drawing:
    """Return how alike every two criteria rank: mean Spearman over groups, weighted by width."""
    names = diagnosis.criteria
    cells = [[_alike(diagnosis, one, other) for other in names] for one in names]
    return drawing.draw(
        "criteria",
        f"Spearman correlation of every two of {len(names)} criteria; all numbers are in the JSON",
        lambda width: value_map(names, names, cells, width),
    )


def applicability_map(diagnosis: Diagnosis) -> drawing.Drawing:
    """Return per group and criterion how far scores spread beyond chance; empty: no further."""
    cells = [
        [_strength(group.spreads, name) for name in diagnosis.criteria]
        for group in diagnosis.groups
    ]
    rows = [wording.layer_of(group.group) for group in diagnosis.groups]
    empty = sum(value is None for line in cells for value in line)
    return drawing.draw(
        "applicability",
        f"Groups down, criteria across; {empty} of {len(rows) * len(diagnosis.criteria)} cells are "
        "empty: there the criterion cannot tell filters apart",
        lambda width: value_map(rows, diagnosis.criteria, cells, width, written=False),
    )


def similarity_map(network: NetworkRedundancy) -> drawing.Drawing:
    """Return how alike every two groups respond: linear CKA."""
    names = [wording.layer_of(group) for group in network.groups]
    return drawing.draw(
        "similarity",
        f"Linear CKA of the responses of every two of {len(names)} groups",
        lambda width: value_map(names, names, network.similarity, width, written=False),
    )


def value_map(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Cells,
    width_px: int,
    written: bool = True,
) -> Figure:
    """Return a cell per row and column: the fuller, the nearer its value is to 1 (or to -1).

    Args:
        rows: names, top down.
        columns: names, from the left.
        cells: from -1 to 1; None is drawn as an outline.
        width_px: of the figure.
        written: whether cells that are wide enough hold their numbers.
    """
    letters = 14 if width_px < drawing.WIDE_PX // 2 else 30
    names = [drawing.shortened(name, letters) for name in rows]
    heads = [drawing.shortened(name, letters) for name in columns]
    left = 14 + LETTER_PX * max((len(name) for name in names), default=1)
    top = 14 + LETTER_PX * max((len(name) for name in heads), default=1)
    across = (width_px - left - 8) / max(len(columns), 1)
    height = top + CELL_PX * max(len(rows), 1) + 8
    figure = Figure(figsize=(width_px / 72, height / 72), dpi=72)
    axes = figure.add_axes(
        (left / width_px, 8 / height, 1 - (left + 8) / width_px, 1 - (top + 8) / height)
    )
    for row, line in enumerate(cells):
        for column, value in enumerate(line):
            axes.add_patch(_cell(row, column, value))
            if written and value is not None and across >= WRITTEN_PX:
                text = wording.fixed(value, 2)
                axes.text(
                    column, row, text, ha="center", va="center", fontsize=10, color=drawing.INK
                )
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), labels=names, fontsize=12, color=drawing.INK)
    axes.set_xticks(range(len(heads)), labels=heads, fontsize=12, color=drawing.INK, rotation=90)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, pad=5)
    for side in axes.spines.values():
        side.set_visible(False)
    return figure


def _cell(row: int, column: int, value: float | None) -> Rectangle:
    place = (column - 0.45, row - 0.45)
    if value is None:
        return Rectangle(place, 0.9, 0.9, facecolor="none", edgecolor=drawing.RULE, linewidth=1)
    colour = drawing.AFTER if value >= 0 else drawing.LIMIT
    return Rectangle(
        place, 0.9, 0.9, facecolor=colour, alpha=FULLEST * min(1.0, abs(value)), linewidth=0
    )


def _alike(diagnosis: Diagnosis, one: str, other: str) -> float | None:
    if one == other:
        return 1.0
    found = mean_spearman(diagnosis.groups, one, other)
    return mean_spearman(diagnosis.groups, other, one) if found is None else found


def _strength(spreads: Sequence[Spread], name: str) -> float | None:
    """Return how full a cell is: its spread over that of chance, 1 from `LARGE_SPREAD` on."""
    found = next(spread for spread in spreads if spread.criterion == name)
    if not found.applicable:
        return None
    if not found.null:
        return 1.0
    return min(1.0, found.spread / found.null / LARGE_SPREAD)

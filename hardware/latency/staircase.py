"""The staircases in a latency table: what each kind of layer takes, by its width."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from hardware.latency.fitting import FamilyModel, fit_families
from hardware.latency.layers import Kind, LayerKey
from hardware.latency.table import Entry, LatencyTable

Curve = tuple[tuple[int, float], ...]
"""Widths, ascending, and microseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What a kind of layer takes at one width, with the most channels on the other side."""

    width: int
    time_us: float
    exact: bool  # measured just there; else estimated, from other channels on the other side
    entries: int  # measured at this width, whatever is on the other side


@dataclass(frozen=True, slots=True, kw_only=True)
class Staircase:
    """One kind of layer: what was measured of it, and the line through that."""

    label: str
    axis: str  # "out": the line runs over output channels at the widest input; "in": reverse
    other: int | None  # channels on the other side of the line; None: the same as on its axis
    curve: Curve  # at every width up to the widest, what neighbouring widths tell
    estimates: Curve  # likewise, with what belongs to single widths
    entries: tuple[Entry, ...]

    def width_of(self, entry: Entry) -> int:
        """Return where on the axis an entry lies."""
        return entry.key.out_channels if self.axis == "out" else entry.key.in_channels

    def across(self, entry: Entry) -> int:
        """Return the channels of an entry on the other side."""
        return entry.key.in_channels if self.axis == "out" else entry.key.out_channels

    @property
    def rows(self) -> tuple[Row, ...]:
        """The widths that were measured, ascending."""
        times, rows = dict(self.estimates), []
        for width in sorted({self.width_of(entry) for entry in self.entries}):
            here = [entry for entry in self.entries if self.width_of(entry) == width]
            exact = [e.median_us for e in here if self.other in (None, self.across(e))]
            time_us = median(exact) if exact else times[width]
            rows.append(Row(width=width, time_us=time_us, exact=bool(exact), entries=len(here)))
        return tuple(rows)


def staircases(table: LatencyTable) -> tuple[Staircase, ...]:
    """Return the staircase of every kind of layer, the slowest first.

    The line is the table's own model of the kind, before it is calibrated on end-to-end times, and
    without what belongs to single widths.
    """
    entries: dict[Kind, list[Entry]] = {}
    for entry in table.entries:
        if not entry.key.thinned:
            entries.setdefault(entry.key.kind, []).append(entry)
    models = fit_families(entries) if entries else {}
    found = [_staircase(kind_entries, models[kind]) for kind, kind_entries in entries.items()]
    return tuple(sorted(found, key=lambda stairs: -max(us for _, us in stairs.curve)))


def _staircase(entries: Sequence[Entry], model: FamilyModel) -> Staircase:
    keys = [entry.key for entry in entries]
    axis = "out" if len({key.out_channels for key in keys}) > 1 else "in"
    coupled = all(key.in_channels == key.out_channels for key in keys)
    widest_in = max(key.in_channels for key in keys)
    widest_out = max(key.out_channels for key in keys)
    example = max(keys, key=lambda key: (key.out_channels, key.in_channels))
    line = []
    for width in range(1, (widest_out if axis == "out" else widest_in) + 1):
        at_out = (width if coupled else widest_in, width)
        line.append(example.at(*(at_out if axis == "out" else (width, widest_out))))
    other = widest_in if axis == "out" else widest_out
    return Staircase(
        label=label_of(example),
        axis=axis,
        other=None if coupled else other,
        curve=_curve(line, _along(model, axis, coupled)),
        estimates=_curve(line, model),
        entries=tuple(entries),
    )


def _along(model: FamilyModel, axis: str, is_coupled: bool) -> FamilyModel:
    """Return the model without what belongs to single widths on the axis.

    That was measured at these alone. In a line they would stand out as spikes: 97 to 111 filters
    are padded to 112 and take what those do, but nothing was measured that says so.
    """
    inputs, outputs = model.likeness.widths
    across = (inputs, 0.0) if axis == "out" else (0.0, outputs)
    widths = (0.0, 0.0) if is_coupled else across
    return replace(model, likeness=replace(model.likeness, widths=widths))


def _curve(line: Sequence[LayerKey], model: FamilyModel) -> Curve:
    return tuple((n, float(us)) for n, us in enumerate(model.predict(line), start=1))


def label_of(key: LayerKey) -> str:
    """Return a kind of layer in words: operator, kernel, stride, groups and size."""
    parts = [" + ".join((key.operator, *key.tail))]
    if key.kernel:
        parts.append("x".join(map(str, key.kernel)))
    if set(key.strides) - {1}:
        parts.append(f"stride {max(key.strides)}")
    if key.is_depthwise:
        parts.append("depthwise")
    elif key.conv_groups > 1:
        parts.append(f"{key.conv_groups} groups")
    if key.in_size:
        parts.append(f"at {'x'.join(map(str, key.in_size))} px")
    return ", ".join(parts)

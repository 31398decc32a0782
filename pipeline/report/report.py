"""The report of a run: one HTML page that says what was done to a network, and why."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hardware.device import Device
from hardware.graph.channel_map import ChannelMap
from hardware.records import write_whole
from pipeline import wording
from pipeline.channels import counts as counting
from pipeline.records import Choice, EpochRecord, Floor, Plan, Verdict
from pipeline.report import figures as drawing

# What the reasons of a plan mean, for a reader who sees them for the first time.
MEANINGS = {
    "saliency": "the exact solver weighed what these channels are worth against the time they take",
    "redundancy floor": "fewer filters would not cover the rest; nothing is pruned below the floor",
    "no measured gain below": "fewer channels would save no measured time, so they stay",
    "full: worth its time": "what fewer channels would save is not worth what they would cost",
    "least candidate": "no narrower width was considered",
    "emptied": "the whole residual branch is gone, only the shortcut is left",
    "frozen": "the channels may not be pruned",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRow:
    """One layer before and after; per-layer latency comes from the latency table."""

    layer: str
    operator: str
    in_before: int
    in_after: int
    out_before: int
    out_after: int
    macs_before: int
    macs_after: int
    before_us: float
    after_us: float  # of an emptied layer: what still runs in its place, mostly nothing
    measured: bool  # both latencies were measured, neither was estimated

    @property
    def is_emptied(self) -> bool:
        """The layer went with its residual branch."""
        return self.out_after == 0 < self.out_before


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that the report of one run shows."""

    title: str
    device: Device
    conditions: Mapping[str, str]
    channels: ChannelMap
    floors: tuple[Floor, ...]
    plan: Plan
    layers: tuple[LayerRow, ...]
    loop: tuple[tuple[float, float, float], ...]  # predicted, measured, target of every turn, ms
    epochs: tuple[EpochRecord, ...]
    verdict: Verdict
    recipe_yaml: str
    versions: Mapping[str, str]
    command: str
    sparse_epochs: tuple[EpochRecord, ...] = ()  # of the training before surgery
    sparsified: str = "none"  # its method
    rounds: int = 1  # of planning, pruning and fine-tuning


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRow:
    """One pruning group as the page shows it."""

    choice: Choice
    layers: tuple[str, ...]  # coupled layers that produce its channels
    floor_detail: str

    @property
    def frozen(self) -> bool:
        """The group may not be pruned, so that its floor says nothing."""
        return self.reason == "frozen"

    @property
    def reason(self) -> str:
        """The reason in a few words."""
        return _short(self.choice.reason)

    @property
    def detail(self) -> str:
        """What the plan says beyond the reason."""
        rest = self.choice.reason.removeprefix(self.reason).lstrip(": ")
        return " ".join(filter(None, (rest, self.choice.detail)))


def write_report(report: Report, path: Path) -> None:
    """Write the report of one run as one HTML page that needs no network and no script.

    Raises:
        StorageError: the page cannot be written.
    """
    write_page(
        path,
        "report.html.j2",
        report=report,
        verdict=report.verdict,
        plan=report.plan,
        limits=[wording.limit(line) for line in report.verdict.reasons],
        accuracy_error_points=_standard_error(report.verdict),
        groups=_group_rows(report),
        reasons=_reasons(report.plan.choices),
        emptied=counting.emptied_branches(report.channels, report.plan),
        narrowed=sum(choice.width < choice.full for choice in report.plan.choices),
        filters=counting.filters_removed(report.channels, report.plan),
        frozen=counting.frozen_rows(report.channels),
        mixing=[group for group in report.channels.prunable if group.mixes],
        totals=_totals(report.layers),
        epochs=_named(report.epochs),
        sparse_epochs=_named(report.sparse_epochs),
        slowest=sorted(report.layers, key=lambda row: -row.after_us)[:3],
        figures=_figures(report),
    )


def _group_rows(report: Report) -> list[GroupRow]:
    groups = {group.name: group for group in report.channels.groups}
    details = {floor.group: floor.detail for floor in report.floors}
    return [
        GroupRow(
            choice=choice,
            layers=counting.coupled_layers(groups[choice.group]) if choice.group in groups else (),
            floor_detail=details.get(choice.group, ""),
        )
        for choice in report.plan.choices
    ]


def _reasons(choices: Iterable[Choice]) -> list[tuple[str, int, str]]:
    counts = Counter(_short(choice.reason) for choice in choices)
    return [(reason, count, MEANINGS.get(reason, "")) for reason, count in counts.most_common()]


def _short(reason: str) -> str:
    return "frozen" if reason.startswith("frozen") else reason


def _totals(layers: Sequence[LayerRow]) -> dict[str, float]:
    fields = ("macs_before", "macs_after", "before_us", "after_us")
    return {field: sum(getattr(row, field) for row in layers) for field in fields}


def _standard_error(verdict: Verdict) -> float:
    """Return the standard error of the delivered accuracy, percentage points."""
    share = verdict.accuracy_pct / 100
    return 100 * sqrt(max(share * (1 - share), 0.0) / max(verdict.test_images, 1))


def _figures(report: Report) -> dict[str, drawing.Drawing]:
    figures = {
        "latency": _latency_figure(report.verdict),
        "layers": _layers_figure(report.layers),
    }
    if report.epochs:
        figures["training"] = _training_figure("training", report.epochs)
    if report.sparse_epochs:
        figures["sparsifying"] = _training_figure("sparsifying", report.sparse_epochs)
    return figures


def _latency_figure(verdict: Verdict) -> drawing.Drawing:
    low, high = verdict.baseline_interval_ms
    before = drawing.Span(name="before", value=verdict.baseline_ms, low=low, high=high)
    low, high = verdict.measured_interval_ms
    after = drawing.Span(name="after", value=verdict.measured_ms, low=low, high=high)
    both = wording.ms_pair((verdict.baseline_ms, verdict.measured_ms), "before, after")
    return drawing.draw(
        "latency",
        f"Latency: {both}; target {wording.ms(verdict.target_ms)}",
        lambda width: drawing.latency_spans(before, after, verdict.target_ms, width),
    )


def _layers_figure(layers: Sequence[LayerRow]) -> drawing.Drawing:
    bars = [
        drawing.Bar(
            name=row.layer,
            before=row.before_us,
            after=row.after_us,
            note="emptied" if row.is_emptied else "",
            measured=row.measured,
        )
        for row in layers
    ]
    return drawing.draw(
        "layers",
        f"Latency of {len(bars)} layers in graph order, before and after; the numbers are in the "
        "table of layers",
        lambda width: drawing.paired_bars(bars, "microseconds", width),
    )


def _named(epochs: Sequence[EpochRecord]) -> list[tuple[str, EpochRecord]]:
    """Return every epoch with its name: its number, behind that of its round if there are several.

    Epochs count from 1 in every round, so a new one begins where the count does not go on.
    """
    rounds: list[int] = []
    for place, epoch in enumerate(epochs):
        begins = place == 0 or epoch.epoch <= epochs[place - 1].epoch
        rounds.append((rounds[-1] if rounds else 0) + begins)
    several = bool(rounds) and rounds[-1] > 1
    return [
        (f"{number}.{epoch.epoch}" if several else str(epoch.epoch), epoch)
        for number, epoch in zip(rounds, epochs, strict=True)
    ]


def _training_figure(name: str, epochs: Sequence[EpochRecord]) -> drawing.Drawing:
    losses: dict[str, Sequence[float]] = {
        "validation": [epoch.val_loss for epoch in epochs],
        "training": [epoch.train_loss for epoch in epochs],
    }
    accuracy = [epoch.val_accuracy_pct for epoch in epochs]
    return drawing.draw(
        name,
        f"Validation accuracy over {len(epochs)} epochs, from {wording.pct(accuracy[0])} to "
        f"{wording.pct(accuracy[-1])}, with the losses",
        lambda width: drawing.training_curves(
            [label for label, _ in _named(epochs)], accuracy, losses, width
        ),
    )


def write_page(path: Path, template: str, **values: object) -> None:
    """Fill a template of `report/templates` and write the page, whole or not at all.

    Raises:
        StorageError: the page cannot be written.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(wording.FILTERS)
    write_whole(path, environment.get_template(template).render(values))

"""The terminal's tables of a diagnosis: criteria, groups, and what was found in words."""

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline import wording
from pipeline.diagnosis.diagnose import Agreement, Diagnosis, GroupDiagnosis, mean_spearman
from pipeline.redundancy.network import NetworkRedundancy

REFERENCE = "l2"  # what every criterion is compared with in the table; JSON has all pairs


def diagnosis_tables(
    diagnosis: Diagnosis, network: NetworkRedundancy | None = None
) -> RenderableType:
    """Return one table of criteria, one of groups, and the verdicts."""
    verdicts = [Text(text) for text in (*diagnosis.verdicts, *_network_lines(network))]
    return Group(_criteria(diagnosis), "", _groups(diagnosis), "", *verdicts)


def _network_lines(network: NetworkRedundancy | None) -> list[str]:
    """Return what is known about the network as a whole, one sentence each."""
    if network is None:
        return []
    if not network.compression:
        return [network.note]
    shares = "; ".join(
        f"{wording.share(one.share)} by {one.count} ({wording.share(one.low)} to "
        f"{wording.share(one.high)})"
        for one in network.compression
    )
    found = [f"Maximum compression before effective filters are lost, of all filters: {shares}."]
    names = network.groups
    pairs = [
        (network.similarity[place][place + 1], names[place], names[place + 1])
        for place in range(len(names) - 1)
    ]
    if pairs:
        value, one, other = max(pairs)
        found.append(
            f"Of neighbouring groups {wording.layer_of(one)} and {wording.layer_of(other)} respond "
            f"most alike (linear CKA {_value(value)})."
        )
    return found


def _criteria(diagnosis: Diagnosis) -> Table:
    table = _table(f"{len(diagnosis.criteria)} criteria on {diagnosis.images:,} images")
    table.add_column("criterion")
    for heading in (
        f"Spearman with {REFERENCE}",
        "over the network",
        "Kendall",
        "not applicable in",
    ):
        table.add_column(heading, justify="right")
    table.add_column("ranks most like", overflow="fold")
    for name in diagnosis.criteria:
        pair = _pair(diagnosis, name)
        spearman, kendall = (pair.spearman, pair.kendall) if pair else (None, None)
        inapplicable = sum(
            not spread.applicable
            for group in diagnosis.groups
            for spread in group.spreads
            if spread.criterion == name
        )
        table.add_row(
            name,
            _value(_similarity(diagnosis.groups, name, REFERENCE)),
            _value(spearman),
            _value(kendall),
            f"{inapplicable} of {len(diagnosis.groups)} groups",
            _nearest(diagnosis, name),
        )
    return table


def _groups(diagnosis: Diagnosis) -> Table:
    table = _table("Groups: spread of scores beside that of Gaussian filters, and the weights")
    table.add_column("group", overflow="fold", ratio=2)
    for heading in ("width", f"{REFERENCE} spread", "Gaussian"):
        table.add_column(heading, justify="right")
    table.add_column("", overflow="fold", ratio=5)
    for group in diagnosis.groups:
        spread = next((s for s in group.spreads if s.criterion == REFERENCE), None)
        table.add_row(
            wording.layer_of(group.group),
            str(group.width),
            _value(spread.spread if spread else None),
            _value(spread.null if spread else None),
            Text(group.verdict),
        )
    return table


def _pair(diagnosis: Diagnosis, name: str) -> Agreement | None:
    return next((p for p in diagnosis.network if {p.first, p.second} == {name, REFERENCE}), None)


def _similarity(groups: tuple[GroupDiagnosis, ...], one: str, other: str) -> float | None:
    found = mean_spearman(groups, one, other)
    return mean_spearman(groups, other, one) if found is None else found


def _nearest(diagnosis: Diagnosis, name: str) -> str:
    """Return the criterion whose rankings are most like those of `name`, with how much."""
    others = {
        other: value
        for other in diagnosis.criteria
        if other != name and (value := _similarity(diagnosis.groups, name, other)) is not None
    }
    if not others:
        return ""
    best = max(others, key=lambda other: others[other])
    return f"{best} ({_value(others[best])})"


def _value(value: float | None) -> str:
    return "–" if value is None else wording.fixed(value, 3)


def _table(title: str) -> Table:
    return Table(title=title, box=box.SIMPLE, title_justify="left", title_style="bold")

"""What the terminal shows: rich tables of records. Prints nothing."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hardware.graph.channel_map import ChannelMap
from hardware.latency.table import LatencyTable
from hardware.latency.trust import Trust
from pipeline import wording
from pipeline.records import Floor, Plan, Verdict


def verdict_table(verdict: Verdict) -> RenderableType:
    """Return before, after and limit of everything that a verdict promises."""
    outcome = (
        Text("passed", style="bold green") if verdict.passed else Text("missed", style="bold red")
    )
    setting = _setting(verdict.precision, verdict.batch, verdict.threads)
    table = _table(Text.assemble("Verdict: ", outcome))
    table.caption = Text(f"{wording.runtime_name(verdict.runtime)}, {setting}")
    table.add_column("")
    for heading in ("before", "after"):
        table.add_column(heading, justify="right")
    table.add_column("")
    low, high = verdict.speedup_interval
    drop = verdict.accuracy_pct - verdict.baseline_accuracy_pct
    rows = (
        (
            "latency",
            wording.ms(verdict.baseline_ms),
            wording.ms(verdict.measured_ms),
            f"target {wording.ms(verdict.target_ms)}, predicted {wording.ms(verdict.predicted_ms)}",
        ),
        (
            "speed-up",
            "",
            wording.times(verdict.speedup),
            f"{wording.times(low)} to {wording.times(high)}",
        ),
        (
            "accuracy",
            wording.pct(verdict.baseline_accuracy_pct),
            wording.pct(verdict.accuracy_pct),
            f"{wording.signed(drop)} points on {verdict.test_images:,} test images",
        ),
        ("multiply-adds", *map(wording.many, verdict.macs), wording.change(verdict.macs)),
        ("parameters", *map(wording.many, verdict.parameters), wording.change(verdict.parameters)),
        ("parity", "", wording.tiny(verdict.parity), "engine against torch"),
        ("proof", "", wording.tiny(verdict.proof_error), "removed against masked"),
    )
    for row in rows:
        table.add_row(*row)
    if verdict.form is not None:
        table.add_row("form", "", verdict.form.taken, Text(verdict.form.reason))
    table.add_section()
    for holds, text in map(wording.limit, verdict.reasons):
        mark = {
            True: Text("held", style="green"),
            False: Text("missed", style="red"),
            None: Text(""),
        }
        table.add_row("limit", "", mark[holds], Text(text))
    return Group(table, "", _files([verdict]))


def comparison_table(verdicts: Sequence[Verdict]) -> RenderableType:
    """Return one row per verdict, the same network on several runtimes, and where the files are."""
    table = _table("Before and after, as measured on this machine")
    for heading in ("runtime", "verdict"):
        table.add_column(heading)
    for heading in ("before, ms", "after, ms", "speed-up", "accuracy, %"):
        table.add_column(heading, justify="right", no_wrap=True)
    for verdict in verdicts:
        before, _, after = wording.ms_pair((verdict.baseline_ms, verdict.measured_ms), "→").split()[
            :3
        ]
        table.add_row(
            Text(wording.runtime_name(verdict.runtime)),
            Text("passed", style="green") if verdict.passed else Text("missed", style="red"),
            before,
            after,
            wording.times(verdict.speedup),
            " → ".join(
                wording.fixed(value, 2)
                for value in (verdict.baseline_accuracy_pct, verdict.accuracy_pct)
            ),
        )
    return Group(table, "", _files(verdicts))


def plan_table(plan: Plan, floors: Sequence[Floor] = ()) -> Table:
    """Return the width of every group with the reason for it.

    Args:
        plan: what to show.
        floors: their details are shown where the plan gives none.
    """
    details = {floor.group: floor.detail for floor in floors}
    table = _table(
        f"Plan: {wording.ms_pair((plan.baseline_ms, plan.predicted_ms), '→')} predicted, "
        f"target {wording.ms(plan.target_ms)}"
    )
    table.caption = Text(
        f"objective {plan.objective}, gap {wording.number(100 * plan.gap)} %, solved in "
        f"{wording.duration(plan.solver_s)}, "
        f"{'every latency measured' if plan.measured else 'some latencies ESTIMATED'}"
    )
    table.add_column("group", overflow="fold", ratio=3)
    for heading in ("width", "floor"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("reason", overflow="fold", ratio=5)
    for choice in plan.choices:
        detail = choice.detail or details.get(choice.group, "")
        frozen = choice.reason.startswith("frozen")
        cells = [
            wording.layer_of(choice.group),
            _widths(choice.full, choice.width),
            "" if frozen else str(choice.floor),
        ]
        reason = Text.assemble(choice.reason, (f": {detail}" if detail else "", "dim"))
        table.add_row(*map(Text, cells), reason, style="dim" if frozen else None)
    return table


def groups_table(channels: ChannelMap, floors: Sequence[Floor] | None = None) -> Table:
    """Return every pruning group with its coupled layers, its floor, and whether it is frozen."""
    known = {floor.group: floor for floor in floors or ()}
    groups, prunable = channels.groups, channels.prunable
    table = _table(f"{len(groups)} pruning groups, {len(prunable)} may be pruned")
    table.add_column("group", overflow="fold", ratio=3)
    table.add_column("width", justify="right")
    if floors is not None:
        for heading in ("floor", "redundancy", "random"):
            table.add_column(heading, justify="right")
    table.add_column("produced by", justify="right")
    table.add_column("read by", justify="right")
    table.add_column("", overflow="fold", ratio=4)
    for group in groups:
        cells = [wording.layer_of(group.name), str(group.width)]
        if floors is not None:
            cells += _redundancy(known.get(group.name))
        cells += [_layers(len(group.producers)), _layers(len(group.consumers))]
        note = f"frozen: {group.frozen}" if group.frozen else ""
        if group.mixes:
            note = " ".join(filter(None, (note, f"{group.mixes} mixes its channels")))
        elif not note and group.name in known:
            note = known[group.name].detail
        table.add_row(*map(Text, (*cells, note)), style="dim" if group.frozen else None)
    return table


def _redundancy(floor: Floor | None) -> list[str]:
    """Return a group's floor, its score, and the score of random filters of the same shape."""
    if floor is None:
        return ["", "", ""]
    null = "" if floor.null is None else wording.fixed(floor.null, 2)
    return [str(floor.floor), wording.fixed(floor.score, 2), null]


def frozen_table(channels: ChannelMap) -> Table:
    """Return the channels that may not be pruned, one row per reason and place."""
    table = _table("Frozen channels")
    if channels.unknown_operators:
        names = ", ".join(
            f"{name} ({count}×)" for name, count in channels.unknown_operators.items()
        )
        table.caption = Text(f"operators without a rule: {names}")
    table.add_column("where", overflow="fold", ratio=2)
    table.add_column("channels", justify="right")
    table.add_column("reason", overflow="fold", ratio=3)
    for group in channels.groups:
        if group.frozen is not None:
            table.add_row(
                *map(Text, (wording.layer_of(group.name), str(group.width), group.frozen))
            )
    for axis in channels.frozen:
        table.add_row(
            *map(Text, (wording.layer_of(axis.parameter), str(axis.channels), axis.reason))
        )
    return table


def latency_table(path: Path, table: LatencyTable, trust: Trust, rows: int = 20) -> RenderableType:
    """Return what a latency table holds: the slowest layers that were executed, and its audit.

    Args:
        path: where the table lies.
        table: what was measured.
        trust: how far the last networks were off their predictions.
        rows: how many layers at most.
    """
    key = table.key
    shown = _table(f"{wording.runtime_name(key.runtime)} {key.version} on {key.device}")
    for heading in ("layer", "kernel", "size"):
        shown.add_column(heading)
    for heading in ("in", "out", "median, µs", "spread, µs", "builds"):
        shown.add_column(heading, justify="right")
    for entry in sorted(table.entries, key=lambda entry: -entry.median_us)[:rows]:
        layer = entry.key
        cells = (
            " + ".join((layer.operator, *layer.tail)),
            "×".join(map(str, layer.kernel)),
            "×".join(map(str, layer.in_size)),
            str(layer.in_channels),
            str(layer.out_channels),
            wording.us(entry.median_us),
            wording.us(entry.mad_us),
            str(entry.builds),
        )
        shown.add_row(*map(Text, cells))
    if (more := len(table.entries) - rows) > 0:
        shown.caption = Text(f"and {more:,} faster layers")
    lines = (*_audit(table), Text(str(trust)))
    return Group(shown, "", *lines, Text(str(path), overflow="fold"))


def _audit(table: LatencyTable) -> Iterator[Text]:
    """Yield what was measured, and how well the layers' times add up to those of networks."""
    key = table.key
    setting = _setting(key.precision, key.batch, key.threads)
    counts = f"{len(table.entries):,} layers from {len(table.variants):,} variants"
    yield Text(f"{counts}, {setting}")
    if table.variants:
        low, middle, high = table.additivity
        audit = f"{wording.fixed(middle, 3)} ({wording.fixed(low, 3)} to {wording.fixed(high, 3)})"
        yield Text(f"end-to-end time over the sum of the layers: {audit}")


def _table(title: str | Text) -> Table:
    return Table(
        title=Text(title, style="bold") if isinstance(title, str) else title,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        pad_edge=False,
        show_edge=False,
    )


def _widths(full: int, width: int) -> str:
    return str(full) if width == full else f"{full} → {width}"


def _layers(count: int) -> str:
    return f"{count} layer{'s' if count != 1 else ''}"


def _files(verdicts: Sequence[Verdict]) -> Table:
    """Return where engines and reports are, a line each: a path is never squeezed into a column."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for verdict in verdicts:
        name = wording.runtime_name(verdict.runtime)
        grid.add_row(Text(f"{name} engine"), Text(verdict.engine))
        grid.add_row(Text(f"{name} report"), Text(verdict.report))
    return grid


def _setting(precision: str, batch: int, threads: int) -> str:
    return f"{precision}, batch {batch}, {threads} thread{'s' if threads != 1 else ''}"

"""`espalier profile show`, `diff`, `merge`, `prune`: what lies in latency tables; no torch."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from hardware.commands.console import out, reported
from hardware.latency.staircase import staircases

Context = Any  # click's, which newer versions of typer take from a copy of their own


class RecipeFirst(TyperGroup):
    """A group whose first word may also be a recipe: `profile RECIPE` is `profile run RECIPE`."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        """Insert the command that was left out."""
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


tables = typer.Typer(
    cls=RecipeFirst,
    no_args_is_help=True,
    help="Measure a recipe's network into a latency table (`espalier profile RECIPE`; its options: "
    "`espalier profile run --help`), and look at tables.",
)
TablePath = Annotated[Path, typer.Argument(help="A table: profiles/DEVICE/SETTING.json")]


@tables.command()
def show(
    table: TablePath,
    rows: Annotated[int, typer.Option(min=1, help="Kinds of layers, the slowest first")] = 8,
    html: Annotated[Path | None, typer.Option(help="Write all of them as an HTML page")] = None,
) -> None:
    """Draw the staircases in a table: what plans reckon with for each kind of layer, by its width.

    Example: `espalier profile show profiles/DEVICE/ov-fp32-b1-t1.json --html stairs.html`

    Also says how far the table can be trusted: how far off the last networks were that it predicted
    before it measured them.

    Exit codes: **0** shown, **2** bad input, **130** interrupted.
    """
    with reported("Interrupted."):
        from hardware.latency.page import staircase_bars, staircase_page
        from hardware.latency.table import load_table
        from hardware.latency.trust import trust_of
        from hardware.records import write_whole

        loaded = load_table(table)
        found = staircases(loaded)
        key = loaded.key
        low, middle, high = loaded.additivity
        out.print(
            f"{key.runtime} {key.version} on {key.device} ({key.fingerprint}), {key.precision}, "
            f"batch {key.batch}, threads: {key.threads}\n{len(loaded.entries)} latencies from "
            f"{len(loaded.variants)} networks; end-to-end time over the sum of the layers: "
            f"{middle:.3f} ({low:.3f} to {high:.3f})",
            markup=False,
            highlight=False,
        )
        for stairs in found[:rows]:
            out.print(staircase_bars(stairs))
        if (more := len(found) - rows) > 0:
            out.print(f"and {more} faster kinds of layers (--rows, --html)")
        out.print(f"{trust_of(loaded)}", markup=False, highlight=False)
        if html is not None:
            write_whole(html, staircase_page(loaded, found))
            out.print(f"{html}", markup=False)


@tables.command()
def diff(
    before: TablePath,
    after: TablePath,
    rows: Annotated[int, typer.Option(min=1, help="Layers, the largest changes first")] = 20,
) -> None:
    """Show which layers got slower or faster, for example with another version of the runtime.

    Example: `espalier profile diff before.json after.json`

    Both tables must be of one device, runtime and setting.

    Exit codes: **0** shown, **2** bad input, **130** interrupted.
    """
    with reported("Interrupted."):
        from hardware.latency.compare import changes
        from hardware.latency.table import load_table

        first, second = load_table(before), load_table(after)
        found = changes(first, second)
        shown = Table("layer", "in", "out", "before, µs", "after, µs", "change", "")
        for change in found.changed[:rows]:
            mark = "" if change.is_clear else "within their spread"
            shown.add_row(
                escape(change.label),
                str(change.key.in_channels),
                str(change.key.out_channels),
                f"{change.before_us:.1f}",
                f"{change.after_us:.1f}",
                f"{100 * (change.ratio - 1):+.1f} %",
                mark,
            )
        out.print(shown)
        for ratio, name in found.networks:
            out.print(f"full network {name}: {100 * (ratio - 1):+.1f} %", markup=False)
        versions = f"{first.key.runtime} {first.key.version} to {second.key.version}"
        out.print(
            f"{versions}: {len(found.changed)} layers in both, {found.only_before} only before, "
            f"{found.only_after} only after.",
            markup=False,
            highlight=False,
        )


@tables.command("merge")
def merge_tables(
    first: TablePath,
    second: TablePath,
    output: Annotated[Path, typer.Option("--output", "-o", help="The table of both")],
) -> None:
    """Put two tables of one device, runtime, version and setting into one.

    Example: `espalier profile merge first.json second.json --output both.json`

    Exit codes: **0** merged, **2** bad input, **130** interrupted.
    """
    with reported("Interrupted."):
        from hardware.latency.table import load_table, merge
        from hardware.lock import file_lock

        with file_lock(output, f"merging {first} and {second} into it"):
            merged = merge(load_table(first), load_table(second))
            merged.save(output)
        out.print(
            f"{output}: {len(merged.entries)} latencies from {len(merged.variants)} networks",
            markup=False,
            highlight=False,
        )


@tables.command()
def prune(
    table: TablePath,
    keep_version: Annotated[
        list[str] | None,
        typer.Option(help="Keep the table of this version of the runtime too; may be repeated"),
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete; else only list")] = False,
) -> None:
    """List, or delete, what older versions of the runtime left beside a table.

    Example: `espalier profile prune profiles/DEVICE/ov-fp32-b1-t1.json --delete`

    A table whose runtime was updated is set aside under its version and never read again.

    Exit codes: **0** listed or deleted, **2** bad input, **130** interrupted.
    """
    with reported("Interrupted."):
        from hardware.latency.compare import remove, stale

        found = stale(table, tuple(keep_version or ()))
        for path, version in found:
            out.print(f"{'deleted' if delete else 'stale'}: {path} ({version})", markup=False)
        if delete:
            remove(path for path, _ in found)
        elif found:
            out.print("Nothing was deleted; add --delete to do so.")
        else:
            out.print("Nothing is stale.")

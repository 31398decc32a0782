"""What a device runs, without torch: its commands. Only this file and those of `commands` print."""

import typer
from rich.console import Console
from rich.table import Table

from hardware.commands.bench import add_bench
from hardware.device import conditions, this_device
from hardware.errors import RuntimeMissingError
from hardware.runtimes import RUNTIMES, get_runtime

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")
add_bench(app)
out = Console()


@app.command()
def devices() -> None:
    """Show this machine and the runtimes that can build and time engines on it; needs no torch.

    Example: `espalier devices`

    Exit codes: **0** shown, **130** interrupted.
    """
    device = this_device()
    facts = Table(
        title=f"{device.name} ({device.fingerprint[:12]})", show_header=False, title_justify="left"
    )
    facts.add_row("processor", device.processor)
    facts.add_row("cores", str(device.cores))
    facts.add_row("memory", f"{device.memory_bytes / 2**30:.1f} GiB")
    facts.add_row("features", " ".join(device.features) or "none known")
    for name, value in conditions().items():
        facts.add_row(name, value)
    out.print(facts)
    table = Table("runtime", "version", "runs on", "can be used")
    for name in sorted(RUNTIMES):
        try:
            runtime = get_runtime(name)
        except RuntimeMissingError as error:
            table.add_row(name, "", "", f"no: {error}")
        else:
            can = f"yes: {', '.join(runtime.precisions())}"
            can += "" if runtime.tells_node_times else "; no latency tables"
            table.add_row(name, runtime.version(), runtime.device(), can)
    out.print(table)

"""`espalier devices`: this machine, and the runtimes that can be used on it."""

from rich.table import Table

from hardware.commands.console import out
from hardware.device import conditions, this_device
from hardware.errors import RuntimeMissingError
from hardware.runtimes import RUNTIMES, get_runtime


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

"""`espalier measure`: a bundle from the host into a table, with one runtime and without torch."""

from pathlib import Path
from typing import Annotated

import typer

from hardware.commands.console import bar, err, out, reported


def measure(
    bundle: Annotated[Path, typer.Argument(help="What `espalier profile RECIPE --bundle` wrote")],
    runtime: Annotated[str, typer.Option(help="ov, ort, trt: see `espalier devices`")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The table")] = Path("table.json"),
    builds: Annotated[
        int | None, typer.Option(min=1, help="Networks to build [default: as time allows]")
    ] = None,
    minutes: Annotated[
        float, typer.Option(min=0.1, help="How long to measure; the more, the better it predicts")
    ] = 0.5,
) -> None:
    """Measure a bundle's network on this device into a latency table; needs no torch.

    Example: `espalier measure bundle.zip --runtime ov --output table.json`

    Needs the base install and one runtime. Every measurement is saved at once: after a kill the
    same command continues.

    Exit codes: **0** the table is written, **2** bad input or this machine measures something else,
    **130** interrupted.
    """
    with reported(f"Interrupted. What was measured is in {output}; the same command continues."):
        from hardware.bundle import read_bundle
        from hardware.latency.trust import trust_of
        from hardware.remote import measure_bundle
        from hardware.runtimes import get_runtime

        chosen = get_runtime(runtime)
        read = read_bundle(bundle)
        err.print(
            f"{read.manifest.network} on {chosen.device()}, {runtime} {chosen.version()}",
            markup=False,
        )
        with bar("measuring") as progress:
            table = measure_bundle(
                read, chosen, output, builds=builds, minutes=minutes, progress=progress
            )
    low, middle, high = table.additivity
    out.print(
        f"{output}: {len(table.entries)} latencies from {len(table.variants)} networks, for bundle "
        f"{read.manifest.digest[:12]}. End-to-end time over the sum of the layers: {middle:.3f} "
        f"({low:.3f} to {high:.3f}).\n{trust_of(table)}\n"
        f"On the host: espalier profile RECIPE --import {output.name}",
        markup=False,
        highlight=False,
    )

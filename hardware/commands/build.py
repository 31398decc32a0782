"""`espalier build`: an ONNX file into an engine, also for a chip that is not here."""

from pathlib import Path
from typing import Annotated

import typer

from hardware.commands.console import out, reported


def build(
    model: Annotated[Path, typer.Argument(help="ONNX file with fixed sizes")],
    runtime: Annotated[str, typer.Option(help="ov, ort, trt: see `espalier devices`")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the engine")],
    precision: Annotated[str, typer.Option(help="fp32, bf16, fp16, tf32")] = "fp32",
    threads: Annotated[int, typer.Option(min=1, help="That it will run on")] = 1,
    capability: Annotated[
        str | None,
        typer.Option(help="Compute capability to build for, such as 8.9; needs no GPU; trt only"),
    ] = None,
) -> None:
    """Build an engine of an ONNX file, for this machine or for an NVIDIA chip that is not here.

    Example: `espalier build model.onnx --runtime ov --output build/engine`

    Exit codes: **0** built, **2** bad input or the runtime cannot do it here, **130** interrupted.
    """
    with reported("Interrupted."):
        from hardware.errors import BuildError, RuntimeMissingError
        from hardware.graph.model import load_model
        from hardware.records import model_digest
        from hardware.runtimes import get_runtime
        from hardware.runtimes.base import EngineSettings
        from hardware.runtimes.trt import TensorRt

        if capability is None:
            chosen = get_runtime(runtime)
        elif runtime == TensorRt.name:
            chosen = TensorRt(capability=capability)
            if (missing := chosen.missing()) is not None:
                raise RuntimeMissingError(missing)
        else:
            raise BuildError(f"--capability names an NVIDIA GPU; {runtime} builds for none.")
        settings = EngineSettings(precision=precision, threads=threads)
        path = chosen.build(load_model(model), settings).save(output)
        digest = model_digest(path)
        out.print(
            f"{path}: {precision}, {runtime} {chosen.version()}, {chosen.device()}, "
            f"{path.stat().st_size} bytes, sha256 {digest[:12]}",
            markup=False,
            highlight=False,
        )

"""The engines that are timed against each other: files, how to run them, and how to load them.

Among them the reference model: a fixed small network that is timed in turns with an engine whose
baseline is of another session. The machine's clock differs between sessions; the ratio of engine
and reference model differs much less.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hardware.device import Device
from hardware.errors import BuildError
from hardware.gate.sample import Loaded, Loader
from hardware.gate.session import Subject
from hardware.records import model_digest
from hardware.runtimes import get_runtime
from hardware.runtimes.base import Engine, EngineSettings

# Of the reference model and of how it is timed: ratios to different versions do not compare.
# Version 1 was timed after a single untimed inference, too few for the caches to hold its weights.
REFERENCE_VERSION = 2
REFERENCE = f"reference model {REFERENCE_VERSION}"  # as histories name it
CHANNELS, SIZE, DEPTH = 32, 32, 6
RUNTIME_OF = {".onnx": "ort", ".ort": "ort", ".xml": "ov", ".engine": "trt", ".plan": "trt"}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFile:
    """An engine's file and how to run it."""

    path: Path
    runtime: str
    settings: EngineSettings

    def load(self) -> Engine:
        """Return the engine; raises BuildError."""
        return get_runtime(self.runtime).load(self.path, self.settings)

    def device(self) -> Device:
        """Return the device whose speed the engine has: this machine, or an accelerator in it."""
        return get_runtime(self.runtime).machine()


def engine_file(path: Path, runtime: str | None, settings: EngineSettings) -> EngineFile:
    """Return the engine of a file; its runtime follows from the file's name unless given.

    Raises:
        BuildError: no such file, or a name that tells no runtime.
    """
    if not path.is_file():
        raise BuildError(f"There is no file {path}. Give an engine: {', '.join(RUNTIME_OF)}.")
    if runtime is None and path.suffix not in RUNTIME_OF:
        raise BuildError(
            f"{path} tells no runtime by its name. Known: {', '.join(RUNTIME_OF)}; "
            "or name the runtime with --runtime."
        )
    return EngineFile(path=path, runtime=runtime or RUNTIME_OF[path.suffix], settings=settings)


def describe(engine: EngineFile, *, is_cold: bool) -> Subject:
    """Return what the engine is, after loading it once.

    Raises:
        BuildError: it does not load.
        StorageError: its file cannot be read.
    """
    loaded = engine.load()
    inputs = ((str(loaded.dtypes[name]), tuple(s)) for name, s in loaded.inputs.items())
    return Subject(
        path=str(engine.path),
        sha256=model_digest(engine.path),
        runtime=engine.runtime,
        version=get_runtime(engine.runtime).version(),
        precision=loaded.precision,
        threads=engine.settings.threads,
        inputs=tuple(sorted(inputs)),
        is_cold=is_cold,
    )


def loader(load: Callable[[], Engine]) -> Loader:
    """Return what loads an engine, timed, and feeds it random inputs."""

    def timed() -> Loaded:
        start_ns = time.perf_counter_ns()
        engine = load()
        load_ms = (time.perf_counter_ns() - start_ns) / 1e6
        return Loaded(load_ms, engine.timer(engine.random_feeds()))

    return timed


def reference_loader(runtime: str, settings: EngineSettings) -> Loader:
    """Return what builds the reference model, on as many threads as the engines run on."""
    model, found = reference_model(), get_runtime(runtime)
    alike = EngineSettings(threads=settings.threads)
    return loader(lambda: found.build(model, alike))


def reference_model() -> onnx.ModelProto:
    """Return six 3x3 convolutions of 32 channels at 32x32: 57 million multiply-adds."""
    generator = np.random.default_rng(0)
    shape = [1, CHANNELS, SIZE, SIZE]
    nodes, weights = [], []
    for index in range(DEPTH):
        source = "input" if index == 0 else f"relu{index - 1}"
        target = "output" if index == DEPTH - 1 else f"relu{index}"
        values = generator.standard_normal((CHANNELS, CHANNELS, 3, 3)) / (3 * CHANNELS**0.5)
        weights.append(numpy_helper.from_array(values.astype(np.float32), f"weight{index}"))
        nodes.append(
            helper.make_node(
                "Conv",
                [source, f"weight{index}"],
                [f"conv{index}"],
                f"conv{index}",
                kernel_shape=[3, 3],
                pads=[1] * 4,
            )
        )
        nodes.append(helper.make_node("Relu", [f"conv{index}"], [target], f"relu{index}"))
    graph = helper.make_graph(
        nodes,
        "reference",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, shape)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)

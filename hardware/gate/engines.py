"""The engines that are timed against each other: files, how to run them, and how to load them."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hardware.errors import BuildError
from hardware.gate.reference import anchor_model
from hardware.gate.sample import Loaded, Loader
from hardware.gate.session import Subject, file_hash
from hardware.runtimes import get_runtime
from hardware.runtimes.base import Engine, EngineSettings

RUNTIME_OF = {".onnx": "ort", ".ort": "ort", ".xml": "ov", ".engine": "trt", ".plan": "trt"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """An engine file and how to run it."""

    path: Path
    runtime: str
    settings: EngineSettings

    def load(self) -> Engine:
        """Return the engine; raises BuildError."""
        return get_runtime(self.runtime).load(self.path, self.settings)


def contender(path: Path, runtime: str | None, settings: EngineSettings) -> Contender:
    """Return the contender of a file; its runtime follows from the file's name unless given.

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
    return Contender(path=path, runtime=runtime or RUNTIME_OF[path.suffix], settings=settings)


def describe(engine: Contender, *, is_cold: bool) -> Subject:
    """Return what the contender is, after loading it once.

    Raises:
        BuildError: it does not load.
        StorageError: its file cannot be read.
    """
    loaded = engine.load()
    inputs = ((str(loaded.dtypes[name]), tuple(s)) for name, s in loaded.inputs.items())
    return Subject(
        path=str(engine.path),
        sha256=file_hash(engine.path),
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


def anchor_loader(runtime: str, settings: EngineSettings) -> Loader:
    """Return what builds the anchor, on as many threads as the engines run on."""
    model, found = anchor_model(), get_runtime(runtime)
    alike = EngineSettings(threads=settings.threads)
    return loader(lambda: found.build(model, alike))

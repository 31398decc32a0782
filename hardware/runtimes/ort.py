"""ONNX Runtime on the CPU."""

import json
import re
import shutil
import statistics
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Mapping
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from hardware.device import this_device
from hardware.errors import BuildError, ModelError, RunError
from hardware.records import write_whole
from hardware.runtimes.base import (
    Array,
    Engine,
    EngineSettings,
    Feeds,
    NodeTime,
    Runtime,
    Vendor,
    input_dtypes,
    input_shapes,
)
from hardware.runtimes.fusion import nodes_behind
from hardware.timing import Timer, timer_of, without_garbage_collection

PROVIDER = "CPUExecutionProvider"
FILE = "model.onnx"
PROFILE_WARMUP = 5  # first inferences allocate and page in; their node times are left out


class OrtSession(Engine):
    """What runs: a session, however it came to be."""

    session: Vendor

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Return every output by name; raises RunError."""
        self.check(feeds)
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self._run(dict(feeds)), strict=True))

    def timer(self, feeds: Feeds) -> Timer:
        """Return a timer of `session.run` alone."""
        self.check(feeds)
        held = dict(feeds)
        return timer_of(lambda: self._run(held))

    def _run(self, feeds: dict[str, Array]) -> list[Array]:
        """Return the outputs in the session's order; raises RunError."""
        try:
            outputs: list[Array] = self.session.run(None, feeds)
        except Exception as error:  # the runtime's errors share no public base class
            raise RunError(f"ONNX Runtime failed while running: {error}") from error
        return outputs


class OrtFileEngine(OrtSession):
    """A session of a file, read by the runtime alone: nothing of it is held twice."""

    def __init__(
        self,
        path: Path,
        settings: EngineSettings,
        provider: str = PROVIDER,
        options: Mapping[str, str] | None = None,
    ) -> None:
        self.path, self.precision = path, settings.precision
        self.session = open_session(str(path), session_options(settings), provider, options)
        self.inputs, self.dtypes = {}, {}
        for value in self.session.get_inputs():
            if not all(isinstance(size, int) and size > 0 for size in value.shape):
                raise BuildError(
                    f"{path}: input {value.name!r} has an open size in its shape {value.shape}. "
                    "Export the model with fixed sizes, batch included."
                )
            self.inputs[value.name] = tuple(value.shape)
            self.dtypes[value.name] = _dtype(value.type)

    def node_times(self, feeds: Feeds, runs: int) -> tuple[NodeTime, ...]:
        """Raise RunError: only engines that are built from a model can be profiled."""
        raise RunError("This engine was built without profiling; build it with profile=True.")

    def save(self, folder: Path) -> Path:
        """Copy the file that was loaded."""
        path = folder / self.path.name
        write_whole(path, self.path.read_bytes())
        return path


class OrtEngine(OrtSession):
    """An ONNX Runtime session of a model in memory; the ONNX file is the deliverable."""

    def __init__(self, model: onnx.ModelProto, settings: EngineSettings, profile: bool) -> None:
        self.model, self.settings, self.profile = model, settings, profile
        self.serialized = model.SerializeToString()
        self.inputs = input_shapes(model)
        self.dtypes = input_dtypes(model)
        self.precision = settings.precision
        self.session = None
        self._traces: Path | None = None  # where the open profile is written
        self._open()

    def node_times(self, feeds: Feeds, runs: int) -> tuple[NodeTime, ...]:
        """Return each node's median time; raises RunError without `profile=True`."""
        if not self.profile:
            raise RunError("This engine was built without profiling; build it with profile=True.")
        self.check(feeds)
        if self._traces is None:  # a session profiles once: the first trace has been read
            self._open()
        held = dict(feeds)
        for _ in range(PROFILE_WARMUP + runs):
            self._run(held)
        times = _read_trace(Path(self.session.end_profiling()), runs)
        self._drop_traces()
        owners = nodes_behind(self.model, [_names_behind(name) for name, _ in times])
        return tuple(
            NodeTime(name=name, operator=operator, nodes=nodes, time_us=_median_us(durations))
            for ((name, operator), durations), nodes in zip(times.items(), owners, strict=True)
        )

    def save(self, folder: Path) -> Path:
        """Write the ONNX file; the session's optimised form is specific to this processor."""
        path = folder / FILE
        write_whole(path, self.serialized)
        return path

    def _open(self) -> None:
        """Open a session, with a trace of its own where it is to be profiled."""
        self.session = None
        options = session_options(self.settings)
        if self.profile:
            self._traces = Path(tempfile.mkdtemp(prefix="espalier-ort-"))
            # A profile that is never read must not outlive the engine.
            weakref.finalize(self, shutil.rmtree, self._traces, ignore_errors=True)
            options.enable_profiling = True
            options.profile_file_prefix = str(self._traces / "trace")
        self.session = open_session(self.serialized, options)

    def _drop_traces(self) -> None:
        """Delete the trace that has been read."""
        if self._traces is not None:
            shutil.rmtree(self._traces, ignore_errors=True)
        self._traces = None


class OnnxRuntime(Runtime):
    """ONNX Runtime with its CPU provider."""

    name = "ort"

    def precisions(self) -> tuple[str, ...]:
        """Return the only one that it promises on a CPU."""
        return ("fp32",)

    def missing(self) -> str | None:
        """Return what to install where the package is absent."""
        if util.find_spec("onnxruntime") is None:
            return "ONNX Runtime is not installed. Install it: pip install onnxruntime"
        return None

    def version(self) -> str:
        """Return the package's version."""
        import onnxruntime

        return str(onnxruntime.__version__)

    def device(self) -> str:
        """Return the processor it runs on."""
        return f"CPU: {this_device().name}"

    def build(
        self, model: onnx.ModelProto, settings: EngineSettings, *, profile: bool = False
    ) -> OrtEngine:
        """Return a session on the CPU; raises BuildError."""
        self.check_precision(settings.precision)
        try:
            return OrtEngine(model, settings, profile)
        except ModelError as error:
            raise BuildError(str(error)) from error

    def load(self, path: Path, settings: EngineSettings) -> "OrtFileEngine":
        """Return a session of an ONNX file or of one in ONNX Runtime's own format (`.ort`)."""
        self.check_precision(settings.precision)
        return OrtFileEngine(path, settings)


def session_options(settings: EngineSettings) -> Vendor:
    """Return session options: one inference at a time, on exactly the threads asked for."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4  # errors reach the caller as exceptions
    # Threads spin between the nodes of an inference, as they do by default: woken anew for every
    # node, two took a ResNet-56 twice as long, and longer than one. After the inference they
    # stop: idle threads of one engine would spin on the cores that the next one is timed on.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def open_session(
    model: bytes | str,
    options: Vendor,
    provider: str = PROVIDER,
    settings: Mapping[str, str] | None = None,
) -> Vendor:
    """Return a session of a model or a file that really runs on this provider.

    Args:
        model: serialized, or a file's name.
        options: of the session.
        provider: ONNX Runtime's name of it.
        settings: the provider's own options.

    Raises:
        BuildError: ONNX Runtime refused, or would run the model, or a part of it, elsewhere.
    """
    import onnxruntime as ort

    if provider not in (known := ort.get_available_providers()):
        raise BuildError(f"This ONNX Runtime has no {provider}. It has {', '.join(known)}.")
    if provider != PROVIDER:  # a node that the provider lacks would silently go to the CPU
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = ort.InferenceSession(model, options, providers=[(provider, dict(settings or {}))])
    except Exception as error:  # the runtime's errors share no public base class
        what = model if isinstance(model, str) else "the model"
        raise BuildError(f"ONNX Runtime refused {what}: {error}") from error
    # A provider that fails to start is replaced by another without an error.
    if (used := session.get_providers())[:1] != [provider]:
        raise BuildError(f"The model would run on {', '.join(used)}, not on {provider}.")
    return session


def _dtype(kind: str) -> "np.dtype[Any]":
    """Return the dtype of what ONNX Runtime calls `tensor(float)` and the like."""
    word = kind.removeprefix("tensor(").removesuffix(")")
    try:
        return np.dtype({"float": "float32", "double": "float64"}.get(word, word))
    except TypeError as error:
        raise BuildError(
            f"ONNX Runtime asks for an input of {kind}; arrays have no such dtype."
        ) from error


def _read_trace(path: Path, runs: int) -> dict[tuple[str, str], list[int]]:
    """Return the last `runs` durations of each (node, operator), whole microseconds."""
    times: dict[tuple[str, str], list[int]] = defaultdict(list)
    with without_garbage_collection():  # it would look at all events again and again
        events = json.loads(path.read_text())
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            times[name, event["args"]["op_name"]].append(event["dur"])
    return {key: durations[-runs:] for key, durations in times.items()}


def _median_us(durations: list[int]) -> float:
    """Return the median of durations of which the trace holds only the whole microseconds.

    The clock's difference is cut off, so `d` means somewhere in [d, d + 1); the grouped median
    interpolates within that microsecond (its classes are centred, hence the half).
    """
    return statistics.median_grouped([duration + 0.5 for duration in durations], interval=1.0)


def _names_behind(executed: tuple[str, str] | str) -> tuple[str, ...]:
    """Return the ONNX node or value names that may hide behind the name of an executed node.

    Layout nodes are called after the value they write (`relu_nchwc`), fused ones after a node they
    swallowed (`fused conv`, `matmul/MatMulAddFusion`), and a counter keeps names apart.
    """
    name = executed if isinstance(executed, str) else executed[0]
    found = [name]
    for pattern in (r"_token_\d+$", r"_nchwc$", r"^(?:fused )+", r"/\w+Fusion/?$"):
        name = re.sub(pattern, "", name)
        found.append(name)
    return tuple(dict.fromkeys(found))

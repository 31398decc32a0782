"""OpenVINO on the CPU."""

import os
import tempfile
from functools import lru_cache
from importlib import util
from pathlib import Path

import numpy as np
import onnx

from hardware.device import this_device
from hardware.errors import BuildError, ModelError, RunError, StorageError
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
from hardware.runtimes.ov_counters import Floats, time_per_run_us
from hardware.timing import Timer, timer_of

FILE = "model.xml"
# Our precision -> OpenVINO's word for it, in its hint and in its runtime model.
PRECISIONS = {"fp32": "f32", "bf16": "bf16"}
HEAVY = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul"})
PROFILE_WARMUP = 5
Options = dict[str, str | int | bool]
READINGS = 60  # of the counters while profiling, at most


class OvEngine(Engine):
    """A compiled OpenVINO model; the IR (`model.xml` and `model.bin`) is the deliverable.

    `graph` is the ONNX model where it was built from one: node times then name its nodes.
    """

    def __init__(
        self, model: Vendor, core: Vendor, options: Options, graph: onnx.ModelProto | None
    ) -> None:
        self.model, self.graph = model, graph
        self._core, self._options = core, options
        self._compile()
        ports = self._compiled
        if graph is not None:
            self.inputs = input_shapes(graph)
            self.dtypes = input_dtypes(graph)
            self.outputs = [output.name for output in graph.graph.output]
        else:
            self.inputs = {port.get_any_name(): _shape(port) for port in ports.inputs}
            self.dtypes = {p.get_any_name(): p.element_type.to_dtype() for p in ports.inputs}
            self.outputs = [port.get_any_name() for port in ports.outputs]
        self.precision = _precision(self._executed())

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Return every output by name; raises RunError."""
        self._bind(self._tensors(feeds))
        self._infer()
        return {
            name: self._request.get_output_tensor(index).data.copy()
            for index, name in enumerate(self.outputs)
        }

    def timer(self, feeds: Feeds) -> Timer:
        """Return a timer of the inference alone: inputs are bound before, outputs stay in place."""
        tensors = self._tensors(feeds)
        infer = timer_of(self._infer)

        def milliseconds(calls: int) -> float:
            self._bind(tensors)
            return infer(calls)

        return milliseconds

    def node_times(self, feeds: Feeds, runs: int) -> tuple[NodeTime, ...]:
        """Return each executed node's typical time; raises RunError without `profile=True`."""
        if not self._options["PERF_COUNT"]:
            raise RunError("This engine was built without profiling; build it with profile=True.")
        tensors = self._tensors(feeds)
        if self._inferences:  # the counters never forget: start them anew
            self._compile()
        self._bind(tensors)
        self._infer()
        # The cold first inference shows which nodes run at all; later a short one may read as 0.
        runs_at_all = np.array(self._read_counters()) > 0
        for _ in range(PROFILE_WARMUP - 1):
            self._infer()
        wanted = set(np.linspace(1, runs, min(runs, READINGS)).round().astype(int))
        counts, averages = [], []
        for index in range(1, runs + 1):
            self._infer()
            if index in wanted:
                counts.append(self._inferences)
                averages.append(self._read_counters())
        try:
            times = time_per_run_us(counts, averages)
        except ValueError as error:
            raise RunError(f"{runs} inferences are too few to profile. {_said(error)}") from error
        return self._named(np.where(runs_at_all, times, 0.0))

    def save(self, folder: Path) -> Path:
        """Write the IR with its weights as they are; raises StorageError."""
        import openvino

        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".ir.") as scratch:
                written = Path(scratch) / FILE
                openvino.save_model(self.model, written, compress_to_fp16=False)
                # The weights first: a description without them would look like an engine.
                for path in (written.with_suffix(".bin"), written):
                    os.replace(path, folder / path.name)
        except (OSError, RuntimeError) as error:
            raise StorageError(f"Cannot write the engine into {folder}: {_said(error)}") from error
        return folder / FILE

    def _compile(self) -> None:
        """Compile the model anew, with counters at zero; raises BuildError."""
        try:
            self._compiled = self._core.compile_model(self.model, "CPU", self._options)
            self._request = self._compiled.create_infer_request()
        except Exception as error:  # the runtime's errors share no public base class
            raise BuildError(f"OpenVINO cannot compile the model: {_said(error)}") from error
        self._inferences = 0

    def _executed(self) -> list[tuple[str, dict[str, str]]]:
        """Return name and properties of every node of the compiled model, in run order."""
        model = self._compiled.get_runtime_model()
        return [
            (op.get_friendly_name(), {key: value.astype(str) for key, value in op.rt_info.items()})
            for op in model.get_ordered_ops()
        ]

    def _tensors(self, feeds: Feeds) -> list[Vendor]:
        """Return the inputs as OpenVINO takes them, without copying; raises RunError."""
        import openvino

        self.check(feeds)
        arrays = [np.ascontiguousarray(feeds[name]) for name in self.inputs]
        try:
            return [openvino.Tensor(array, shared_memory=True) for array in arrays]
        except Exception as error:  # as above
            raise RunError(f"OpenVINO does not take these inputs: {_said(error)}") from error

    def _bind(self, tensors: list[Vendor]) -> None:
        """Let the next inference read these inputs; raises RunError."""
        try:
            for index, tensor in enumerate(tensors):
                self._request.set_input_tensor(index, tensor)
        except Exception as error:  # as above
            raise RunError(f"OpenVINO does not take these inputs: {_said(error)}") from error

    def _infer(self) -> None:
        """Run once; the outputs stay where they are. Raises RunError."""
        self._inferences += 1
        try:
            self._request.infer(share_outputs=True)
        except Exception as error:  # as above
            raise RunError(f"OpenVINO failed while running: {_said(error)}") from error

    def _read_counters(self) -> list[int]:
        """Return the mean time of every node over all inferences so far, whole microseconds."""
        return [info.real_time.microseconds for info in self._request.get_profiling_info()]

    def _named(self, times: Floats) -> tuple[NodeTime, ...]:
        """Return the nodes that took time, with the ONNX nodes that each one stands for."""
        executed = dict(self._executed())
        names = [info.node_name for info in self._request.get_profiling_info()]
        behind = [_names_behind(executed.get(name, {})) for name in names]
        owners = nodes_behind(self.graph, behind) if self.graph is not None else behind
        return tuple(
            NodeTime(
                name=name,
                operator=executed.get(name, {}).get("layerType", "unknown"),
                nodes=nodes,
                time_us=float(time_us),
            )
            for name, nodes, time_us in zip(names, owners, times, strict=True)
            if time_us > 0
        )


class OpenVino(Runtime):
    """OpenVINO with its CPU plugin."""

    name = "ov"

    def precisions(self) -> tuple[str, ...]:
        """Return fp32, and bf16 where the processor computes in it."""
        return _precisions_here()

    def missing(self) -> str | None:
        """Return what to install where the package is absent."""
        if util.find_spec("openvino") is None:
            return "OpenVINO is not installed. Install it: pip install openvino"
        return None

    def version(self) -> str:
        """Return the package's version, without the build."""
        import openvino

        return str(openvino.__version__).split("-", maxsplit=1)[0]

    def device(self) -> str:
        """Return the processor as OpenVINO names it."""
        name = str(_core().get_property("CPU", "FULL_DEVICE_NAME")).strip()
        return f"CPU: {name or this_device().name}"

    def build(
        self, model: onnx.ModelProto, settings: EngineSettings, *, profile: bool = False
    ) -> OvEngine:
        """Return an engine that runs in the precision asked for; raises BuildError."""
        self.check_precision(settings.precision)
        return _engine(model.SerializeToString(), settings, graph=model, profile=profile)

    def load(self, path: Path, settings: EngineSettings) -> OvEngine:
        """Return an engine of an IR (`.xml`) or an ONNX file; raises BuildError."""
        self.check_precision(settings.precision)
        if not path.is_file() or path.suffix not in (".xml", ".onnx"):
            raise BuildError(f"{path} is no engine. Give an existing OpenVINO `.xml` or `.onnx`.")
        return _engine(str(path), settings, graph=None, profile=False)


def _engine(
    source: bytes | str, settings: EngineSettings, *, graph: onnx.ModelProto | None, profile: bool
) -> OvEngine:
    """Return a compiled engine of a file, or of the bytes of an ONNX model."""
    options = _options(settings, profile)
    core = _core()
    try:
        model = core.read_model(source)
    except Exception as error:  # the runtime's errors share no public base class
        what = source if isinstance(source, str) else "the model"
        raise BuildError(f"OpenVINO cannot read {what}: {_said(error)}") from error
    try:
        engine = OvEngine(model, core, options, graph)
    except ModelError as error:
        raise BuildError(str(error)) from error
    if engine.precision != settings.precision:
        offered = ", ".join(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
        raise BuildError(
            f"OpenVINO would run this model in {engine.precision}, not in {settings.precision}. "
            f"This processor offers {offered}."
        )
    return engine


def _options(settings: EngineSettings, profile: bool) -> Options:
    """Return the options: one inference at a time, on exactly the threads asked for."""
    return {
        # Without it, a processor that knows bf16 runs fp32 models in bf16.
        "INFERENCE_PRECISION_HINT": PRECISIONS[settings.precision],
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": settings.threads,
        "PERF_COUNT": profile,
    }


@lru_cache(maxsize=1)
def _precisions_here() -> tuple[str, ...]:
    """Return the precisions that this processor computes in, of those that we know."""
    offered = _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return tuple(name for name in PRECISIONS if name == "fp32" or name.upper() in offered)


def _said(error: Exception) -> str:
    """Return the vendor's message without its trailing empty lines."""
    return str(error).strip()


def _core() -> Vendor:
    """Return what reads and compiles models."""
    import openvino

    return openvino.Core()


def _shape(port: Vendor) -> tuple[int, ...]:
    """Return a port's shape; raises ModelError where a size is open."""
    if port.partial_shape.is_dynamic:
        raise ModelError(
            f"Input {port.get_any_name()!r} has an open size in its shape {port.partial_shape}. "
            "Convert the model with fixed sizes, batch included."
        )
    return tuple(port.shape)


def _names_behind(properties: dict[str, str]) -> tuple[str, ...]:
    """Return the names of what an executed node was made of.

    A convolution with a bias is read as two nodes, `NAME/WithoutBiases` and `NAME`; the second may
    be lost when they are joined again.
    """
    names = [name for name in properties.get("originalLayersNames", "").split(",") if name]
    return tuple(dict.fromkeys(name.removesuffix("/WithoutBiases") for name in names))


def _precision(executed: list[tuple[str, dict[str, str]]]) -> str:
    """Return the precision that most nodes with weights run in, else most nodes."""
    weighted = [p for _, p in executed if p["layerType"] in HEAVY]
    ran = [p["runtimePrecision"] for p in weighted or [p for _, p in executed]]
    most = max(set(ran), key=ran.count)
    ours = {theirs: name for name, theirs in PRECISIONS.items()} | {"f16": "fp16", "i8": "int8"}
    return ours.get(most, most)

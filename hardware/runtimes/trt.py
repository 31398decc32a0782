"""TensorRT 10 and 11, and TensorRT for RTX. The last builds without a GPU, for a named chip.

Networks are strongly typed: the ONNX file says the precision of every value. Timing is by CUDA
events around CUDA graphs, so that it is the GPU's time, without copies and without launching.
"""

from importlib import import_module, util
from pathlib import Path
from statistics import median

import onnx

from hardware.device import Device
from hardware.errors import BuildError, ModelError, RunError
from hardware.graph.precision import as_fp16
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
from hardware.runtimes.cuda import compute_capability, gpu_absent, this_gpu
from hardware.runtimes.fusion import nodes_behind
from hardware.runtimes.trt_building import PRECISIONS, build_plan, capabilities, unknown_chip
from hardware.runtimes.trt_sessions import Session, layers_of_engine, open_plan
from hardware.timing import Timer

FULL, RTX = "tensorrt", "tensorrt_rtx"
FILE = "model.engine"
PROFILE_WARMUP = 5
INSTALL = (
    "TensorRT is not installed. Install it: pip install tensorrt; or, for GeForce RTX and RTX PRO, "
    "pip install tensorrt-rtx-cu13"
)


class TrtEngine(Engine):
    """A serialized engine; it is put onto the GPU when it is first run.

    `model` is the ONNX model where it was built from one: node times then name its nodes.
    """

    def __init__(
        self,
        vendor: Vendor,
        plan: bytes,
        precision: str,
        *,
        model: onnx.ModelProto | None = None,
        profile: bool = False,
        chip: str = "",
    ) -> None:
        self.plan, self.precision, self.model = plan, precision, model
        self._vendor, self._profile, self._chip = vendor, profile, chip
        self._engine: Vendor = None
        self._session: Session | None = None
        if model is not None:
            self.inputs, self.dtypes = input_shapes(model), input_dtypes(model)
        else:
            session = self._opened()
            self.inputs, self.dtypes = session.inputs, session.dtypes

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Return every output by name; raises RunError."""
        self.check(feeds)
        self._session = self._session or self._opened()
        self._session.write(feeds)
        self._session.launch()
        return self._session.read()

    def timer(self, feeds: Feeds) -> Timer:
        """Return a timer of the GPU's own clock; every timer has its own inputs and context."""
        self.check(feeds)
        session = self._opened(graphs=True)
        session.write(feeds)
        launch = session.captured()
        return lambda calls: session.stream.milliseconds(launch, calls)

    def node_times(self, feeds: Feeds, runs: int) -> tuple[NodeTime, ...]:
        """Return each executed layer's median time; raises RunError without `profile=True`."""
        if not self._profile or self.model is None:
            raise RunError("This engine was built without profiling; build it with profile=True.")
        self.check(feeds)
        session = self._opened()
        session.write(feeds)
        times = session.profiled(PROFILE_WARMUP + runs)[PROFILE_WARMUP:]
        executed = list(times[0])
        known = layers_of_engine(self._vendor, self._engine)
        owners = nodes_behind(self.model, [known.get(name, ("", ()))[1] for name in executed])
        return tuple(
            NodeTime(
                name=name,
                operator=known.get(name, ("unknown", ()))[0],
                nodes=nodes,
                time_us=1000 * median(run.get(name, 0.0) for run in times),
            )
            for name, nodes in zip(executed, owners, strict=True)
        )

    def save(self, folder: Path) -> Path:
        """Write the serialized engine: for one chip and one version of TensorRT."""
        path = folder / FILE
        write_whole(path, self.plan)
        return path

    def _opened(self, *, graphs: bool = False) -> Session:
        """Return a context of its own on the GPU; raises RunError where there is no GPU."""
        if (absent := gpu_absent()) is not None:
            made = f" It was built for compute capability {self._chip}." if self._chip else ""
            raise RunError(
                f"Running and timing an engine needs an NVIDIA GPU: {absent}.{made} Save the "
                "engine and run `espalier bench model.engine` on a machine with that GPU."
            )
        if self._engine is None:
            self._engine = open_plan(self._vendor, self.plan)
        return Session(self._vendor, self._engine, graphs=graphs)


class TensorRt(Runtime):
    """TensorRT, where it is installed; else TensorRT for RTX.

    Args:
        capability: compute capability to build for, such as "8.9"; None: this machine's GPU. An
            engine for a named chip is only built, never run here.
        package: "tensorrt" or "tensorrt_rtx"; None: the first that is installed.
    """

    name = "trt"

    def __init__(self, capability: str | None = None, package: str | None = None) -> None:
        self.capability = capability
        found = [name for name in (FULL, RTX) if util.find_spec(name) is not None]
        # Only TensorRT for RTX builds for a chip that is not there.
        order = found[::-1] if capability is not None else found
        self.package = package or next(iter(order), None)

    def precisions(self) -> tuple[str, ...]:
        """Return those that the ONNX file can be written in."""
        return PRECISIONS

    def missing(self) -> str | None:
        """Return what to install, or that there is no GPU to measure on."""
        if self.package is None or util.find_spec(self.package) is None:
            return INSTALL
        if self.capability is not None:
            return None
        if (absent := gpu_absent()) is None:
            here = ".".join(map(str, compute_capability()))
            return unknown_chip(self._vendor, here) if self.package == RTX else None
        chips = ", ".join(capabilities(self._vendor)) if self.package == RTX else ""
        instead = (
            f" Without one, engines can be built for a named chip, but not timed: espalier build "
            f"MODEL.onnx --runtime trt --capability 8.9 (known: {chips})."
            if chips
            else ""
        )
        return (
            f"TensorRT {self.version()} is installed, but running and timing an engine needs an "
            f"NVIDIA GPU: {absent}. Run this on a machine with one.{instead}"
        )

    def version(self) -> str:
        """Return the package's version; TensorRT for RTX is told apart by `rtx-`."""
        prefix = "rtx-" if self.package == RTX else ""
        return f"{prefix}{self._vendor.__version__}"

    def device(self) -> str:
        """Return the GPU, or the chip that is built for."""
        if self.capability is not None:
            return f"GPU of compute capability {self.capability}, build only"
        gpu = self.machine()
        return f"GPU: {gpu.name} ({gpu.architecture}, {gpu.system})"

    def machine(self) -> Device:
        """Return the GPU: what else is in the machine does not enter its time."""
        return this_gpu()

    def build(
        self, model: onnx.ModelProto, settings: EngineSettings, *, profile: bool = False
    ) -> TrtEngine:
        """Return an engine of the precision asked for, strongly typed; raises BuildError."""
        self.check_precision(settings.precision)
        try:
            input_shapes(model)
        except ModelError as error:
            raise BuildError(str(error)) from error
        typed = as_fp16(model) if settings.precision == "fp16" else model
        plan = build_plan(
            self._vendor,
            typed.SerializeToString(),
            precision=settings.precision,
            detailed=profile,
            capability=self.capability,
        )
        return TrtEngine(
            self._vendor,
            plan,
            settings.precision,
            model=model,
            profile=profile,
            chip=self.capability or "",
        )

    def load(self, path: Path, settings: EngineSettings) -> TrtEngine:
        """Return a serialized engine; the file does not say its precision, so `settings` does."""
        try:
            plan = path.read_bytes()
        except OSError as error:
            raise BuildError(f"{path} cannot be read: {error.strerror or error}.") from error
        try:
            return TrtEngine(self._vendor, plan, settings.precision)
        except (RunError, BuildError) as error:
            raise BuildError(f"{path} does not run here: {error}") from error

    @property
    def _vendor(self) -> Vendor:
        assert self.package is not None  # `missing` has said so
        return import_module(self.package)

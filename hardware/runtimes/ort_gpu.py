"""ONNX Runtime on an NVIDIA GPU: its CUDA provider and its TensorRT provider.

They run and time whole engines. Neither tells what a node takes on the GPU (the trace times the
launching of kernels, and the TensorRT provider runs a network as one node), so no latency table can
be measured with them: use the `trt` runtime.
"""

from collections.abc import Mapping
from importlib import util
from pathlib import Path

import onnx

from hardware.device import Device
from hardware.errors import BuildError, ModelError, RunError
from hardware.graph.precision import as_fp16
from hardware.records import write_whole
from hardware.runtimes.base import (
    EngineSettings,
    Feeds,
    NodeTime,
    Runtime,
    Vendor,
    input_dtypes,
    input_shapes,
)
from hardware.runtimes.cuda import gpu_absent, this_gpu
from hardware.runtimes.ort import FILE, OrtFileEngine, OrtSession, open_session, session_options
from hardware.timing import Timer, timer_of

Options = Mapping[str, str]
NO_NODE_TIMES = (
    "ONNX Runtime does not tell what its nodes take on a GPU, so no latency table can be measured "
    "with it. Use the runtime trt, or time whole engines."
)


class OrtGpuEngine(OrtSession):
    """A session on the GPU; the ONNX file, in the engine's precision, is the deliverable."""

    def __init__(
        self, model: onnx.ModelProto, settings: EngineSettings, provider: str, options: Options
    ) -> None:
        self.inputs, self.dtypes = input_shapes(model), input_dtypes(model)
        self.precision = settings.precision
        typed = as_fp16(model) if settings.precision == "fp16" else model
        self.serialized = typed.SerializeToString()
        self.session = open_session(self.serialized, session_options(settings), provider, options)

    def timer(self, feeds: Feeds) -> Timer:
        """Return a timer of inferences whose inputs and outputs stay on the GPU."""
        self.check(feeds)
        return bound_timer(self.session, feeds)

    def node_times(self, feeds: Feeds, runs: int) -> tuple[NodeTime, ...]:
        """Raise RunError: what nodes take on the GPU is not known."""
        raise RunError(NO_NODE_TIMES)

    def save(self, folder: Path) -> Path:
        """Write the ONNX file."""
        path = folder / FILE
        write_whole(path, self.serialized)
        return path


class OrtGpuFileEngine(OrtFileEngine):
    """A session of a file on the GPU."""

    def timer(self, feeds: Feeds) -> Timer:
        """Return a timer of inferences whose inputs and outputs stay on the GPU."""
        self.check(feeds)
        return bound_timer(self.session, feeds)


def bound_timer(session: Vendor, feeds: Feeds) -> Timer:
    """Return a timer of a session's inferences on inputs that lie on the GPU already."""
    import onnxruntime as ort

    binding = session.io_binding()
    try:
        for name, array in feeds.items():
            held = ort.OrtValue.ortvalue_from_numpy(array, "cuda", 0)
            binding.bind_ortvalue_input(name, held)
        for output in session.get_outputs():
            binding.bind_output(output.name, "cuda", 0)
    except Exception as error:  # the runtime's errors share no public base class
        raise RunError(f"ONNX Runtime cannot put these inputs on the GPU: {error}") from error

    def infer() -> None:
        try:
            session.run_with_iobinding(binding)  # returns when the GPU is done
        except Exception as error:  # as above
            raise RunError(f"ONNX Runtime failed while running: {error}") from error

    return timer_of(infer)


class OrtCuda(Runtime):
    """ONNX Runtime with its CUDA provider."""

    name = "ort-cuda"
    tells_node_times = False
    provider = "CUDAExecutionProvider"
    # precision -> the provider's options. Without them float32 products are rounded to tf32.
    options: Mapping[str, Options] = {
        "fp32": {"use_tf32": "0"},
        "tf32": {"use_tf32": "1"},
        "fp16": {},
    }

    def precisions(self) -> tuple[str, ...]:
        """Return those that the provider has options for."""
        return tuple(self.options)

    def missing(self) -> str | None:
        """Return what to install, or that there is no GPU."""
        wanted = "Install it on a machine with an NVIDIA GPU: pip install onnxruntime-gpu"
        if util.find_spec("onnxruntime") is None:
            return f"ONNX Runtime is not installed. {wanted}"
        import onnxruntime

        if self.provider not in (known := onnxruntime.get_available_providers()):
            return f"This ONNX Runtime has no {self.provider}, only {', '.join(known)}. {wanted}"
        if (absent := gpu_absent()) is not None:
            return f"ONNX Runtime's {self.provider} needs an NVIDIA GPU: {absent}."
        return None

    def version(self) -> str:
        """Return the package's version."""
        import onnxruntime

        return str(onnxruntime.__version__)

    def device(self) -> str:
        """Return the GPU."""
        gpu = self.machine()
        return f"GPU: {gpu.name} ({gpu.architecture}, {gpu.system})"

    def machine(self) -> Device:
        """Return the GPU."""
        return this_gpu()

    def build(
        self, model: onnx.ModelProto, settings: EngineSettings, *, profile: bool = False
    ) -> OrtGpuEngine:
        """Return a session of which every node runs on the GPU; raises BuildError."""
        if profile:
            raise BuildError(NO_NODE_TIMES)
        try:
            return OrtGpuEngine(model, settings, self.provider, self._options(settings))
        except ModelError as error:
            raise BuildError(str(error)) from error

    def load(self, path: Path, settings: EngineSettings) -> OrtGpuFileEngine:
        """Return a session of an ONNX file, whose types are its precision."""
        return OrtGpuFileEngine(path, settings, self.provider, self._options(settings))

    def _options(self, settings: EngineSettings) -> Options:
        """Return the provider's options for a precision; raises BuildError."""
        self.check_precision(settings.precision)
        return {"device_id": "0", **self.options[settings.precision]}


class OrtTensorRt(OrtCuda):
    """ONNX Runtime with its TensorRT provider, which cannot be made to keep float32 exact."""

    name = "ort-trt"
    provider = "TensorrtExecutionProvider"
    options: Mapping[str, Options] = {"tf32": {}, "fp16": {}}

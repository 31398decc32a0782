"""A TensorRT engine on the GPU: its context, its buffers, and what its layers are called."""

import json
import re
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from hardware.errors import BuildError, RunError
from hardware.runtimes.base import Array, Feeds, Vendor
from hardware.runtimes.cuda import Buffer, Stream
from hardware.runtimes.trt_building import is_rtx, listener

Times = dict[str, float]
"""Milliseconds by layer, in run order."""

ONNX_NAME = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


def open_plan(vendor: Vendor, plan: bytes) -> Vendor:
    """Return a serialized engine on the GPU.

    Raises:
        BuildError: damaged, or made for another chip or version.
    """
    logger = listener(vendor)
    logger.errors.clear()
    engine = _runtime(vendor).deserialize_cuda_engine(plan)
    if engine is None:
        raise BuildError(f"TensorRT cannot load the engine: {logger.complaint()}")
    return engine


@lru_cache
def _runtime(vendor: Vendor) -> Vendor:
    """Return what loads engines; it must outlive them."""
    return vendor.Runtime(listener(vendor))


class Session:
    """A context of an engine with buffers of its own, and a stream that it runs in."""

    def __init__(self, vendor: Vendor, engine: Vendor, *, graphs: bool = False) -> None:
        self._vendor, self._graphs = vendor, graphs
        self.stream = Stream()
        if graphs and is_rtx(vendor):
            # It compiles kernels when first run: it captures its own graphs around that.
            config = engine.create_runtime_config()
            config.cuda_graph_strategy = vendor.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            self.context = engine.create_execution_context(config)
        else:
            self.context = engine.create_execution_context()
        if self.context is None:
            raise RunError(f"TensorRT cannot run the engine: {listener(vendor).complaint()}")
        self._buffers: dict[str, Buffer] = {}
        self._outputs: list[str] = []
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            shape = tuple(engine.get_tensor_shape(name))
            if any(size < 0 for size in shape):
                raise BuildError(
                    f"{name!r} has an open size in its shape {shape}. Build the engine with fixed "
                    "sizes, batch included."
                )
            dtype = np.dtype(vendor.nptype(engine.get_tensor_dtype(name)))
            self._buffers[name] = buffer = Buffer(shape, dtype)
            self.context.set_tensor_address(name, buffer.address)
            if engine.get_tensor_mode(name) == vendor.TensorIOMode.OUTPUT:
                self._outputs.append(name)

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name."""
        return {n: b.shape for n, b in self._buffers.items() if n not in self._outputs}

    @property
    def dtypes(self) -> dict[str, "np.dtype[np.generic]"]:
        """Types of the inputs by name."""
        return {n: b.dtype for n, b in self._buffers.items() if n not in self._outputs}

    def write(self, feeds: Feeds) -> None:
        """Copy the inputs to the GPU."""
        for name, array in feeds.items():
            self._buffers[name].write(array, self.stream)

    def read(self) -> dict[str, Array]:
        """Return copies of the outputs."""
        return {name: self._buffers[name].read(self.stream) for name in self._outputs}

    def launch(self) -> None:
        """Put one inference into the stream; raises RunError."""
        if not self.context.execute_async_v3(self.stream.address):
            raise RunError(f"TensorRT failed while running: {listener(self._vendor).complaint()}")

    def captured(self) -> Callable[[], None]:
        """Return what launches one inference as a CUDA graph."""
        self.launch()  # the first one allocates, which cannot be captured
        self.stream.synchronize()
        if is_rtx(self._vendor):
            return self.launch
        return self.stream.capture(self.launch)

    def profiled(self, runs: int) -> list[Times]:
        """Return what every layer took, one record per inference."""
        profiler = _profiler(self._vendor)
        self.context.profiler = profiler
        found = []
        for _ in range(runs):
            profiler.times = {}
            self.launch()
            self.stream.synchronize()
            found.append(profiler.times)
        if not found[0]:
            raise RunError("TensorRT's profiler named no layer.")
        return found


def layers_of_engine(vendor: Vendor, engine: Vendor) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return, per layer, its type and the ONNX nodes behind it, as the engine's inspector says."""
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(vendor.LayerInformationFormat.JSON)
    return parse_layers(text)


def parse_layers(text: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return, per layer of an inspector's JSON, its type and the ONNX nodes behind it.

    Engines with details name the nodes in `Metadata`; else a layer is called after the nodes that
    it fuses, with plus signs between them.
    """
    try:
        layers = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"TensorRT's inspector named no layers: {text[:200]!r}") from error
    found = {}
    for layer in layers:
        if isinstance(layer, str):  # without details a layer is its name
            found[layer] = ("unknown", _names_in(layer))
            continue
        name = layer.get("Name", "")
        nodes = tuple(dict.fromkeys(ONNX_NAME.findall(layer.get("Metadata", ""))))
        found[name] = (layer.get("LayerType", "unknown"), nodes or _names_in(name))
    return found


def _names_in(name: str) -> tuple[str, ...]:
    """Return the names of nodes in a layer's name."""
    inner = re.sub(r"\{ForeignNode\[(.*)\]\}", r"\1", name)
    return tuple(part.strip() for part in re.split(r" \+ |\.\.\.", inner) if part.strip())


def _profiler(vendor: Vendor) -> Vendor:
    """Return a profiler that collects; a layer that runs twice in an inference counts twice."""

    class Collector(vendor.IProfiler):  # type: ignore[misc]  # the vendor's class is untyped
        def __init__(self) -> None:
            vendor.IProfiler.__init__(self)
            self.times: Times = {}

        def report_layer_time(self, name: str, milliseconds: float) -> None:
            self.times[name] = self.times.get(name, 0.0) + milliseconds

    return Collector()

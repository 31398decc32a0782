"""What Espalier asks of a runtime: build an engine, run it, and say where the time went."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from hardware.device import Device, this_device
from hardware.disturbance import Counters, read_counters
from hardware.errors import BuildError, ModelError, RunError
from hardware.timing import Timer, timer_of

Array = npt.NDArray[Any]  # inputs and outputs have the dtype that the model declares
Feeds = Mapping[str, Array]
Vendor = Any  # an object of a vendor's package, which is imported only where it is used


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How an engine is built. Two measurements compare only under equal settings."""

    precision: str = "fp32"  # "fp32" | "bf16" | "fp16" | "int8"
    threads: int = 1

    def __post_init__(self) -> None:
        if self.threads < 1:  # to a runtime 0 means "as many as you like"
            raise ValueError(f"An engine runs on 1 thread or more, not on {self.threads}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeTime:
    """What one executed node took in one inference, averaged or as the median over many."""

    name: str  # the runtime's name of what it executed
    operator: str  # the runtime's own word for it
    nodes: tuple[str, ...]  # ONNX nodes (or value names) that it executes; () where unknown
    time_us: float


class Engine(ABC):
    """A model built by a runtime for one device and one precision."""

    inputs: Mapping[str, tuple[int, ...]]  # name -> shape, batch included
    dtypes: Mapping[str, "np.dtype[Any]"]  # name -> dtype (Any: whichever the model declares)
    precision: str  # what really runs, as the runtime reports it

    @abstractmethod
    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Return every output by name for one inference.

        Raises:
            RunError: the runtime failed, or an input's name or shape does not fit.
        """

    @abstractmethod
    def node_times(self, feeds: Feeds, runs: int) -> tuple[NodeTime, ...]:
        """Return the median time of every executed node over `runs` inferences, in run order.

        Raises:
            RunError: the engine was built without `profile=True`.
        """

    @abstractmethod
    def save(self, folder: Path) -> Path:
        """Write the deliverable engine into `folder` and return its main file."""

    def timer(self, feeds: Feeds) -> Timer:
        """Return what `timing.time_together` times: inferences on `feeds`, end to end.

        The default reads the clock around `run`. A runtime that can prepare its inputs once, or
        whose device keeps its own clock (CUDA events, a simulation), overrides it.

        Raises:
            RunError: an input's name or shape does not fit; the timer raises it too.
        """
        self.check(feeds)

        return timer_of(lambda: self.run(feeds))

    def check(self, feeds: Feeds) -> None:
        """Refuse feeds that do not fit the engine's inputs.

        Raises:
            RunError: an input is missing, unknown, or of another shape or dtype.
        """
        if set(feeds) != set(self.inputs):
            raise RunError(
                f"This engine takes the inputs {sorted(self.inputs)}; got {sorted(feeds)}. "
                "Feed every input under its own name."
            )
        for name, shape in self.inputs.items():
            if tuple(feeds[name].shape) != tuple(shape):
                raise RunError(
                    f"Input {name!r} takes the shape {shape}; got {tuple(feeds[name].shape)}. "
                    "Engines are built for one batch size and image size."
                )
            if feeds[name].dtype != self.dtypes[name]:
                raise RunError(
                    f"Input {name!r} takes {self.dtypes[name]}; got {feeds[name].dtype}."
                )

    def random_feeds(self, seed: int = 0) -> dict[str, Array]:
        """Return inputs of the right shapes: never all zeros, which can run faster.

        Standard-normal, or uniform in 0 to 127 where the model takes integers.
        """
        generator = np.random.default_rng(seed)
        return {
            name: (
                generator.standard_normal(shape)
                if np.issubdtype(self.dtypes[name], np.floating)
                else generator.integers(0, 128, shape)
            ).astype(self.dtypes[name])
            for name, shape in self.inputs.items()
        }


class Runtime(ABC):
    """A vendor's software behind one small interface; vendor errors are translated here."""

    name: str
    tells_node_times: bool = True  # without them no latency table can be measured

    @abstractmethod
    def precisions(self) -> tuple[str, ...]:
        """Return the precisions that it builds in on this machine; nothing is built to tell."""

    def check_precision(self, precision: str) -> None:
        """Refuse a precision that the runtime does not build in.

        Raises:
            BuildError: it does not; the message names those that it has.
        """
        if precision not in (known := self.precisions()):
            raise BuildError(
                f"The runtime {self.name} runs this model in {', '.join(known)}, not in "
                f"{precision}. Choose one of these, or another runtime."
            )

    @abstractmethod
    def missing(self) -> str | None:
        """Return None where the runtime can run here, else why not and what to install."""

    @abstractmethod
    def version(self) -> str:
        """Return the vendor's version."""

    @abstractmethod
    def device(self) -> str:
        """Return what it runs on here, in words, like `CPU: AMD EPYC`."""

    def machine(self) -> Device:
        """Return the device whose speed its engines have: this machine, or an accelerator in it."""
        return this_device()

    def counters(self) -> Counters:
        """Return what others have done so far to the device that this runtime measures on."""
        return read_counters()

    @abstractmethod
    def build(
        self, model: onnx.ModelProto, settings: EngineSettings, *, profile: bool = False
    ) -> Engine:
        """Build an engine; with `profile`, one whose `node_times` answers.

        Raises:
            BuildError: the runtime refused, fell back to another device, or to another precision.
        """

    @abstractmethod
    def load(self, path: Path, settings: EngineSettings) -> Engine:
        """Return an engine from a file that `Engine.save` or the vendor's tools wrote.

        Raises:
            BuildError: not such a file, or it does not run here.
        """


def input_dtypes(model: onnx.ModelProto) -> dict[str, "np.dtype[Any]"]:
    """Return the dtype of every input that is fed, by name."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return {
        value.name: onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        for value in model.graph.input
        if value.name not in constants
    }


def input_shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Return the shape of every input that is fed, by name; initializers listed as inputs are not.

    Raises:
        ModelError: a size is left open. Engines are built for one size.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    shapes = {}
    for value in model.graph.input:
        if value.name in constants:
            continue
        shape = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
        if any(size <= 0 for size in shape):
            raise ModelError(
                f"Input {value.name!r} has an open size in its shape {shape}. "
                "Export the model with fixed sizes, batch included."
            )
        shapes[value.name] = shape
    return shapes

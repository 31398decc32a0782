"""What Espalier asks of a runtime: build an engine, run it, and tell where the time went."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

Array = npt.NDArray[Any]  # inputs and outputs have the dtype that the model declares
Feeds = Mapping[str, Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How an engine is built. Two measurements compare only under equal settings."""

    precision: str = "fp32"  # "fp32" | "bf16" | "fp16" | "int8"
    threads: int = 1


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

    def random_feeds(self, seed: int = 0) -> dict[str, Array]:
        """Return standard-normal inputs of the right shapes: never zeros, which can run faster."""
        generator = np.random.default_rng(seed)
        return {
            name: generator.standard_normal(shape, dtype=np.float32)
            for name, shape in self.inputs.items()
        }


class Runtime(ABC):
    """A vendor's software behind one small interface; vendor errors are translated here."""

    name: str

    @abstractmethod
    def missing(self) -> str | None:
        """Return None where the runtime can run here, else why not and what to install."""

    @abstractmethod
    def version(self) -> str:
        """Return the vendor's version."""

    @abstractmethod
    def device(self) -> str:
        """Return what it runs on here, in words (\"CPU: AMD EPYC\")."""

    @abstractmethod
    def build(
        self, model: onnx.ModelProto, settings: EngineSettings, *, profile: bool = False
    ) -> Engine:
        """Build an engine; with `profile`, one whose `node_times` answers.

        Raises:
            BuildError: the runtime refused, fell back to another device, or chose another precision.
        """

    @abstractmethod
    def load(self, path: Path, settings: EngineSettings) -> Engine:
        """Return an engine from a file that `Engine.save` or the vendor's tools wrote.

        Raises:
            BuildError: not such a file, or it does not run here.
        """

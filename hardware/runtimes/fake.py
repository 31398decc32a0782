"""An imagined device whose every time is arithmetic: a staircase to test planning against.

Outputs are real (ONNX's reference evaluator); times are simulated and never waited for. Like a real
runtime it pads widths to a tile, fuses element-wise tails, pays for every executed node, and takes
a little longer end to end than the sum of its nodes.
"""

from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from hardware.disturbance import Counters
from hardware.errors import BuildError, ModelError, RunError
from hardware.graph.operators import PIXELWISE
from hardware.records import write_whole
from hardware.runtimes.base import (
    Array,
    Engine,
    EngineSettings,
    Feeds,
    NodeTime,
    Runtime,
    input_dtypes,
    input_shapes,
)
from hardware.timing import Timer

FILE = "model.fake.onnx"


@dataclass(frozen=True, slots=True, kw_only=True)
class Staircase:
    """What the imagined device is like."""

    in_tile: int = 8  # input channels are padded to a multiple of this
    out_tile: int = 16
    node_us: float = 2.0  # every executed node pays this, whatever its width
    us_per_mac: float = 1e-4  # of the padded widths
    us_per_element: float = 1e-3  # of the output of nodes without weights
    outside_us: float = 5.0  # per inference, outside of every node
    profiler_us: float = 0.0  # added to every node while profiling
    noise: float = 0.0  # relative standard deviation of every time
    seed: int = 0


class FakeEngine(Engine):
    """A model on the imagined device."""

    def __init__(
        self, model: onnx.ModelProto, stairs: Staircase, threads: int, profile: bool
    ) -> None:
        self.model = model
        self.inputs = input_shapes(model)
        self.dtypes = input_dtypes(model)
        self.precision = "fp32"
        self.stairs, self.threads, self.profile = stairs, threads, profile
        self.costs = _costs(model, stairs, threads)
        self.generator = np.random.default_rng(stairs.seed)
        self.evaluator: ReferenceEvaluator | None = None

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Return the reference evaluator's outputs; slow, so only for small networks."""
        self.check(feeds)
        if self.evaluator is None:
            self.evaluator = ReferenceEvaluator(self.model)
        names = [output.name for output in self.model.graph.output]
        return dict(zip(names, self.evaluator.run(names, dict(feeds)), strict=True))

    def timer(self, feeds: Feeds) -> Timer:
        """Return a timer that answers at once with the simulated time."""
        self.check(feeds)
        cost_us = self.stairs.outside_us + sum(cost.time_us for cost in self.costs)

        def milliseconds(calls: int) -> float:
            return cost_us * sum(self._noise() for _ in range(calls)) / calls / 1e3

        return milliseconds

    def node_times(self, feeds: Feeds, runs: int) -> tuple[NodeTime, ...]:
        """Return the simulated time of every node, with noise like `runs` inferences have."""
        if not self.profile:
            raise RunError("This engine was built without profiling; build it with profile=True.")
        self.check(feeds)
        return tuple(
            NodeTime(
                name=cost.name,
                operator=cost.operator,
                nodes=cost.nodes,
                time_us=(cost.time_us + self.stairs.profiler_us)
                * float(np.median([self._noise() for _ in range(runs)])),
            )
            for cost in self.costs
        )

    def save(self, folder: Path) -> Path:
        """Write the model; the imagined device has no format of its own."""
        path = folder / FILE
        write_whole(path, self.model.SerializeToString())
        return path

    def _noise(self) -> float:
        """Return what one time is multiplied by."""
        noise = self.stairs.noise
        return float(np.exp(self.generator.normal(0.0, noise))) if noise else 1.0


class FakeRuntime(Runtime):
    """The imagined device. `FakeRuntime(noise=0.02)` and the like make others."""

    name = "fake"

    def __init__(self, **properties: float) -> None:
        self.stairs = Staircase(**properties)  # type: ignore[arg-type]  # integers are floats too

    def precisions(self) -> tuple[str, ...]:
        """Return the only one there is."""
        return ("fp32",)

    def missing(self) -> str | None:
        """Return None: it needs nothing."""
        return None

    def version(self) -> str:
        """Return the version of the arithmetic below."""
        return "1"

    def device(self) -> str:
        """Say what it runs on."""
        return "imagined staircase"

    def counters(self) -> Counters:
        """Return zeros: nobody else uses the imagined device."""
        return Counters()

    def build(
        self, model: onnx.ModelProto, settings: EngineSettings, *, profile: bool = False
    ) -> FakeEngine:
        """Return the engine; raises BuildError as a real runtime would."""
        self.check_precision(settings.precision)
        try:
            onnx.checker.check_model(model)
            inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
            return FakeEngine(inferred, self.stairs, settings.threads, profile)
        except (
            onnx.checker.ValidationError,
            onnx.shape_inference.InferenceError,
            ModelError,
        ) as error:
            raise BuildError(f"The fake runtime cannot build this model: {error}") from error

    def load(self, path: Path, settings: EngineSettings) -> FakeEngine:
        """Return the engine that `save` wrote."""
        try:
            model = onnx.load(path)
        except Exception as error:  # protobuf's own errors share no public base class
            raise BuildError(f"{path} is not an ONNX file that can be read: {error}") from error
        return self.build(model, settings)


def _costs(model: onnx.ModelProto, stairs: Staircase, threads: int) -> tuple[NodeTime, ...]:
    """Return the cost, without noise, of every executed node, tails fused, in graph order."""
    shapes = _shapes(model)
    readers: dict[str, int] = {}
    for node in model.graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    executed: list[tuple[onnx.NodeProto, list[str]]] = []
    made_by: dict[str, int] = {}  # value -> index into `executed`
    for node in model.graph.node:
        if node.op_type == "Constant":
            continue
        # Pixelwise nodes are fused into the node that computes their input, as real runtimes do.
        # A residual Add joins the branch that was computed last, whose result nobody else reads.
        hosts = [made_by[n] for n in node.input if n in made_by and readers[n] == 1]
        if node.op_type in PIXELWISE and hosts:
            index = max(hosts)
            executed[index][1].append(node.name)
        else:
            index = len(executed)
            executed.append((node, [node.name]))
        made_by.update(dict.fromkeys(node.output, index))
    return tuple(
        NodeTime(
            name="+".join(names),
            operator=node.op_type,
            nodes=tuple(names),
            time_us=_cost_us(node, shapes, stairs) / threads + stairs.node_us,
        )
        for node, names in executed
    )


def _cost_us(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]], stairs: Staircase) -> float:
    """Return the time of one node beyond the constant: padded multiply-adds, or elements moved."""
    out_shape = shapes.get(node.output[0], ())
    if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in shapes:
        weight = shapes[node.input[1]]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Conv":
            out, per_filter, positions = weight[0], weight[1], prod(weight[2:])
            positions *= out_shape[0] * prod(out_shape[2:])
        else:
            flipped = node.op_type == "Gemm" and attributes.get("transB", 0)
            out, per_filter = (weight[-2], weight[-1]) if flipped else (weight[-1], weight[-2])
            positions = prod(out_shape[:-1])
        padded = ceil(per_filter / stairs.in_tile) * ceil(out / stairs.out_tile)
        return positions * padded * stairs.in_tile * stairs.out_tile * stairs.us_per_mac
    return prod(out_shape) * stairs.us_per_element


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Return the static shape of every value and initializer of an inferred model."""
    graph = model.graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        shapes[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
    return shapes

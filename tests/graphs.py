"""What the tests of channel analysis and carving share: masking and running ONNX graphs."""

import functools
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import numpy_helper

from hardware.channels import ChannelMap, Keep
from pipeline.exporting import export_graph
from pipeline.records import Network
from tests import nets

Array = npt.NDArray[Any]


@functools.cache
def exported(name: str) -> onnx.ModelProto:
    """Return one of the tiny networks as a graph; exported once, a fresh copy each time."""
    return onnx.load_from_string(_exported(name))


@cache
def _exported(name: str) -> bytes:
    network = Network(
        module=nets.build(name), spec=name, arguments={}, input_shape=nets.INPUT_SHAPE
    )
    return export_graph(network).SerializeToString()


def run(model: onnx.ModelProto, seed: int = 0) -> list[Array]:
    """Return what ONNX Runtime computes for a random input, graph optimizations off."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    generator = np.random.default_rng(seed)
    feeds = {
        entry.name: generator.standard_normal(entry.shape).astype(np.float32)
        for entry in session.get_inputs()
    }
    return list(session.run(None, feeds))


def difference(one: list[Array], other: list[Array]) -> float:
    """Return the largest difference, relative to the largest value."""
    return max(
        float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(one, other, strict=True)
    )


def masked(model: onnx.ModelProto, channels: ChannelMap, keep: Keep) -> onnx.ModelProto:
    """Return the whole model with zero in the input columns that read a removed unit."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    weights = {tensor.name: tensor for tensor in copy.graph.initializer}
    for group in channels.groups:
        gone = np.ones(group.width + 1, dtype=bool)
        gone[list(keep.get(group.name, range(group.width)))] = False
        gone[-1] = False
        for part in group.slices:
            if part.role != "input":
                continue
            values = numpy_helper.to_array(weights[part.parameter]).copy()
            places: list[Any] = [slice(None)] * values.ndim
            places[part.axis] = gone[np.array(part.units)]
            values[tuple(places)] = 0
            weights[part.parameter].CopyFrom(numpy_helper.from_array(values, part.parameter))
    return copy


def random_keep(
    channels: ChannelMap, seed: int = 0, share: float = 0.5
) -> dict[str, tuple[int, ...]]:
    """Return a random share of every group, at least one unit."""
    generator = np.random.default_rng(seed)
    return {
        group.name: tuple(
            sorted(
                int(unit)
                for unit in generator.choice(
                    group.width, max(1, int(group.width * share)), replace=False
                )
            )
        )
        for group in channels.prunable
    }


def widths(channels: ChannelMap) -> Mapping[str, int]:
    """Return the width of every group."""
    return {group.name: group.width for group in channels.groups}

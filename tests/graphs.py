"""What the tests of channel analysis and carving share: tiny networks as graphs, run, compared."""

import sys
from collections.abc import Callable, Mapping
from functools import cache
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from hardware.graph.channel_map import ChannelMap
from pipeline.networks.export import export_graph
from pipeline.records import Network
from tests import nets

Array = npt.NDArray[Any]


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


def widths(channels: ChannelMap) -> Mapping[str, int]:
    """Return the width of every group."""
    return {group.name: group.width for group in channels.groups}


def operations(call: Callable[[], object]) -> int:
    """Return how many bytecode instructions a call takes: its work, without a clock."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> object:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count

"""The engines that are benched: residual networks, some of them a little wider than others."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hardware.gate.engines import EngineFile
from hardware.records import Record, write_whole
from hardware.runtimes.base import EngineSettings

BLOCKS, WIDTH = 24, 32


class Build(Record):
    """A network and how it is run."""

    widened: int = 0  # blocks with more channels inside
    more: int = 0  # channels more in each of them
    size_px: int = 14
    threads: int = 1

    def engine_file(self, runtime: str, folder: Path) -> EngineFile:
        """Return the engine; its file is written where it is not there yet."""
        path = folder / f"net-{self.widened}-{self.more}-{self.size_px}.onnx"
        if not path.exists():
            write_whole(path, network(self).SerializeToString())
        return EngineFile(path=path, runtime=runtime, settings=EngineSettings(threads=self.threads))


def network(build: Build) -> onnx.ModelProto:
    """Return residual blocks of two 3x3 convolutions, some of them with more inner channels."""
    generator = np.random.default_rng(0)
    node, kernel, pads = helper.make_node, [3, 3], [1] * 4
    nodes, weights, value = [], [], "input"
    for block in range(BLOCKS):
        inner = WIDTH + (build.more if block < build.widened else 0)
        for part, shape in (("a", (inner, WIDTH, 3, 3)), ("b", (WIDTH, inner, 3, 3))):
            values = generator.standard_normal(shape) * (shape[1] * 9) ** -0.5 / 2
            weights.append(numpy_helper.from_array(values.astype(np.float32), f"{part}{block}"))
        nodes += [
            node("Conv", [value, f"a{block}"], [f"c{block}"], kernel_shape=kernel, pads=pads),
            node("Relu", [f"c{block}"], [f"r{block}"]),
            node("Conv", [f"r{block}", f"b{block}"], [f"d{block}"], kernel_shape=kernel, pads=pads),
            node("Add", [f"d{block}", value], [f"s{block}"]),
        ]
        value = f"s{block}"
    sizes = [1, WIDTH, build.size_px, build.size_px]
    graph = helper.make_graph(
        nodes,
        "gate",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, sizes)],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, sizes)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)

"""Small random networks, built node by node in float64, for the laws of the channel analysis."""

from dataclasses import dataclass, field

import numpy as np
import onnx
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

SIZE = 4  # pixels, both ways


@dataclass
class Layer:
    """A node that makes new channels: its weight, and which axes make and read."""

    node: str
    weight: str
    source: str
    output: str
    makes: int = 0
    reads: int = 1
    groups: int = 1
    followers: list[str] = field(default_factory=list)  # parameters with one position per filter


@dataclass
class Drawn:
    """A network and what its builder knows of it."""

    model: onnx.ModelProto
    blocks: list[str]
    layers: list[Layer]
    followers: list[tuple[str, str]]  # a parameter with one position per channel of a value
    grids: list[str]  # values of shape (1, groups, channels, height, width)


class Builder:
    """Adds blocks to a chain; every block takes a value and its channels and returns the next."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.layers: list[Layer] = []
        self.followers: list[tuple[str, str]] = []
        self.grids: list[str] = []

    def node(self, kind: str, inputs: list[str], outputs: int = 1, **options: object) -> str:
        name = f"n{len(self.nodes)}"
        names = [name] if outputs == 1 else [f"{name}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name, **options))
        return names[0]

    def floats(self, shape: tuple[int, ...], kind: str = "weight") -> str:
        return self.constant(self.random.standard_normal(shape), kind)

    def constant(self, values: NDArray, kind: str) -> str:
        name = f"p{len(self.tensors)}.{kind}"
        self.tensors.append(numpy_helper.from_array(values, name))
        return name

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, dtype=np.int64), "sizes")

    def apply(
        self,
        kind: str,
        value: str,
        weight: str,
        computed: str | None = None,
        followers: tuple[str, ...] = (),
        bias: str | None = None,
        **options: object,
    ) -> str:
        """Add a layer; `computed` is what the node reads where it is not the weight itself."""
        inputs = [value, computed or weight, *([bias] if bias else [])]
        output = self.node(kind, inputs, **options)
        layer = Layer(output, weight, value, output, followers=list(followers))
        layer.groups = int(options.get("group", 1))  # type: ignore[call-overload]
        if kind == "ConvTranspose":
            layer.makes, layer.reads = 1, 0
        if bias:
            layer.followers.append(bias)
        self.layers.append(layer)
        return output

    def conv(self, x: str, inputs: int, outputs: int, kernel: int = 1, groups: int = 1) -> str:
        weight = self.floats((outputs, inputs // groups, kernel, kernel))
        bias = self.floats((outputs,), "bias") if outputs % 4 == 0 else None
        pads = [kernel // 2] * 4
        return self.apply("Conv", x, weight, bias=bias, pads=pads, group=groups)

    # Blocks: (value, channels) -> (value, channels)

    def plain(self, x: str, c: int) -> tuple[str, int]:
        return self.node("Relu", [self.conv(x, c, 6, kernel=3)]), 6

    def normed(self, x: str, c: int) -> tuple[str, int]:
        made = self.conv(x, c, 4)
        parameters = [self.floats((4,), kind) for kind in ("scale", "shift", "mean")]
        parameters.append(self.constant(self.random.uniform(0.5, 2, 4), "var"))
        y = self.node("BatchNormalization", [made, *parameters])
        self.followers += [(name, y) for name in parameters]
        return self.node("Relu", [y]), 4

    def residual(self, x: str, c: int) -> tuple[str, int]:
        inner = self.node("Relu", [self.conv(x, c, 5)])
        return self.node("Add", [x, self.conv(inner, 5, c)]), c

    def dense(self, x: str, c: int) -> tuple[str, int]:
        return self.node("Concat", [x, self.conv(x, c, 4)], axis=1), c + 4

    def split(self, x: str, c: int) -> tuple[str, int]:
        left = c // 2
        first = self.node("Split", [x, self.integers(left, c - left)], 2, axis=1)
        second = first.replace("_0", "_1")
        return self.node("Concat", [self.conv(first, left, 4), second], axis=1), 4 + c - left

    def halves(self, x: str, c: int) -> tuple[str, int]:
        left = self.node("Slice", [x, self.integers(0), self.integers(c // 2), self.integers(1)])
        bounds = (self.integers(c // 2), self.integers(c // 2 * 2), self.integers(1))
        return self.node("Mul", [left, self.node("Slice", [x, *bounds])]), c // 2

    def shuffle(self, x: str, c: int) -> tuple[str, int]:
        sizes = self.integers(1, 2, c // 2, SIZE, SIZE)
        grid = self.node("Reshape", [x, sizes])
        self.grids.append(grid)
        turned = self.node("Transpose", [grid], perm=[0, 2, 1, 3, 4])
        return self.node("Reshape", [turned, self.integers(1, -1, SIZE, SIZE)]), c

    def grouped(self, x: str, c: int) -> tuple[str, int]:
        return self.node("Relu", [self.conv(x, c, 6, kernel=3, groups=2)]), 6

    def depthwise(self, x: str, c: int) -> tuple[str, int]:
        weight = self.floats((c, 1, 3, 3))
        y = self.node("Conv", [x, weight], pads=[1, 1, 1, 1], group=c)
        self.followers.append((weight, y))
        return y, c

    def gate(self, x: str, c: int) -> tuple[str, int]:
        mean = self.node("ReduceMean", [x, self.integers(2, 3)], keepdims=1)
        inner = self.node("Relu", [self.conv(mean, c, 3)])
        weights = self.node("Sigmoid", [self.conv(inner, 3, c)])
        return self.node("Mul", [x, weights]), c

    def slopes(self, x: str, c: int) -> tuple[str, int]:
        slope = self.floats((c, 1, 1))
        y = self.node("PRelu", [x, slope])
        self.followers.append((slope, y))
        return y, c

    def scaled(self, x: str, c: int) -> tuple[str, int]:
        weight, gain = self.floats((4, c, 1, 1)), self.floats((4, 1, 1, 1), "gain")
        computed = self.node("Mul", [weight, gain])
        return self.apply("Conv", x, weight, computed, followers=(gain,)), 4

    def summed(self, x: str, c: int) -> tuple[str, int]:
        one, other = self.floats((4, c, 1, 1)), self.floats((4, c, 1, 1))
        return self.apply("Conv", x, one, self.node("Add", [one, other]), followers=(other,)), 4

    def standardised(self, x: str, c: int) -> tuple[str, int]:
        weight = self.floats((4, c, 3, 3))
        mean = self.node("ReduceMean", [weight, self.integers(1, 2, 3)], keepdims=1)
        computed = self.node("Sub", [weight, mean])
        return self.apply("Conv", x, weight, computed, pads=[1, 1, 1, 1]), 4

    def transposed(self, x: str, c: int) -> tuple[str, int]:
        return self.apply("ConvTranspose", x, self.floats((c, 4, 1, 1))), 4

    def pixels(self, x: str, c: int) -> tuple[str, int]:
        large = self.node("DepthToSpace", [self.conv(x, c, 12)], blocksize=2)
        return self.node("AveragePool", [large], kernel_shape=[2, 2], strides=[2, 2]), 3

    def tied(self, x: str, c: int) -> tuple[str, int]:
        weight = self.floats((c, c, 1, 1))
        return self.apply("Conv", self.apply("Conv", x, weight), weight), c

    def finished(self, x: str, c: int, is_flat: bool) -> onnx.ModelProto:
        """Return the network with a linear layer at its end, over pixels or their mean."""
        if is_flat:
            x, c = self.node("Reshape", [x, self.integers(1, -1)]), c * SIZE**2
        else:
            mean = self.node("ReduceMean", [x, self.integers(2, 3)], keepdims=0)
            x = mean
        last = self.apply("Gemm", x, self.floats((3, c)), transB=1)
        graph = helper.make_graph(
            self.nodes,
            "drawn",
            [helper.make_tensor_value_info("input", TensorProto.DOUBLE, [1, 3, SIZE, SIZE])],
            [helper.make_tensor_value_info(last, TensorProto.DOUBLE, [1, 3])],
            self.tensors,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        onnx.checker.check_model(model, full_check=True)
        return model


BLOCKS = (
    *("plain", "normed", "residual", "dense", "split", "halves", "shuffle", "grouped"),
    *("depthwise", "gate", "slopes", "scaled", "summed", "standardised", "transposed"),
    *("pixels", "tied"),
)
EVEN = {"shuffle", "grouped"}  # need an even number of channels
FOUR = {"split", "halves"}  # need pieces of at least two channels


def build(blocks: list[str], width: int, is_flat: bool, seed: int) -> Drawn:
    """Return a chain of blocks behind one convolution; blocks that do not fit are left out."""
    builder = Builder(seed)
    x, c = builder.conv("input", 3, width), width
    used = []
    for block in blocks:
        if (block in EVEN and (c % 2 or c < 4)) or (block in FOUR and c < 4):
            continue
        x, c = getattr(builder, block)(x, c)
        used.append(block)
    model = builder.finished(x, c, is_flat)
    return Drawn(model, used, builder.layers, builder.followers, builder.grids)


drawn_networks = st.builds(
    build,
    st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=5),
    st.sampled_from([4, 6, 8]),
    st.booleans(),
    st.integers(0, 1000),
)

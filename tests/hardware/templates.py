"""Small ONNX templates with channel maps written by hand, for tests of the device's side."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hardware.graph.channel_map import Branch, ChannelMap, Group, ParameterSlice


class Builder:
    """Collects nodes and weights of a graph with one input, `(1, 3, size, size)`."""

    def __init__(self, size: int = 16) -> None:
        self.size = size
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.slices: dict[str, list[ParameterSlice]] = {}
        self.widths: dict[str, int] = {}
        self.random = np.random.default_rng(0)

    def add(self, operator: str, inputs: list[str], name: str, **attributes: object) -> str:
        node = helper.make_node(operator, inputs, [f"{name}_out"], name=name, **attributes)
        self.nodes.append(node)
        return f"{name}_out"

    def weight(self, name: str, *shape: int) -> str:
        values = self.random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        self.weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def cut(self, group: str, width: int, parameter: str, axis: int, role: str, each=1) -> None:
        self.widths[group] = width
        units = tuple(unit for unit in range(width) for _ in range(each))
        cut = ParameterSlice(parameter=parameter, axis=axis, role=role, units=units)
        self.slices.setdefault(group, []).append(cut)

    def conv(
        self,
        value: str,
        name: str,
        into: tuple[str | None, int],
        out: tuple[str | None, int],
        stride: int = 1,
        kernel: int = 3,
    ) -> str:
        weight = self.weight(f"{name}.weight", out[1], into[1], kernel, kernel)
        bias = self.weight(f"{name}.bias", out[1])
        if into[0]:
            self.cut(into[0], into[1], weight, 1, "input")
        if out[0]:
            self.cut(out[0], out[1], weight, 0, "filter")
            self.cut(out[0], out[1], bias, 0, "bias")
        pads = [kernel // 2] * 4
        shape = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": pads}
        return self.add("Conv", [value, weight, bias], name, **shape)

    def finish(self, output: str, branches: tuple[Branch, ...] = (), version: int = 18):
        inputs = [
            helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, self.size, self.size])
        ]
        outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)]
        graph = helper.make_graph(self.nodes, "template", inputs, outputs, self.weights)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", version)], ir_version=10
        )
        groups = tuple(
            Group(name=name, width=self.widths[name], slices=tuple(slices))
            for name, slices in self.slices.items()
        )
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
        return model, ChannelMap(groups=groups, branches=branches)


def residual(size: int = 16, blocks: int = 2):
    """Stem, residual blocks (each can be emptied), a strided convolution, pooling, Gemm."""
    b = Builder(size)
    stream, branches = ("stream", 32), []
    value = b.add("Relu", [b.conv("input", "stem", (None, 3), stream)], "stem_relu")
    for i in range(blocks):
        n, inner = f"block{i}", (f"inner{i}", 32)
        y = b.add("Relu", [b.conv(value, f"{n}.a", stream, inner)], f"{n}.a_relu")
        y = b.conv(y, f"{n}.b", inner, stream)
        value = b.add("Relu", [b.add("Add", [y, value], f"{n}.add")], f"{n}.relu")
        branches.append(
            Branch(
                name=n,
                groups=(inner[0],),
                layers=(f"{n}.a", f"{n}.a_relu", f"{n}.b"),
                join=f"{n}.add",
                parameters=tuple(f"{n}.{p}.{q}" for p in "ab" for q in ("weight", "bias")),
            )
        )
    value = b.add("Relu", [b.conv(value, "down", stream, ("wide", 64), stride=2)], "down_relu")
    value = b.add("GlobalAveragePool", [value], "pool")
    value = b.add("Flatten", [value], "flat")
    weight, bias = b.weight("fc.weight", 10, 64), b.weight("fc.bias", 10)
    b.cut("wide", 64, weight, 1, "input")
    value = b.add("Gemm", [value, weight, bias], "fc", transB=1)
    return b.finish(value, tuple(branches))


def joined(size: int = 8):
    """Three convolutions side by side, concatenated, and one that reads all of them."""
    b = Builder(size)
    sides = [b.conv("input", f"side{i}", (None, 3), (f"side{i}", 16)) for i in range(3)]
    value = b.add("Concat", sides, "concat", axis=1)
    weight, bias = b.weight("reader.weight", 32, 48, 1, 1), b.weight("reader.bias", 32)
    for i in range(3):
        units = tuple(p - 16 * i if p // 16 == i else -1 for p in range(48))
        cut = ParameterSlice(parameter=weight, axis=1, role="input", units=units)
        b.slices[f"side{i}"].append(cut)
    b.cut("read", 32, weight, 0, "filter")
    b.cut("read", 32, bias, 0, "bias")
    value = b.add("Conv", [value, weight, bias], "reader", kernel_shape=[1, 1])
    value = b.conv(value, "last", ("read", 32), (None, 4), kernel=1)
    return b.finish(value)


def shuffled(size: int = 8):
    """Convolution, channel shuffle by two, a depthwise convolution that nothing may narrow."""
    b = Builder(size)
    value = b.conv("input", "point", (None, 3), ("wide", 16), kernel=1)
    for name, shape in {"apart": (1, 2, 8, size, size), "together": (1, 16, size, size)}.items():
        b.weights.append(numpy_helper.from_array(np.array(shape, np.int64), f"{name}.shape"))
        value = b.add("Reshape", [value, f"{name}.shape"], name)
        if name == "apart":
            value = b.add("Transpose", [value], "swap", perm=[0, 2, 1, 3, 4])
    weight, bias = b.weight("depth.weight", 16, 1, 3, 3), b.weight("depth.bias", 16)
    return b.finish(b.add("Conv", [value, weight, bias], "depth", group=16, pads=[1] * 4))


def depthwise(size: int = 8):
    """Pointwise, depthwise, squeeze-and-excite's multiplication, flatten into a Gemm."""
    b = Builder(size)
    value = b.conv("input", "point", (None, 3), ("wide", 16), kernel=1)
    weight, bias = b.weight("depth.weight", 16, 1, 3, 3), b.weight("depth.bias", 16)
    b.cut("wide", 16, weight, 0, "depthwise")
    b.cut("wide", 16, bias, 0, "bias")
    value = b.add("Conv", [value, weight, bias], "depth", group=16, pads=[1] * 4)
    gate = b.add("GlobalAveragePool", [value], "squeeze")
    gate = b.conv(gate, "excite", ("wide", 16), ("wide", 16), kernel=1)
    gate = b.add("Sigmoid", [gate], "gate")
    value = b.add("Mul", [value, gate], "scale")
    value = b.add("Flatten", [value], "flat")
    weight, bias = b.weight("fc.weight", 10, 16 * size * size), b.weight("fc.bias", 10)
    b.cut("wide", 16, weight, 1, "input", each=size * size)
    return b.finish(b.add("Gemm", [value, weight, bias], "fc", transB=1))


def sizes(b: Builder, name: str, *numbers: int) -> str:
    b.weights.append(numpy_helper.from_array(np.array(numbers, np.int64), name))
    return name


def _linear(b: Builder, value: str, name: str, into: tuple[str, int], out: tuple[str, int]) -> str:
    """A linear layer over the last axis, as exporters write it: a product and an addition."""
    weight, bias = b.weight(f"{name}.weight", into[1], out[1]), b.weight(f"{name}.bias", out[1])
    b.cut(*into, weight, 0, "input")
    b.cut(*out, weight, 1, "filter")
    b.cut(*out, bias, 0, "bias")
    return b.add("Add", [b.add("MatMul", [value, weight], name), bias], f"{name}_add")


def _layer_norm(b: Builder, value: str, name: str, of: tuple[str, int]) -> str:
    scale = b.weight(f"{name}.weight", of[1])
    b.cut(*of, scale, 0, "norm")
    return b.add("LayerNormalization", [value, scale], name, axis=-1)


def _mlp(b: Builder, value: str, of: tuple[str, int]) -> str:
    inner = ("inner", 4 * of[1])
    value = _linear(b, value, "fc1", of, inner)
    value = b.add("Mul", [value, b.add("Erf", [value], "erf")], "gelu")
    return _linear(b, value, "fc2", inner, of)


def convnext(width: int = 96, size: int = 7):
    """ConvNeXt's block: depthwise, then a layer norm and linear layers with channels last."""
    b, of = Builder(size), ("stream", width)
    stem = b.conv("input", "stem", (None, 3), of, kernel=1)
    weight = b.weight("depth.weight", width, 1, 7, 7)
    b.cut(*of, weight, 0, "depthwise")
    value = b.add("Conv", [stem, weight], "depth", group=width, pads=[3] * 4)
    value = b.add("Transpose", [value], "to_last", perm=[0, 2, 3, 1])
    value = _mlp(b, _layer_norm(b, value, "norm", of), of)
    value = b.add("Transpose", [value], "to_first", perm=[0, 3, 1, 2])
    return b.finish(b.add("Add", [value, stem], "join"))


def transformer(width: int = 16, size: int = 6):
    """A vision transformer's block on 9 tokens in 2 heads, then the mean over tokens."""
    b, of, heads = Builder(size), ("stream", width), ("heads", width)
    weight = b.weight("patch.weight", width, 3, 2, 2)
    b.cut(*of, weight, 0, "filter")
    value = b.add("Conv", ["input", weight], "patch", strides=[2, 2])
    value = b.add("Reshape", [value, sizes(b, "tokens", 1, width, 9)], "tokens")
    tokens = b.add("Transpose", [value], "to_last", perm=[0, 2, 1])
    value = _layer_norm(b, tokens, "norm1", of)
    split = sizes(b, "split", 1, 9, 2, width // 2)
    sides = []
    for name, order in {"q": [0, 2, 1, 3], "k": [0, 2, 3, 1], "v": [0, 2, 1, 3]}.items():
        side = _linear(b, value, name, of, (name, width))
        side = b.add("Reshape", [side, split], f"{name}_split")
        sides.append(b.add("Transpose", [side], f"{name}_heads", perm=order))
    value = b.add("Softmax", [b.add("MatMul", sides[:2], "scores")], "softmax", axis=-1)
    value = b.add("MatMul", [value, sides[2]], "mixed")
    value = b.add("Transpose", [value], "merge", perm=[0, 2, 1, 3])
    value = b.add("Reshape", [value, sizes(b, "merged", 1, 9, width)], "merged")
    value = b.add("Add", [tokens, _linear(b, value, "project", heads, of)], "join1")
    value = b.add("Add", [value, _mlp(b, _layer_norm(b, value, "norm2", of), of)], "join2")
    mean = b.add("ReduceMean", [value, sizes(b, "axes", 1)], "mean", keepdims=0)
    weight = b.weight("head.weight", 10, width)
    b.cut(*of, weight, 1, "input")
    return b.finish(b.add("Gemm", [mean, weight], "head", transB=1))

"""What an ONNX file does not say: which tensors are parameters, and what layers are called."""

import math

import onnx
from onnx import NodeProto, TensorProto

from hardware.graph.model import initializers
from hardware.graph.operators import BIASED_PRODUCTS, PRODUCTS
from pipeline.networks.graphform.layers import BATCH_NORM_INPUTS
from pipeline.networks.graphform.module import Roles

FLOATING = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
# Operators whose inputs behind the first are parameters.
WEIGHTED = PRODUCTS | {
    *("GroupNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization"),
    "PRelu",
}


def find_roles(graph: onnx.ModelProto) -> Roles:
    """Return which initializers of a simplified graph are trained, and which are statistics."""
    floating = {
        name: math.prod(tensor.dims)
        for name, tensor in initializers(graph).items()
        if tensor.data_type in FLOATING
    }
    makers = {name: node for node in graph.graph.node for name in node.output}
    buffers: dict[str, None] = {}
    trained: dict[str, None] = {}
    for node in graph.graph.node:
        if node.op_type == "BatchNormalization":
            buffers.update(dict.fromkeys(node.input[3:5]))
            trained.update(dict.fromkeys(node.input[1:3]))
        elif node.op_type in WEIGHTED:
            for name in node.input[1:]:
                trained.update(dict.fromkeys(_sources(name, makers, floating)))
        trained.update(dict.fromkeys(name for name in node.input if _is_path(name)))
    return Roles(
        parameters=tuple(name for name in trained if name in floating and name not in buffers),
        buffers=tuple(name for name in buffers if name in floating),
    )


def _is_path(name: str) -> bool:
    """Return whether torch would call a parameter so: "block.0.gamma"."""
    return "." in name and all(part.isidentifier() or part.isdigit() for part in name.split("."))


def _sources(name: str, makers: dict[str, NodeProto], floating: dict[str, int]) -> list[str]:
    """Return the tensors that a weight is computed from; none where images take part."""
    found: list[str] = []
    pending, seen = [name], {name}
    while pending:
        value = pending.pop()
        if floating.get(value, 0) > 1:
            found.append(value)
        elif value in makers:
            new = [source for source in makers[value].input if source and source not in seen]
            seen.update(new)
            pending += new
    read = {source for value in seen if value in makers for source in makers[value].input}
    return (
        found if all(v in makers or v in floating or v not in read or not v for v in seen) else []
    )


def name_parameters(graph: onnx.ModelProto) -> None:
    """Call the parameters of every layer "path.weight", "path.bias", ... in place.

    Names that are so already stay. Others are called after their node; a tensor that several nodes
    read keeps its name.
    """
    tensors = initializers(graph)
    readers: dict[str, int] = {}
    for node in graph.graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    taken = set(tensors) | set(readers)
    for node in graph.graph.node:
        parts = BATCH_NORM_INPUTS if node.op_type == "BatchNormalization" else ("weight", "bias")
        names = list(node.input[1:])
        if node.op_type not in BIASED_PRODUCTS | {"BatchNormalization"}:
            continue
        path = names[0].rpartition(".")[0]
        fits = [f"{path}.{part}" for part in parts[: len(names)]] == names and path
        if fits or any(name not in tensors or readers[name] > 1 for name in names):
            continue
        path = _path(node.name)
        new = [f"{path}.{part}" for part in parts[: len(names)]]
        if taken.intersection(new):
            continue
        taken.update(new)
        for place, (old, name) in enumerate(zip(names, new, strict=True)):
            tensors[old].name = name
            node.input[place + 1] = name


def _path(name: str) -> str:
    """Return a node's name as a path of modules: "/layer1/conv1/Conv" is "layer1.conv1.Conv"."""
    parts = [part for part in name.replace("::", "_").replace("/", ".").split(".") if part]
    return ".".join(parts) or "layer"

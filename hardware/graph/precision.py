"""Precision written into the ONNX: what strongly typed runtimes build is what the file says."""

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from hardware.errors import BuildError
from hardware.graph.model import to_array

# Inputs that are float32 by the operator's definition, whatever its data is.
ALWAYS_FP32 = {"Resize": (1, 2), "Upsample": (1,)}
LARGEST_FP16 = float(np.finfo(np.float16).max)


def as_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with float16 weights and activations; inputs and outputs stay float32.

    Every node keeps its name. A cast behind each input and one before each output are new.

    Raises:
        BuildError: a weight is too large for float16.
    """
    half = onnx.ModelProto()
    half.CopyFrom(model)
    graph = half.graph
    fixed = {
        node.input[index]
        for node in graph.node
        for index in ALWAYS_FP32.get(node.op_type, ())
        if index < len(node.input)
    }
    for tensor in graph.initializer:
        if tensor.name not in fixed:
            _halve(tensor)
    for node in graph.node:
        if not fixed & set(node.output):
            _halve_attributes(node)
    del graph.value_info[:]  # said float32
    _cast_ends(graph)
    return onnx.shape_inference.infer_shapes(half)


def _halve(tensor: TensorProto) -> None:
    """Turn a float32 tensor into a float16 one, in place; others are left alone."""
    if tensor.data_type != TensorProto.FLOAT:
        return
    values = to_array(tensor)
    if values.size and float(np.abs(values[np.isfinite(values)]).max(initial=0.0)) > LARGEST_FP16:
        raise BuildError(
            f"{tensor.name} holds values beyond {LARGEST_FP16:g}, the largest of float16. "
            "Build in fp32."
        )
    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), tensor.name))


def _halve_attributes(node: NodeProto) -> None:
    """Turn a node's constants and the types that it casts to into float16, in place."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.TENSOR:
            _halve(attribute.t)
        elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16


def _cast_ends(graph: onnx.GraphProto) -> None:
    """Put a cast behind every float32 input and before every float32 output, in place."""
    weights = {tensor.name for tensor in graph.initializer}
    before, after = [], []
    renamed = {}
    for value in graph.input:
        if value.name not in weights and value.type.tensor_type.elem_type == TensorProto.FLOAT:
            renamed[value.name] = f"{value.name}_fp16"
            before.append(_cast(value.name, renamed[value.name], TensorProto.FLOAT16))
    made = {}
    for value in graph.output:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            made[value.name] = f"{value.name}_fp16"
            after.append(_cast(made[value.name], value.name, TensorProto.FLOAT))
    names = renamed | made
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [made.get(name, name) for name in node.output]
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)


def _cast(source: str, target: str, kind: int) -> NodeProto:
    """Return a node that casts one value into another of this element type."""
    return helper.make_node("Cast", [source], [target], name=f"{target}_cast", to=kind)

"""Fold batch norms into layers and drop nodes that do nothing; layers keep their names."""

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from hardware.errors import ModelError
from hardware.graph.model import (
    attributes,
    drop_dead,
    element_types,
    initializers,
    readers_of,
    rewire,
    shapes,
    to_array,
    uses,
)
from hardware.graph.operators import BIASED_PRODUCTS, MOVEMENTS, VIEWS, is_standard
from pipeline.networks.simplify import simplify

Array = npt.NDArray[Any]


def fold_norms(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph as a runtime should see it: what devices carve, and what is delivered.

    A batch norm behind a convolution, a transposed convolution or a Gemm goes into that layer. The
    layer keeps its name and its weight's name; its output takes the batch norm's name, and its bias
    is called like the batch norm's. The batch norm stays where another node reads the layer too,
    and where its parameters have another reader. Identity, Dropout, Casts to the same type and
    additions of constant zeros (what is left of an emptied branch) are dropped. Weights that are
    computed from parameters alone are computed once.
    """
    folded = simplify(graph)
    _drop_idle(folded)
    _bake_weights(folded)
    _fold_all(folded)
    drop_dead(folded)
    return folded


def _drop_idle(model: onnx.ModelProto) -> None:
    """Drop the operators that hand one input through, in place."""
    types, known, zeros = element_types(model), shapes(model), _constant_zeros(model)
    outputs = {output.name for output in model.graph.output}
    renamed: dict[str, str] = {}
    kept: list[NodeProto] = []
    for node in model.graph.node:
        source = str(node.input[0]) if _is_idle(node, types, known) else None
        if node.op_type == "Add":
            source = _beside_zeros(node, zeros, known)
        if source is not None and node.output[0] not in outputs:
            renamed[node.output[0]] = source
        else:
            kept.append(node)
    if not renamed:
        return
    copies = [NodeProto.FromString(node.SerializeToString()) for node in kept]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    rewire(model, renamed)


def _constant_zeros(model: onnx.ModelProto) -> set[str]:
    """Return the values that are zero whatever the input: what emptied branches hand on."""
    # A layer's own parameters have a path as their name: a bias that is zero now may be trained.
    zeros = {
        tensor.name
        for tensor in model.graph.initializer
        if "." not in tensor.name and tensor.dims and not to_array(tensor).any()
    }
    for node in model.graph.node:
        hands_on = node.op_type in VIEWS | {"Transpose"}
        if (hands_on and node.input[0] in zeros) or (
            node.op_type == "Mul" and zeros.intersection(node.input)
        ):
            zeros.add(node.output[0])
    return zeros


def _beside_zeros(
    node: NodeProto, zeros: set[str], known: dict[str, tuple[int, ...]]
) -> str | None:
    """Return what an addition adds zeros to; None where it changes a value or a shape."""
    for zero, other in (node.input, node.input[::-1]):
        if zero in zeros and known.get(other) == known.get(node.output[0], ()):
            return str(other)
    return None


def _bake_weights(model: onnx.ModelProto) -> None:
    """Compute once what is computed from parameters alone (standardised weights), in place.

    Only the weights of layers, and only where the result has the axes of one parameter, in order:
    it then takes that parameter's name, so a channel map fits it.
    """
    weights = initializers(model)
    origin: dict[str, set[str]] = {}  # what is computed from parameters -> those parameters
    makers: dict[str, NodeProto] = {}
    for node in model.graph.node:
        inputs = [name for name in node.input if name]
        if inputs and all(name in weights or name in origin for name in inputs):
            if node.op_type in MOVEMENTS or not is_standard(node):
                continue  # axes may be exchanged
            for name in node.output:
                origin[name] = set().union(*(origin.get(i, {i}) for i in inputs))
                makers[name] = node
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    values: dict[str, Array] = {}
    readers = readers_of(model)
    for node in model.graph.node:
        if node.op_type not in BIASED_PRODUCTS or node.input[1] not in origin:
            continue
        result = _computed(node.input[1], makers, weights, values, opsets)
        names = [n for n in origin[node.input[1]] if tuple(weights[n].dims) == result.shape]
        if len(names) == 1 and _read_within(names[0], node, readers, makers):
            weights[names[0]].CopyFrom(numpy_helper.from_array(result, names[0]))
            node.input[1] = names[0]
    drop_dead(model)


def _read_within(
    parameter: str,
    layer: NodeProto,
    readers: dict[str, list[NodeProto]],
    makers: dict[str, NodeProto],
) -> bool:
    """Return whether a parameter has no effect but through the weight of one layer."""
    waiting, seen = [parameter], {parameter}
    while waiting:
        name = waiting.pop()
        for node in readers.get(name, []):
            if node is layer and name == layer.input[1]:
                continue
            if not node.output or node.output[0] not in makers:
                return False
            fresh = [output for output in node.output if output not in seen]
            seen.update(fresh)
            waiting += fresh
    return True


def _computed(
    name: str,
    makers: dict[str, NodeProto],
    weights: dict[str, TensorProto],
    values: dict[str, Array],
    opsets: dict[str, int],
) -> Array:
    """Return the value of what is computed from parameters alone."""
    if name in weights:
        return to_array(weights[name])
    if name not in values:
        node = makers[name]
        inputs = {n: _computed(n, makers, weights, values, opsets) for n in node.input if n}
        values.update(_evaluate(node, inputs, opsets) or {})
    return values[name]


def _evaluate(
    node: NodeProto, inputs: dict[str, Array], opsets: dict[str, int]
) -> dict[str, Array] | None:
    """Return a node's outputs by ONNX's own reference, None where they are not tensors."""
    try:
        outputs = ReferenceEvaluator(node, opsets=opsets).run(None, inputs)
    except Exception as error:  # the reference raises whatever its numpy code raises
        raise ModelError(
            f"Node {node.name!r} ({node.op_type}) has constant inputs but cannot be computed: "
            f"{error}"
        ) from error
    if not all(isinstance(value, np.ndarray | np.generic) for value in outputs):
        return None
    return {n: np.asarray(v) for n, v in zip(node.output, outputs, strict=False) if n}


def _is_idle(node: NodeProto, types: dict[str, int], known: dict[str, tuple[int, ...]]) -> bool:
    """Return whether a node's first output is its first input."""
    if not is_standard(node) or any(node.output[1:]):
        return False
    if node.op_type == "Identity":
        return True
    if node.op_type == "Dropout":
        return len(node.input) < 3 or not node.input[2]
    if node.op_type == "Cast":
        return bool(types.get(node.input[0]) == attributes(node)["to"])
    if node.op_type == "CastLike":
        first = types.get(node.input[0])
        return first is not None and first == types.get(node.input[1])
    if node.op_type == "Expand":
        before, after = known.get(node.input[0]), known.get(node.output[0])
        return before is not None and before == after
    return False


def _fold_all(model: onnx.ModelProto) -> None:
    """Fold every batch norm that can be folded, in place."""
    weights = initializers(model)
    read = uses(model.graph.node)
    read.update(output.name for output in model.graph.output)
    producer = {name: node for node in model.graph.node for name in node.output}
    dead: set[str] = set()
    for norm in model.graph.node:
        layer = producer.get(norm.input[0]) if norm.op_type == "BatchNormalization" else None
        if layer is None or not _can_fold(layer, norm, weights, read):
            continue
        _fold_one(layer, norm, weights, model)
        layer.output[0] = norm.output[0]
        producer[norm.output[0]] = layer
        dead.add(norm.name)
    for index in range(len(model.graph.node) - 1, -1, -1):
        if model.graph.node[index].name in dead:
            del model.graph.node[index]


def _can_fold(
    layer: NodeProto, norm: NodeProto, weights: dict[str, TensorProto], read: Counter[str]
) -> bool:
    """Return whether a batch norm is its layer's only reader and all constants are at hand."""
    if attributes(norm).get("training_mode", 0) or any(norm.output[1:]):
        return False
    if layer.op_type not in BIASED_PRODUCTS:
        return False
    if read[layer.output[0]] != 1 or any(name not in weights for name in norm.input[1:]):
        return False
    weight = layer.input[1]
    if weight not in weights or read[weight] != 1 or read[norm.input[2]] != 1:
        return False
    if weights[weight].data_type not in (TensorProto.FLOAT, TensorProto.DOUBLE):
        return False
    if len(layer.input) > 2 and layer.input[2] and layer.input[2] not in weights:
        return False
    if layer.op_type == "Gemm":
        options = attributes(layer)
        plain = options.get("alpha", 1.0) == 1.0 and options.get("beta", 1.0) == 1.0
        # A bias may have two axes, (batch, channels); the batch norm's has one.
        return plain and all(len(weights[name].dims) == 1 for name in layer.input[2:] if name)
    return True


def _fold_one(
    layer: NodeProto, norm: NodeProto, weights: dict[str, TensorProto], model: onnx.ModelProto
) -> None:
    """Move one batch norm into its layer's weight and bias, in float64, in place."""
    scale, shift, mean, variance = (
        to_array(weights[name]).astype(np.float64) for name in norm.input[1:5]
    )
    factor = scale / np.sqrt(variance + attributes(norm).get("epsilon", 1e-5))
    weight = to_array(weights[layer.input[1]])
    bias: Array = np.zeros_like(mean)
    if len(layer.input) > 2 and layer.input[2]:
        bias = to_array(weights[layer.input[2]]).astype(np.float64)
    new_weight = (weight * _spread(layer, factor, weight.shape)).astype(weight.dtype)
    new_bias = ((bias - mean) * factor + shift).astype(weight.dtype)
    name = norm.input[2]
    weights[layer.input[1]].CopyFrom(numpy_helper.from_array(new_weight, layer.input[1]))
    weights[name].CopyFrom(numpy_helper.from_array(new_bias, name))
    del layer.input[2:]
    layer.input.append(name)


def _spread(layer: NodeProto, factor: Array, shape: tuple[int, ...]) -> Array:
    """Return a factor per output channel in the shape of the layer's weight."""
    rank = len(shape)
    if layer.op_type == "Gemm":
        return factor[:, None] if attributes(layer).get("transB", 0) else factor[None]
    if layer.op_type == "Conv":
        return factor.reshape(-1, *(1,) * (rank - 1))
    # Transposed: (in, out / groups, ...), and output channels are numbered group by group.
    groups = attributes(layer).get("group", 1)
    rows = np.repeat(factor.reshape(groups, -1), shape[0] // groups, axis=0)
    return rows.reshape(*rows.shape, *(1,) * (rank - 2))

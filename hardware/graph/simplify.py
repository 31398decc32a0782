"""Write what exporters compute at run time, shapes above all, into the model as constants.

After `simplify` a model has no `Shape` of a static value, no sequences, no convolution bias that is
only zeros, no local functions, and every node has a name of its own. What a parameter's *values*
decide is left alone: only constants and the static shapes of values are used.

Libraries were tried on 13 networks in November 2026. `onnxscript.optimizer.optimize` (0.7.2) folds
norms and parameters into new ones, onnx-ir (1.1.0) by itself leaves `Shape`, onnxslim (0.1.98)
folds weights and leaves `CastLike`. The `fold_constants` of onnxscript, told to spare
parameters, finds the same groups but drops `Dropout`; with that put aside, too, training the graph
form of an ONNX file aborted with a corrupted heap, for a reason that was not found.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx.inliner import inline_local_functions
from onnx.reference import ReferenceEvaluator

from hardware.errors import ModelError
from hardware.graph.model import (
    INTEGERS,
    attributes,
    drop_dead,
    element_types,
    initializers,
    name_nodes,
    opset,
    readers_of,
    shapes,
    to_array,
)
from hardware.graph.operators import CONVOLUTIONS, RANDOM, SIZES, is_standard

Array = npt.NDArray[Any]
LARGEST = 1 << 20  # elements of a folded constant; what is larger stays computed


def simplify(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with its shape arithmetic folded and its awkward operators rewritten.

    Raises:
        ModelError: a constant cannot be computed, because the file contradicts itself.
    """
    simple = _inlined(model)
    name_nodes(simple)
    _unroll_sequences(simple)
    _fold_constants(simple)
    _reshape_instead_of_gather(simple)
    _spell_out_splits(simple)
    _drop_zero_biases(simple)
    drop_dead(simple)
    return simple


def simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model itself where nothing is left to be simplified, else a simplified copy."""
    open_ends = {"Constant", "Shape", "SplitToSequence"}
    if model.functions or any(node.op_type in open_ends for node in model.graph.node):
        return simplify(model)
    return model


def _inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which every local function is replaced by its body."""
    if model.functions:
        inlined: onnx.ModelProto = inline_local_functions(model)
        return inlined
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def _fold_constants(model: onnx.ModelProto) -> None:
    """Compute every node that depends on constants and static shapes only, in place."""
    known_shapes, types = shapes(model), element_types(model)
    values: dict[str, Array] = {
        t.name: to_array(t)
        for t in model.graph.initializer
        if t.data_type in INTEGERS and math.prod(t.dims) <= LARGEST
    }
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    remaining: list[NodeProto] = []
    folded: list[str] = []  # in the order of the graph: files do not depend on chance
    for node in model.graph.node:
        result = _constant_result(node, values, known_shapes, types, opsets)
        if result is None:
            remaining.append(node)
            continue
        values.update(result)
        folded.extend(result)
    if not folded:
        return
    nodes = [NodeProto.FromString(node.SerializeToString()) for node in remaining]
    used = {name for node in nodes for name in node.input}
    used |= {output.name for output in model.graph.output} | _outer_names(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    present = initializers(model)
    for name in folded:
        if name in used and name not in present:
            model.graph.initializer.append(numpy_helper.from_array(values[name], name))


def _outer_names(nodes: list[NodeProto]) -> set[str]:
    """Return the values that subgraphs of control flow read."""
    names: set[str] = set()
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                inner = list(attribute.g.node)
                names |= {name for item in inner for name in item.input} | _outer_names(inner)
    return names


def _constant_result(
    node: NodeProto,
    values: dict[str, Array],
    known_shapes: dict[str, tuple[int, ...]],
    types: dict[str, int],
    opsets: dict[str, int],
) -> dict[str, Array] | None:
    """Return a node's outputs where constants and static shapes decide them, else None."""
    if not is_standard(node) or node.op_type in RANDOM:
        return None
    if any(attribute.HasField("g") for attribute in node.attribute):
        return None
    if node.op_type in SIZES:
        return _shape_result(node, known_shapes)
    inputs = [name for name in node.input if name]
    if node.op_type == "CastLike":
        kind = types.get(
            node.input[1], values[node.input[1]].dtype if node.input[1] in values else None
        )
        if node.input[0] not in values or kind is None:
            return None
        dtype = helper.tensor_dtype_to_np_dtype(kind) if isinstance(kind, int) else kind
        return {node.output[0]: values[node.input[0]].astype(dtype)}
    if any(name not in values for name in inputs) or not node.output:
        return None
    if any(math.prod(known_shapes.get(name, ())) > LARGEST for name in node.output):
        return None
    return evaluate(node, {name: values[name] for name in inputs}, opsets)


def _shape_result(node: NodeProto, known: dict[str, tuple[int, ...]]) -> dict[str, Array] | None:
    """Return what a `Shape` or `Size` node returns, None where the shape is not static."""
    shape = known.get(node.input[0])
    if shape is None:
        return None
    if node.op_type == "Size":
        return {node.output[0]: np.array(math.prod(shape), dtype=np.int64)}
    bounds = attributes(node)
    part = shape[bounds.get("start", 0) : bounds.get("end", len(shape))]
    return {node.output[0]: np.array(part, dtype=np.int64)}


def evaluate(
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


def _unroll_sequences(model: onnx.ModelProto) -> None:
    """Replace `SplitToSequence` + `SequenceAt` by `Split`, in place."""
    sequences = {n.output[0]: n for n in model.graph.node if n.op_type == "SplitToSequence"}
    if not sequences:
        return
    readers, constants, known = readers_of(model), _all_constants(model), shapes(model)
    replaced: dict[int, NodeProto | None] = {}
    for name, split in sequences.items():
        sizes, picks = _chunk_sizes(split, known, constants), readers.get(name, [])
        simple = all(
            n.op_type == "SequenceAt" and n.input[1] in constants and len(n.input) == 2
            for n in picks
        )
        if sizes is None or not picks or not simple or attributes(split).get("keepdims", 1) == 0:
            continue
        outputs = [f"{name}_{i}" for i in range(len(sizes))]
        for pick in picks:
            index = int(constants[pick.input[1]].reshape(-1)[0]) % len(sizes)
            if outputs[index] == f"{name}_{index}":
                outputs[index] = pick.output[0]
                replaced[id(pick)] = None
            else:
                replaced[id(pick)] = helper.make_node(
                    "Identity", [outputs[index]], [pick.output[0]], pick.name
                )
        model.graph.initializer.append(
            numpy_helper.from_array(np.array(sizes, dtype=np.int64), f"{name}_sizes")
        )
        axis = attributes(split).get("axis", 0)
        replaced[id(split)] = helper.make_node(
            "Split", [split.input[0], f"{name}_sizes"], outputs, split.name, axis=axis
        )
    if replaced:
        nodes = [replaced.get(id(n), n) for n in model.graph.node]
        copies = [NodeProto.FromString(n.SerializeToString()) for n in nodes if n is not None]
        del model.graph.node[:]
        model.graph.node.extend(copies)


def _all_constants(model: onnx.ModelProto) -> dict[str, Array]:
    """Return integer initializers and the values of `Constant` nodes."""
    found = {t.name: to_array(t) for t in model.graph.initializer if t.data_type in INTEGERS}
    for node in model.graph.node:
        if node.op_type == "Constant":
            (result,) = ReferenceEvaluator(node).run(None, {})
            if isinstance(result, np.ndarray):
                found[node.output[0]] = result
    return found


def _chunk_sizes(
    node: NodeProto, known: dict[str, tuple[int, ...]], constants: dict[str, Array]
) -> list[int] | None:
    """Return the sizes of the parts that a `SplitToSequence` makes, None where unknown."""
    shape = known.get(node.input[0])
    if shape is None:
        return None
    extent = shape[attributes(node).get("axis", 0)]
    if len(node.input) < 2 or node.input[1] == "":
        return [1] * extent
    if node.input[1] not in constants:
        return None
    asked = constants[node.input[1]]
    if asked.ndim:
        return [int(size) for size in asked]
    step = int(asked)
    return [min(step, extent - start) for start in range(0, extent, step)]


def _reshape_instead_of_gather(model: onnx.ModelProto) -> None:
    """Replace a `Gather` of all elements in their order (`as_strided`) by a `Reshape`, in place."""
    known, constants = shapes(model), initializers(model)
    for node in model.graph.node:
        if node.op_type != "Gather" or attributes(node).get("axis", 0) != 0:
            continue
        source, indices = known.get(node.input[0]), constants.get(node.input[1])
        if source is None or len(source) != 1 or indices is None:
            continue
        if not np.array_equal(to_array(indices).reshape(-1), np.arange(source[0])):
            continue
        target = np.array(tuple(indices.dims), dtype=np.int64)
        model.graph.initializer.append(numpy_helper.from_array(target, f"{node.name}_shape"))
        node.op_type = "Reshape"
        del node.attribute[:]
        node.input[1] = f"{node.name}_shape"


def _spell_out_splits(model: onnx.ModelProto) -> None:
    """Give every `Split` its sizes as an input, in place, so that they can be carved."""
    if opset(model) < 13:
        return
    known = shapes(model)
    for node in model.graph.node:
        if node.op_type != "Split" or (len(node.input) > 1 and node.input[1]):
            continue
        axis = attributes(node).get("axis", 0)
        parts = [known.get(name) for name in node.output]
        if any(part is None for part in parts):
            continue
        sizes = [part[axis] for part in parts if part is not None]
        model.graph.initializer.append(
            numpy_helper.from_array(np.array(sizes, dtype=np.int64), f"{node.name}_sizes")
        )
        del node.input[1:]
        node.input.append(f"{node.name}_sizes")
        for attribute in list(node.attribute):
            if attribute.name == "num_outputs":
                node.attribute.remove(attribute)


def _drop_zero_biases(model: onnx.ModelProto) -> None:
    """Remove biases that are constant zeros and no parameter (exporters write them), in place."""
    zero_names = {
        tensor.name
        for tensor in model.graph.initializer
        if "." not in tensor.name
        and len(tensor.dims) == 1
        and tensor.data_type in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16)
        and not to_array(tensor).any()
    }
    for node in model.graph.node:
        if node.op_type in CONVOLUTIONS and zero_names.intersection(node.input[2:]):
            del node.input[2:]

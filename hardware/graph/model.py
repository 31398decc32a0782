"""ONNX models: read from a file, looked up by name, with static shapes, rid of dead nodes."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_model

from hardware.errors import ModelError
from hardware.graph.operators import is_standard

Shape = tuple[int, ...]
SMALL = 1024  # elements; larger initializers never say a shape
# Element types of which no parameter is: they hold sizes, axes, indices and conditions.
INTEGERS = frozenset(
    {TensorProto.INT64, TensorProto.INT32, TensorProto.INT16, TensorProto.INT8}
    | {TensorProto.UINT8, TensorProto.BOOL}
)


def load_model(path: Path) -> onnx.ModelProto:
    """Return the ONNX model in a file, its weights included.

    Raises:
        ModelError: no such file, not an ONNX model, damaged, or its external data is absent.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
        _require_external_data(model, path)
        load_external_data_for_model(model, str(path.parent))
    except ModelError:
        raise
    except FileNotFoundError as error:
        raise ModelError(f"Cannot read {path}: there is no such file.") from error
    except OSError as error:
        raise ModelError(f"Cannot read {path}: {error.strerror or error}.") from error
    except Exception as error:  # protobuf's DecodeError, onnx's ValidationError: no common base
        raise ModelError(
            f"{path} is not a sound ONNX model ({error}). Export or download it again."
        ) from error
    if not model.graph.node:
        raise ModelError(f"{path} holds no ONNX graph. Export or download it again.")
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{path} is not a valid ONNX model: {reason}") from error
    return model


def _require_external_data(model: onnx.ModelProto, path: Path) -> None:
    """Refuse a model whose weights lie in a file that is not there."""
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and not (path.parent / entry.value).is_file():
                raise ModelError(
                    f"{path} keeps its weights in external data, {entry.value}, which is not "
                    f"there. Put that file into {path.parent}."
                )


def attributes(node: NodeProto) -> dict[str, Any]:  # Any: an attribute has one of ten types
    """Return a node's attributes by name, texts as `str`."""
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {key: v.decode() if isinstance(v, bytes) else v for key, v in values.items()}


def set_attribute(node: NodeProto, name: str, value: object) -> None:
    """Give a node's attribute a new value."""
    for attribute in list(node.attribute):
        if attribute.name == name:
            node.attribute.remove(attribute)
    node.attribute.append(helper.make_attribute(name, value))


def initializers(model: onnx.ModelProto) -> dict[str, TensorProto]:
    """Return the initializers by name."""
    return {tensor.name: tensor for tensor in model.graph.initializer}


def uses(nodes: Iterable[NodeProto]) -> Counter[str]:
    """Return how many node inputs read each value; what a subgraph reads counts too."""
    count: Counter[str] = Counter()
    for node in nodes:
        count.update(name for name in node.input if name)
        for attribute in node.attribute:
            for graph in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                count.update(uses(graph.node))
                count.update(output.name for output in graph.output)
    return count


def readers_of(model: onnx.ModelProto) -> dict[str, list[NodeProto]]:
    """Return for every value that is read the nodes that read it, subgraphs included, in order."""
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in uses([node]):
            readers.setdefault(name, []).append(node)
    return readers


def static_shape(info: ValueInfoProto) -> Shape | None:
    """Return a value's shape, or None where a dimension is unknown or symbolic."""
    tensor = info.type.tensor_type
    if not info.type.HasField("tensor_type") or not tensor.HasField("shape"):
        return None
    if any(not dim.HasField("dim_value") for dim in tensor.shape.dim):
        return None
    return tuple(int(dim.dim_value) for dim in tensor.shape.dim)


def shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    """Return every statically known shape by value name, initializers included."""
    graph = model.graph
    known = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for info in [*graph.input, *graph.value_info, *graph.output]:
        if (shape := static_shape(info)) is not None:
            known.setdefault(info.name, shape)
    return known


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """Return every known element type by value name."""
    graph = model.graph
    known = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for info in [*graph.input, *graph.value_info, *graph.output]:
        if info.type.HasField("tensor_type"):
            known.setdefault(info.name, info.type.tensor_type.elem_type)
    return known


def opset(model: onnx.ModelProto) -> int:
    """Return the version of the standard operators that the model uses."""
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    return max(versions, default=1)


def to_array(tensor: TensorProto) -> npt.NDArray[Any]:
    """Return an initializer's values."""
    return np.asarray(numpy_helper.to_array(tensor))


def constant_values(model: onnx.ModelProto) -> dict[str, npt.NDArray[Any]]:
    """Return the small constants by name: what can say a shape, an axis or a bound."""
    return {
        tensor.name: to_array(tensor)
        for tensor in model.graph.initializer
        if math.prod(tensor.dims) <= SMALL and tensor.data_type != TensorProto.STRING
    }


def drop_dead(model: onnx.ModelProto) -> None:
    """Remove the nodes, initializers and shapes that no output depends on, in place."""
    graph = model.graph
    needed = {output.name for output in graph.output}
    live: list[NodeProto] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(uses([node]))
            live.append(node)
    live.reverse()
    if len(live) != len(graph.node):
        kept = [NodeProto.FromString(node.SerializeToString()) for node in live]
        del graph.node[:]
        graph.node.extend(kept)
    for index in range(len(graph.initializer) - 1, -1, -1):
        if graph.initializer[index].name not in needed:
            del graph.initializer[index]
    constants = {tensor.name for tensor in graph.initializer}
    for index in range(len(graph.value_info) - 1, -1, -1):
        name = graph.value_info[index].name
        if name not in needed or name in constants:
            del graph.value_info[index]


def infer_shapes(model: onnx.ModelProto, known: Iterable[ValueInfoProto] = ()) -> None:
    """Compute the shapes of all values anew, in place; weights are not read.

    Args:
        model: the model.
        known: shapes to start from; what an operator of another domain gives cannot be computed.

    Raises:
        ModelError: the shapes of the model contradict one another.
    """
    graph = model.graph
    skeleton = onnx.ModelProto()
    skeleton.ir_version = model.ir_version
    skeleton.opset_import.extend(model.opset_import)
    skeleton.functions.extend(model.functions)
    skeleton.graph.name = graph.name or "graph"
    skeleton.graph.node.extend(graph.node)
    skeleton.graph.input.extend(graph.input)
    skeleton.graph.output.extend(graph.output)
    skeleton.graph.value_info.extend(known)
    for tensor in graph.initializer:
        if math.prod(tensor.dims) <= SMALL:
            skeleton.graph.initializer.append(tensor)
        else:
            info = helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            skeleton.graph.input.append(info)
    try:
        # Propagating data finds the shapes of computed reshapes, and loses some behind Slice nodes.
        plain = onnx.shape_inference.infer_shapes(skeleton, strict_mode=False)
        propagated = onnx.shape_inference.infer_shapes(skeleton, strict_mode=False, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError) as error:
        raise ModelError(f"The shapes of the model contradict one another: {error}") from error
    found = {info.name: info for info in plain.graph.value_info}
    found |= {i.name: i for i in propagated.graph.value_info if static_shape(i) is not None}
    del graph.value_info[:]
    graph.value_info.extend(found.values())


def complete_shapes(model: onnx.ModelProto) -> None:
    """Infer shapes where some are missing, in place; what is known stays.

    Raises:
        ModelError: the shapes of the model contradict one another.
    """
    known = shapes(model)
    if all(name in known for node in model.graph.node for name in node.output if name):
        return
    before = [info for info in model.graph.value_info if static_shape(info) is not None]
    infer_shapes(model, before)
    names = {info.name for info in before}
    after = [info for info in model.graph.value_info if info.name not in names]
    del model.graph.value_info[:]
    model.graph.value_info.extend([*before, *after])


def foreign_values(model: onnx.ModelProto) -> list[ValueInfoProto]:
    """Return what is known of the outputs of operators that are not ONNX's own."""
    names = {name for node in model.graph.node if not is_standard(node) for name in node.output}
    return [info for info in model.graph.value_info if info.name in names]


def name_nodes(model: onnx.ModelProto) -> None:
    """Give every node a name of its own, in place; names that are unique already stay."""
    taken: set[str] = set()
    for node in model.graph.node:
        name = base = node.name or f"{node.op_type}_{node.output[0] if node.output else 'none'}"
        count = 1
        while name in taken:
            name, count = f"{base}_{count}", count + 1
        node.name = name
        taken.add(name)


def rewire(model: onnx.ModelProto, renamed: Mapping[str, str]) -> None:
    """Let every reader of a value read another one instead, in place.

    A network output keeps its name: it becomes an Identity of what replaces it.

    Args:
        model: the model.
        renamed: per value what replaces it, which may be replaced itself.
    """
    final: dict[str, str] = {}
    for name in renamed:
        chain = []
        while name in renamed and name not in final:
            chain.append(name)
            name = renamed[name]
        final.update(dict.fromkeys(chain, final.get(name, name)))
    graph = model.graph
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in final:
                node.input[index] = final[name]
    for output in graph.output:
        if output.name in final:
            source = final[output.name]
            for node in graph.node:
                for index, name in enumerate(node.output):
                    if name == output.name:
                        node.output[index] = f"{name}_replaced"
            graph.node.append(
                helper.make_node("Identity", [source], [output.name], f"Identity_{output.name}")
            )

"""Let a graph with static shapes run at any batch: no constant says how many images there are."""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from hardware.errors import ModelError
from hardware.graph.model import (
    attributes,
    complete_shapes,
    constant_values,
    foreign_values,
    infer_shapes,
    initializers,
    set_attribute,
    shapes,
)


def graph_input(model: onnx.ModelProto) -> onnx.ValueInfoProto:
    """Return the one input of a graph.

    Raises:
        ModelError: it has none, or several.
    """
    constants = initializers(model)
    inputs = [entry for entry in model.graph.input if entry.name not in constants]
    if len(inputs) != 1:
        names = ", ".join(entry.name for entry in inputs) or "none"
        raise ModelError(f"The graph must have one input, a batch of images; it has: {names}.")
    found: onnx.ValueInfoProto = inputs[0]
    return found


def set_input_shape(model: onnx.ModelProto, shape: Sequence[int]) -> None:
    """Give the input of a graph this shape, and all values the shapes that follow, in place.

    Raises:
        ModelError: the shapes contradict one another, or there are several inputs.
    """
    dimensions = graph_input(model).type.tensor_type.shape
    del dimensions.dim[:]
    for size in shape:
        dimensions.dim.add().dim_value = size
    foreign = foreign_values(model)
    outputs = list(model.graph.output)
    del model.graph.output[:], model.graph.value_info[:]
    infer_shapes(model, foreign)  # as inner values, outputs get their shapes anew too
    known = {info.name: info for info in model.graph.value_info}
    model.graph.output.extend(known.get(output.name, output) for output in outputs)
    names = {output.name for output in outputs}
    inner = [info for info in model.graph.value_info if info.name not in names]
    del model.graph.value_info[:]
    model.graph.value_info.extend(inner)


def free_batch(model: onnx.ModelProto) -> None:
    """Let every `Reshape` and `Expand` follow the batch that it gets, in place.

    The leading entry of a constant target is copied from the input where both are equal, and left
    open where they differ (images folded into pixels and back). At the static batch that changes
    nothing.
    """
    complete_shapes(model)
    known, constants, present = shapes(model), constant_values(model), initializers(model)
    for node in model.graph.node:
        if node.op_type not in ("Reshape", "Expand") or node.input[1] not in constants:
            continue
        source = known.get(node.input[0])
        old = constants[node.input[1]].reshape(-1)
        if not source or not old.size or old[0] <= 0:
            continue
        new = old.copy()
        if node.op_type == "Expand":
            if len(old) != len(source) or old[0] != source[0]:
                continue
            new[0] = 1  # an axis of length 1 stays what it meets
        elif attributes(node).get("allowzero", 0) and 0 in old:
            continue  # a length of zero is meant
        elif old[0] == source[0]:
            new[0] = 0
        elif -1 not in old and 0 not in source:
            new[0] = -1
        else:
            continue
        name = f"{node.name}_target"
        target = numpy_helper.from_array(new.astype(np.int64), name)
        if name in present:  # from an earlier call
            present[name].CopyFrom(target)
        else:
            model.graph.initializer.append(target)
        node.input[1] = name
        if node.op_type == "Reshape":
            set_attribute(node, "allowzero", 0)

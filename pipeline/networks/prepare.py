"""An ONNX file from anywhere -> a graph with static shapes that can be analysed and carved."""

import onnx
from onnx import ValueInfoProto

from hardware.errors import ModelError
from hardware.graph.model import (
    complete_shapes,
    initializers,
    name_nodes,
    static_shape,
    to_array,
)
from pipeline.networks.simplify import simplify


def prepare(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Return the model with static shapes, simplified, and what was decided on the way.

    A batch that the file leaves open becomes 1. All other sizes must be known: they decide what a
    network computes.

    Raises:
        ModelError: an input has an open size that is not the batch, a weight holds NaN, or the
            shapes contradict one another.
    """
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    _refuse_nan(fixed)
    notes = _fix_batch(fixed)
    name_nodes(fixed)
    if notes:
        _forget_open_shapes(fixed)
    complete_shapes(fixed)
    _complete_outputs(fixed)
    simple = simplify(fixed)
    complete_shapes(simple)
    _complete_outputs(simple)
    return simple, notes


def _refuse_nan(model: onnx.ModelProto) -> None:
    """Refuse weights that are no numbers: nothing that is computed with them says anything."""
    for tensor in model.graph.initializer:
        values = to_array(tensor)
        if values.dtype.kind == "f" and (values != values).any():
            count = int((values != values).sum())
            raise ModelError(
                f"{tensor.name} holds {count} values that are NaN, of {values.size}. "
                "Training diverged, or the file is damaged: export the network again."
            )


def _fix_batch(model: onnx.ModelProto) -> tuple[str, ...]:
    """Set the open batch of every input to 1, in place; return a note per input."""
    weights = initializers(model)
    notes = []
    for tensor in model.graph.input:
        kind = tensor.type.tensor_type
        if tensor.name in weights or not tensor.type.HasField("tensor_type"):
            continue
        if not kind.HasField("shape"):
            raise ModelError(
                f"The file does not say how many axes input {tensor.name!r} has. "
                "Export the network with a fixed input shape."
            )
        dims = list(kind.shape.dim)
        is_open = [not dim.HasField("dim_value") or dim.dim_value < 1 for dim in dims]
        if any(is_open[1:]):
            shown = ", ".join(
                dim.dim_param or "?" if gap else str(dim.dim_value)
                for dim, gap in zip(dims, is_open, strict=True)
            )
            raise ModelError(
                f"Input {tensor.name!r} has shape ({shown}): sizes other than the batch are open. "
                "Export the network with fixed sizes, or fix them with "
                "onnxruntime.tools.make_dynamic_shape_fixed."
            )
        if is_open[:1] == [True]:
            symbol = dims[0].dim_param or "?"
            dims[0].dim_value = 1
            notes.append(f"batch {symbol} of input {tensor.name} fixed to 1")
    return tuple(notes)


def _forget_open_shapes(model: onnx.ModelProto) -> None:
    """Remove what the file says of values whose shape has a symbol, in place."""
    for index in range(len(model.graph.value_info) - 1, -1, -1):
        if static_shape(model.graph.value_info[index]) is None:
            del model.graph.value_info[index]


def _complete_outputs(model: onnx.ModelProto) -> None:
    """Give outputs the static shapes that can be inferred for them, in place."""
    open_outputs = [output for output in model.graph.output if static_shape(output) is None]
    if not open_outputs:
        return
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    for output in probe.graph.output:
        # As an output a value keeps the symbols that the file gives it; as any other it is known.
        output.CopyFrom(ValueInfoProto(name=output.name, type=_without_shape(output)))
    complete_shapes(probe)
    inferred = onnx.shape_inference.infer_shapes(probe, data_prop=True)
    found = {output.name: output for output in inferred.graph.output}
    for output in open_outputs:
        if static_shape(found[output.name]) is not None:
            output.CopyFrom(found[output.name])


def _without_shape(info: ValueInfoProto) -> onnx.TypeProto:
    """Return the type of a value without its shape."""
    kind = onnx.TypeProto()
    kind.CopyFrom(info.type)
    if kind.HasField("tensor_type"):
        kind.tensor_type.ClearField("shape")
    return kind

"""Rules of operators whose channels stay where they are: element-wise, norms, pools, reductions."""

import numpy as np
from onnx import NodeProto

from hardware.graph.model import attributes
from hardware.graph.operators import SIZES
from pipeline.channels.choices import Option, tie
from pipeline.channels.labels import Value, along, axes_of, labels_along
from pipeline.channels.propagation import (
    Inputs,
    Sized,
    Trace,
    output_shapes,
    present,
    source,
    where,
)
from pipeline.channels.unions import Ids

SUMS = ("Add", "Sub", "Sum")  # of which no operand may be left out when a weight is masked


def elementwise(trace: Trace, node: NodeProto, inputs: Inputs) -> list[Value]:
    """Unite what meets in one element."""
    values = present(inputs)
    shape = output_shapes(trace, node)[0]
    fields = trace.join(values, shape, f"meets a fixed size at {where(node)}")
    constant = all(value.is_constant for value in values)
    if constant and node.op_type in SUMS and all(value.shape == shape for value in values):
        for axis in range(len(shape)):
            parts = [f.reshape(-1) for v in values for f in v.fields if f.shape[axis] > 1]
            if len(shape) > 1 and parts:
                trace.unions.share_roles(np.concatenate(parts))
    return [Value(shape=shape, fields=fields, is_constant=constant)]


def pool(trace: Trace, node: NodeProto, inputs: Inputs) -> list[Value]:
    """Pool or resample pixels: channels stay apart, pixels are fixed."""
    value, shapes = source(inputs), output_shapes(trace, node)
    fields = list(value.fields)
    for axis in range(2, len(value.shape)):
        fields = trace.fix(fields, axis, f"pixels meet at {where(node)}")
    return [Value(shape=shape, fields=tuple(fields)) for shape in shapes]


def resize(trace: Trace, node: NodeProto, inputs: Inputs) -> list[Value]:
    """Resample pixels; the size asked for may name the channels."""
    value, shape = source(inputs), output_shapes(trace, node)[0]
    fields = list(value.fields)
    for axis, (before, after) in enumerate(zip(value.shape, shape, strict=True)):
        if before != after or axis >= 2:
            fields = trace.fix(fields, axis, f"pixels meet at {where(node)}")
    sizes = trace.constant(node, 3)
    if sizes is not None and sizes.size == len(shape):
        for labels in fields:
            for axis in axes_of(labels):
                trace.count(node, 3, axis, labels_along(labels, axis))
    return [Value(shape=shape, fields=tuple(fields))]


def sampled(trace: Trace, node: NodeProto, inputs: Inputs) -> list[Value]:
    """Sample pixels at computed places: GridSample, RoiAlign."""
    for value in present(inputs)[1:]:
        trace.freeze(value, f"says where to sample at {where(node)}")
    (result,) = pool(trace, node, inputs[:1])
    fields = trace.fix(result.fields, 0, f"images are picked at {where(node)}")
    return [Value(shape=result.shape, fields=tuple(fields))]


def batch_norm(trace: Trace, node: NodeProto, inputs: Inputs) -> list[Value]:
    """Scale and shift every channel by its own constants."""
    value, shapes = source(inputs), output_shapes(trace, node)
    rank = len(value.shape)
    if attributes(node).get("training_mode", 0):
        for labels in value.fields:
            trace.unions.mix(labels, tuple(a for a in axes_of(labels) if a != 1), node.op_type)
    fields = _scaled(trace, node, value, inputs[1:], rank, 1)
    first = Value(shape=shapes[0], fields=fields, is_constant=value.is_constant)
    return [first, *(Value(shape=shape) for shape in shapes[1:])]


def _scaled(
    trace: Trace, node: NodeProto, value: Value, constants: Inputs, rank: int, axis: int
) -> tuple[Ids, ...]:
    """Return the fields of a value that constants, one per position of an axis, are applied to."""
    operands = [value]
    for constant in present(constants):
        for labels in constant.fields:
            trace.unions.mark(labels, "norm")
        spread = [1] * rank
        spread[axis] = constant.shape[0]
        fields = tuple(along(f.reshape(-1), rank, axis) for f in constant.fields)
        operands.append(Value(shape=tuple(spread), fields=fields))
    return trace.join(operands, value.shape, f"meets a fixed size at {where(node)}")


def instance_norm(trace: Trace, node: NodeProto, inputs: Inputs) -> list[Value]:
    """Normalise every position of the second axis over all that lies behind it."""
    value, shape = source(inputs), output_shapes(trace, node)[0]
    constants = present(inputs[1:])
    grouped = [f for f in value.fields if any(axis > 1 for axis in axes_of(f))]
    if not grouped:
        fields = _scaled(trace, node, value, constants, len(shape), 1)
        return [Value(shape=shape, fields=fields, is_constant=value.is_constant)]
    ids = [f.reshape(-1) for c in constants for f in c.fields]
    for vector in ids:
        trace.unions.mark(vector, "norm")
    for labels in grouped:
        _normalised(trace, node, labels, ids)
    return [Value(shape=shape, fields=value.fields, is_constant=value.is_constant)]


def _normalised(trace: Trace, node: NodeProto, labels: Ids, constants: list[Ids]) -> None:
    """Tie labels that vary along the second axis and along what is normalised over.

    Either whole rows go, and the constants of a row with it, which is exact; or the same positions
    of every row go, which changes what is normalised over.
    """
    behind = [axis for axis in axes_of(labels) if axis > 1]
    before = [axis for axis in axes_of(labels) if axis <= 1]
    fixed = f"belongs to every channel at {where(node)}"
    positions = Option(
        unions=tuple(tie(labels, axis) for axis in before),
        frozen=tuple((vector, fixed) for vector in constants),
        mixed=((labels, tuple(behind), node.op_type),),
    )
    if before != [1]:
        for one, other in positions.unions:
            trace.unions.unite(one, other)
        for vector in constants:
            trace.unions.freeze(vector, fixed)
        trace.unions.mix(labels, tuple(behind), node.op_type)
        return
    rows = labels
    for axis in behind:
        rows = rows.take([0], axis=axis)
    whole = Option(
        unions=(
            *(tie(labels, axis) for axis in behind),
            *((vector, rows.reshape(-1)) for vector in constants),
        )
    )
    trace.choices.append((whole, positions))


def group_norm(trace: Trace, node: NodeProto, inputs: Inputs) -> list[Value]:
    """Normalise groups of channels: whole groups may go, or the same positions of all groups."""
    value, shape = source(inputs), output_shapes(trace, node)[0]
    groups = int(attributes(node)["num_groups"])
    constants = present(inputs[1:])
    per_group = trace.opset < 21
    ids = trace.channels(value.fields, 1, f"pixels meet at {where(node)}")
    if ids is None:
        for constant in constants:
            trace.freeze(constant, f"meets a fixed size at {where(node)}")
        return [Value(shape=shape)]
    vectors = [f.reshape(-1) for c in constants for f in c.fields]
    for vector in vectors:
        trace.unions.mark(vector, "norm")
        if not per_group:
            trace.unions.unite(vector, ids)
    rows = ids.reshape(groups, -1)
    counted = trace.unions.fresh(groups)
    fixed = f"belongs to a group of {where(node)}"
    owned = [counted, *(vectors if per_group else [])]
    whole = Option(unions=tuple((vector[:, None], rows) for vector in owned))
    positions = Option(
        unions=((rows[:1], rows),),
        frozen=tuple((vector, fixed) for vector in owned),
        mixed=((ids, (0,), node.op_type),),
    )
    trace.choices.append((whole, positions))
    trace.sizes.append(Sized(node=node.name, attribute="num_groups", ids=counted))
    return [Value(shape=shape, fields=(along(ids, len(shape), 1),))]


def layer_norm(trace: Trace, node: NodeProto, inputs: Inputs) -> list[Value]:
    """Normalise over the last axes: what varies along them is mixed."""
    value, shapes = source(inputs), output_shapes(trace, node)
    first = attributes(node).get("axis", -1) % len(value.shape)
    for labels in value.fields:
        over = tuple(axis for axis in axes_of(labels) if axis >= first)
        trace.unions.mix(labels, over, node.op_type)
    constants = present(inputs[1:])
    for constant in constants:
        for labels in constant.fields:
            trace.unions.mark(labels, "norm")
    fields = trace.join([value, *constants], value.shape, f"meets a fixed size at {where(node)}")
    result = Value(shape=shapes[0], fields=fields, is_constant=value.is_constant)
    return [result, *(Value(shape=shape) for shape in shapes[1:])]


def mixing(trace: Trace, node: NodeProto, inputs: Inputs) -> list[Value]:
    """Mix along one axis, or all of them, and keep the shape: Softmax, LpNormalization, LRN."""
    value, shape = source(inputs), output_shapes(trace, node)[0]
    default = 1 if node.op_type == "LRN" else -1
    axis = attributes(node).get("axis", default) % len(value.shape)
    for labels in value.fields:
        if labels.shape[axis] > 1:
            trace.unions.mix(labels, (axis,), node.op_type)
    return [Value(shape=shape, fields=value.fields, is_constant=value.is_constant)]


def ordered(trace: Trace, node: NodeProto, inputs: Inputs) -> list[Value]:
    """Fix the axis along which the order of positions counts: CumSum, TopK, ArgMax, ArgMin."""
    value, shapes = source(inputs), output_shapes(trace, node)
    axis = attributes(node).get("axis", 0 if node.op_type.startswith("Arg") else -1)
    if node.op_type == "CumSum":
        given = trace.constant(node, 1)
        axis = 0 if given is None else int(given.reshape(-1)[0])
    axis %= len(value.shape)
    fields = trace.fix(value.fields, axis, f"the order of channels counts at {where(node)}")
    results = []
    for shape in shapes:
        if len(shape) == len(value.shape):
            results.append(Value(shape=shape, fields=tuple(fields)))
        else:
            shorter = [f.reshape((*f.shape[:axis], *f.shape[axis + 1 :])) for f in fields]
            results.append(Value(shape=shape, fields=tuple(shorter)))
    return results


def reduce(trace: Trace, node: NodeProto, inputs: Inputs) -> list[Value]:
    """Sum, average, ... over axes: what varies along them alone is mixed and ends there."""
    value, shape = source(inputs), output_shapes(trace, node)[0]
    rank = len(value.shape)
    options = attributes(node)
    named = trace.axes(node, 1)
    if len(node.input) > 1 and node.input[1] and trace.constant(node, 1) is None:
        trace.freeze(value, f"reduced over computed axes at {where(node)}")
        return [Value(shape=shape)]
    if not named and options.get("noop_with_empty_axes", 0):
        return [Value(shape=shape, fields=value.fields, is_constant=value.is_constant)]
    axes = {axis % rank for axis in named} or set(range(rank))
    kept = []
    for labels in value.fields:
        over = [axis for axis in axes_of(labels) if axis in axes]
        if len(over) == len(axes_of(labels)):
            trace.unions.mix(labels, tuple(over), node.op_type)
            continue
        rest = [labels]
        for axis in over:
            rest = trace.fix(rest, axis, f"summed at {where(node)}")
        kept += rest
    if not options.get("keepdims", 1):
        left = [axis for axis in range(rank) if axis not in axes]
        kept = [labels.reshape([labels.shape[axis] for axis in left]) for labels in kept]
    return [Value(shape=shape, fields=tuple(kept), is_constant=value.is_constant)]


def shape_only(trace: Trace, node: NodeProto, inputs: Inputs) -> list[Value]:
    """Read nothing of the input but its shape, or nothing at all: Shape, Size, Constant, Range."""
    if node.op_type in SIZES:
        trace.freeze(source(inputs), f"its size is computed with at {where(node)}")
    return [
        Value(shape=shape, is_constant=True)
        for shape in output_shapes(trace, node)
        if isinstance(shape, tuple)
    ]


def freeze_all(trace: Trace, node: NodeProto, inputs: Inputs, reason: str) -> list[Value]:
    """Freeze everything that an operator touches of which nothing is known."""
    for value in present(inputs):
        trace.freeze(value, reason)
    return [Value(shape=trace.shapes.get(name, ())) for name in node.output]

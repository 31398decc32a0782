"""Rules of operators that only move data: the same movement is made with the labels."""

from collections.abc import Sequence

import numpy as np
from onnx import NodeProto

from hardware.graph.model import attributes
from pipeline.channels.labels import (
    Shape,
    Value,
    along,
    axes_of,
    labels_along,
    reshaped,
    squash,
)
from pipeline.channels.propagation import Inputs, Trace, output_shapes, present, source, where
from pipeline.channels.unions import Ids


def moved(
    trace: Trace, node: NodeProto, value: Value, fields: Sequence[Ids], shape: Shape
) -> Value:
    """Return the value that a movement makes of another one."""
    kept = trace.distinct(fields, f"mixed with another axis at {where(node)}")
    return Value(shape=shape, fields=kept, is_constant=value.is_constant)


def same(trace: Trace, node: NodeProto, inputs: Inputs) -> list[Value]:
    """Hand the first input through: Identity, Cast, Dropout."""
    value = source(inputs)
    outputs = output_shapes(trace, node)
    return [
        Value(shape=s, fields=value.fields, is_constant=value.is_constant) for s in outputs[:1]
    ] + [Value(shape=s) for s in outputs[1:]]


def reshape(trace: Trace, node: NodeProto, inputs: Inputs) -> list[Value]:
    """Reshape, Flatten, Squeeze, Unsqueeze: elements keep their order."""
    value, shape = source(inputs), output_shapes(trace, node)[0]
    fields = [reshaped(labels, value.shape, shape) for labels in value.fields]
    result = moved(trace, node, value, fields, shape)
    target = trace.constant(node, 1) if node.op_type == "Reshape" else None
    if target is not None:
        for axis, asked in enumerate(target.reshape(-1)):
            for labels in result.fields:
                if asked > 0 and labels.shape[axis] > 1:
                    trace.count(node, 1, axis, labels_along(labels, axis))
    elif node.op_type == "Reshape":
        trace.freeze(value, f"reshaped to a computed shape at {where(node)}")
    return [result]


def transpose(trace: Trace, node: NodeProto, inputs: Inputs) -> list[Value]:
    """Permute the axes."""
    value = source(inputs)
    order = attributes(node).get("perm", list(range(len(value.shape)))[::-1])
    fields = tuple(labels.transpose(order) for labels in value.fields)
    shape = tuple(value.shape[axis] for axis in order)
    return [Value(shape=shape, fields=fields, is_constant=value.is_constant)]


def split(trace: Trace, node: NodeProto, inputs: Inputs) -> list[Value]:
    """Cut one axis into several values."""
    value = source(inputs)
    axis = attributes(node).get("axis", 0) % len(value.shape)
    results, start = [], 0
    for place, shape in enumerate(output_shapes(trace, node)):
        stop = start + shape[axis]
        fields = [
            squash(f[_slices(f, axis, slice(start, stop))]) if f.shape[axis] > 1 else f
            for f in value.fields
        ]
        for labels in (f for f in value.fields if f.shape[axis] > 1):
            part = labels[_slices(labels, axis, slice(start, stop))]
            if trace.constant(node, 1) is None:
                trace.unions.freeze(part, f"split at sizes that are computed at {where(node)}")
            trace.count(node, 1, place, labels_along(part, axis))
        results.append(_cut(trace, node, value, fields, shape))
        start = stop
    return results


def _cut(trace: Trace, node: NodeProto, value: Value, fields: Sequence[Ids], shape: Shape) -> Value:
    """Return a part of a value; labels of a part of size 1 have nothing to vary along: frozen."""
    reason = f"a single channel is cut out at {where(node)}"
    return Value(
        shape=shape,
        fields=trace.distinct(fields, reason),
        is_constant=value.is_constant,
    )


def _slices(labels: Ids, axis: int, part: slice) -> tuple[slice, ...]:
    """Return an index that takes a part of one axis."""
    return tuple(part if place == axis else slice(None) for place in range(labels.ndim))


def slice_(trace: Trace, node: NodeProto, inputs: Inputs) -> list[Value]:
    """Take a range of every axis that is named."""
    value, shape = source(inputs), output_shapes(trace, node)[0]
    starts, ends = trace.constant(node, 1), trace.constant(node, 2)
    if starts is None or ends is None:
        trace.freeze(value, f"sliced at bounds that are computed at {where(node)}")
        return [Value(shape=shape, is_constant=value.is_constant)]
    axes = trace.axes(node, 3, range(starts.size))
    given = trace.constant(node, 4)
    steps = [1] * len(axes) if given is None else [int(step) for step in given.reshape(-1)]
    fields = list(value.fields)
    for index, named in enumerate(axes):
        axis = named % len(value.shape)
        extent = value.shape[axis]
        bounds = slice(int(starts.reshape(-1)[index]), int(ends.reshape(-1)[index]), steps[index])
        start, stop, step = bounds.indices(extent)
        if step != 1 and (start, stop, step) != (0, extent, 1):
            fields = trace.fix(fields, axis, f"every n-th channel is taken at {where(node)}")
            continue
        for place, labels in enumerate(fields):
            if labels.shape[axis] == 1:
                continue
            flat = labels_along(labels, axis)
            trace.count(node, 1, index, flat[:start])
            if stop < extent:
                trace.count(node, 2, index, flat[:stop])
            elif int(ends.reshape(-1)[index]) <= extent:
                trace.count(node, 2, index, flat)
            fields[place] = squash(labels[_slices(labels, axis, slice(start, stop))])
    return [_cut(trace, node, value, fields, shape)]


def gather(trace: Trace, node: NodeProto, inputs: Inputs) -> list[Value]:
    """Pick positions of one axis by index: the axis is fixed, the others stay."""
    value, shape = source(inputs), output_shapes(trace, node)[0]
    axis = attributes(node).get("axis", 0) % len(value.shape)
    fields = trace.fix(value.fields, axis, f"channels are picked by index at {where(node)}")
    picked = len(shape) - len(value.shape) + 1
    moved_fields = [
        labels.reshape((*labels.shape[:axis], *(1,) * picked, *labels.shape[axis + 1 :]))
        for labels in fields
    ]
    constant = value.is_constant and all(v.is_constant for v in present(inputs))
    return [Value(shape=shape, fields=tuple(moved_fields), is_constant=constant)]


def gather_nd(trace: Trace, node: NodeProto, inputs: Inputs) -> list[Value]:
    """Pick by index tuples: the axes that they address are fixed, the others stay."""
    value, indices = source(inputs), inputs[1]
    assert indices is not None
    shape = output_shapes(trace, node)[0]
    batches = attributes(node).get("batch_dims", 0)
    addressed = batches + indices.shape[-1]
    fields = list(value.fields)
    for axis in range(addressed):
        fields = trace.fix(fields, axis, f"channels are picked by index at {where(node)}")
    picked = (1,) * (len(indices.shape) - 1)
    kept = tuple(labels.reshape((*picked, *labels.shape[addressed:])) for labels in fields)
    constant = value.is_constant and indices.is_constant
    return [Value(shape=shape, fields=kept, is_constant=constant)]


def concat(trace: Trace, node: NodeProto, inputs: Inputs) -> list[Value]:
    """Lay values side by side along one axis."""
    shape, values = output_shapes(trace, node)[0], present(inputs)
    axis = attributes(node)["axis"] % len(shape)
    # Along the other axes the values must keep the same positions.
    across = [
        Value(
            shape=tuple(1 if a == axis else e for a, e in enumerate(v.shape)),
            fields=tuple(f for f in v.fields if f.shape[axis] == 1),
        )
        for v in values
    ]
    beside = [[f for f in v.fields if f.shape[axis] > 1] for v in values]
    reason = f"meets a fixed size at {where(node)}"
    others = {a for v in values for f in v.fields if f.shape[axis] > 1 for a in axes_of(f)} - {axis}
    for other in others:  # a field that varies along both: only along the joined axis
        beside = [trace.fix(fields, other, reason) for fields in beside]
        across = [
            Value(shape=v.shape, fields=tuple(trace.fix(v.fields, other, reason))) for v in across
        ]
    fields = list(
        trace.join(across, tuple(1 if a == axis else e for a, e in enumerate(shape)), reason)
    )
    parts = []
    for value, mine in zip(values, beside, strict=True):
        extent = value.shape[axis]
        parts.append(mine[0].reshape(-1) if mine else np.zeros(extent, dtype=np.int64))
    vector = np.concatenate(parts)
    if vector.any() and vector.size > 1:
        fields.append(along(vector, len(shape), axis))
    constant = all(v.is_constant for v in values)
    return [Value(shape=shape, fields=tuple(fields), is_constant=constant)]


def expand(trace: Trace, node: NodeProto, inputs: Inputs) -> list[Value]:
    """Repeat along axes of size 1: a repeated axis gets ids of its own, and its count is noted."""
    value, shape = source(inputs), output_shapes(trace, node)[0]
    rank = len(shape)
    fields = [f.reshape((1,) * (rank - f.ndim) + f.shape) for f in value.fields]
    before = (1,) * (rank - len(value.shape)) + value.shape
    target = trace.constant(node, 1)
    for axis in range(rank):
        if before[axis] == 1 and shape[axis] > 1 and target is not None:
            fields.append(along(trace.unions.fresh(shape[axis]), rank, axis))
        for labels in fields:
            if labels.shape[axis] > 1 and target is not None:
                index = axis - (rank - target.size)
                if node.op_type == "Tile" and before[axis] > 1:
                    continue
                if index >= 0 and target.reshape(-1)[index] > 1:
                    trace.count(node, 1, index, labels_along(labels, axis))
    return [Value(shape=shape, fields=tuple(fields), is_constant=value.is_constant)]


def tile(trace: Trace, node: NodeProto, inputs: Inputs) -> list[Value]:
    """Repeat whole values along axes."""
    value, shape = source(inputs), output_shapes(trace, node)[0]
    if trace.constant(node, 1) is None:
        trace.freeze(value, f"repeated a computed number of times at {where(node)}")
        return [Value(shape=shape, is_constant=value.is_constant)]
    copies = [new // old for new, old in zip(shape, value.shape, strict=True)]
    repeated = [
        np.tile(f, [c if f.shape[axis] > 1 else 1 for axis, c in enumerate(copies)])
        for f in value.fields
    ]
    inner = Value(shape=value.shape, fields=tuple(repeated), is_constant=value.is_constant)
    return expand(trace, node, [inner])


def pad(trace: Trace, node: NodeProto, inputs: Inputs) -> list[Value]:
    """Add positions at the ends of axes; what is added along a channel axis has ids of its own."""
    value, shape = source(inputs), output_shapes(trace, node)[0]
    amounts = trace.constant(node, 1)
    if amounts is None:
        amounts = np.array(attributes(node).get("pads", ()), dtype=np.int64)
    if amounts.size == 0:
        trace.freeze(value, f"padded by a computed amount at {where(node)}")
        return [Value(shape=shape, is_constant=value.is_constant)]
    axes = trace.axes(node, 3, range(len(shape))) if len(node.input) > 3 else range(len(shape))
    amounts = amounts.reshape(2, -1)
    fields = list(value.fields)
    is_plain = attributes(node).get("mode", "constant") == "constant" and len(node.input) > 1
    for index, named in enumerate(axes):
        axis = named % len(shape)
        begin, end = int(amounts[0, index]), int(amounts[1, index])
        if begin == end == 0:
            continue
        if not is_plain or begin < 0 or end < 0:
            fields = trace.fix(fields, axis, f"channels are padded by copies at {where(node)}")
            continue
        for place, labels in enumerate(fields):
            if labels.shape[axis] > 1:
                fields[place] = _padded(trace, labels, axis, begin, end)
                flat = labels_along(fields[place], axis)
                if begin:
                    trace.count(node, 1, index, flat[:begin])
                if end:
                    trace.count(node, 1, index + amounts.shape[1], flat[flat.shape[0] - end :])
    return [Value(shape=shape, fields=tuple(fields), is_constant=value.is_constant)]


def _padded(trace: Trace, labels: Ids, axis: int, begin: int, end: int) -> Ids:
    """Return labels with fresh ids before and behind an axis."""

    def fresh(extent: int) -> Ids:
        sizes = [extent if place == axis else size for place, size in enumerate(labels.shape)]
        return np.broadcast_to(along(trace.unions.fresh(extent), labels.ndim, axis), sizes)

    return np.concatenate([fresh(begin), labels, fresh(end)], axis=axis)


def depth_to_space(trace: Trace, node: NodeProto, inputs: Inputs) -> list[Value]:
    """Turn channels into pixels: the channels that make one output channel go together."""
    value, shape = source(inputs), output_shapes(trace, node)[0]
    options = attributes(node)
    block = options["blocksize"] ** 2
    vector = trace.channels(value.fields, 1, f"channels become pixels at {where(node)}")
    if vector is None:
        return [Value(shape=shape, is_constant=value.is_constant)]
    is_first = options.get("mode", "DCR") == "DCR"
    grid = vector.reshape(block, -1) if is_first else vector.reshape(-1, block).T
    trace.unions.unite(grid[:1], grid)
    return [moved(trace, node, value, [along(grid[0], len(shape), 1)], shape)]


def space_to_depth(trace: Trace, node: NodeProto, inputs: Inputs) -> list[Value]:
    """Turn pixels into channels: the channels that one channel's pixels become go together."""
    value, shape = source(inputs), output_shapes(trace, node)[0]
    vector = trace.channels(value.fields, 1, f"pixels become channels at {where(node)}")
    if vector is None:
        return [Value(shape=shape, is_constant=value.is_constant)]
    repeated = np.tile(vector, attributes(node)["blocksize"] ** 2)
    return [moved(trace, node, value, [along(repeated, len(shape), 1)], shape)]

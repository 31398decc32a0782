"""Rules of the layers that make new channels: convolutions and matrix products."""

import numpy as np
from onnx import NodeProto

from hardware.graph.model import attributes
from pipeline.channels.choices import Option
from pipeline.channels.labels import Value, along, axes_of, squash
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


def conv(trace: Trace, node: NodeProto, inputs: Inputs) -> list[Value]:
    """Convolve: the weight reads the input's channels and makes channels of its own."""
    value, weight = source(inputs), inputs[1]
    assert weight is not None
    shape = output_shapes(trace, node)[0]
    groups = int(attributes(node).get("group", 1))
    if value.shape[1] == shape[1] == 1 and value.fields:
        return [_along_channels(trace, node, value, weight, shape)]
    reads = trace.channels(value.fields, 1, f"meets a fixed size at {where(node)}")
    makes, takes = _two_axes(trace, weight, node)
    if makes is None:
        _read(trace, reads, takes, node)
        return [Value(shape=shape)]
    _add_bias(trace, inputs, makes, node)
    if groups == 1:
        trace.unions.mark(makes, "filter")
        _read(trace, reads, takes, node)
    elif takes is None and not _is_grouped(trace, makes):
        _depthwise(trace, node, reads, makes, value.shape[1])
    else:
        trace.unions.mark(makes, "filter")
        _grouped(trace, node, reads, makes, takes, groups)
    return [_channels_out(makes, shape, value, weight)]


def _along_channels(
    trace: Trace, node: NodeProto, value: Value, weight: Value, shape: tuple[int, ...]
) -> Value:
    """Convolve one map whose pixels are channels, as ECA's gate does: neighbours are mixed."""
    reason = f"channels lie among pixels at {where(node)}"
    trace.freeze(weight, reason)
    fields = list(value.fields)
    steps = attributes(node).get("strides", [1] * (len(shape) - 2))
    for axis, (before, after) in enumerate(zip(value.shape, shape, strict=True)):
        if axis < 2 or before != after or steps[axis - 2] != 1:
            fields = trace.fix(fields, axis, reason)
    for labels in fields:
        trace.unions.mix(labels, axes_of(labels), node.op_type)
    return Value(shape=shape, fields=tuple(fields))


def conv_transpose(trace: Trace, node: NodeProto, inputs: Inputs) -> list[Value]:
    """Convolve backwards: the weight's first axis reads, its second makes."""
    value, weight = source(inputs), inputs[1]
    assert weight is not None
    shape = output_shapes(trace, node)[0]
    groups = int(attributes(node).get("group", 1))
    reads = trace.channels(value.fields, 1, f"meets a fixed size at {where(node)}")
    takes, makes = _two_axes(trace, weight, node)
    if groups > 1 and makes is None and takes is not None:
        _depthwise(trace, node, reads, takes, value.shape[1])
        if shape[1] == takes.size:
            _add_bias(trace, inputs, takes, node)
            return [_channels_out(takes, shape, value, weight)]
    _read(trace, reads, takes, node)
    if makes is None:
        return [Value(shape=shape)]
    trace.unions.mark(makes, "filter")
    if groups > 1:
        if takes is not None:
            rows = takes.reshape(groups, -1)
            trace.unions.unite(rows[:1], rows)
        makes = np.tile(makes, groups)
    _add_bias(trace, inputs, makes, node)
    return [_channels_out(makes, shape, value, weight)]


def _two_axes(trace: Trace, weight: Value, node: NodeProto) -> tuple[Ids | None, Ids | None]:
    """Return the ids along a weight's first and second axis; None where an axis is fixed."""
    reason = f"computed weights mix their axes at {where(node)}"
    fields = list(weight.fields)
    for axis in range(2, len(weight.shape)):
        fields = trace.fix(fields, axis, reason)
    both = [f for f in fields if f.shape[0] > 1 and f.shape[1] > 1]
    fields = [f for f in fields if not any(f is other for other in both)]
    fields += trace.fix(both, 1, reason)
    first = trace.channels([f for f in fields if f.shape[0] > 1], 0, reason)
    second = trace.channels([f for f in fields if f.shape[1] > 1], 1, reason)
    return first, second


def _read(trace: Trace, reads: Ids | None, takes: Ids | None, node: NodeProto) -> None:
    """Unite what arrives with what the weight expects."""
    reason = f"meets a fixed size at {where(node)}"
    if takes is not None:
        trace.unions.mark(takes, "input")
    if reads is not None and takes is not None:
        trace.unions.unite(reads, takes)
    elif takes is not None:
        trace.unions.freeze(takes, reason)
    elif reads is not None:
        trace.unions.freeze(reads, reason)


def _add_bias(trace: Trace, inputs: Inputs, makes: Ids, node: NodeProto) -> None:
    """Unite a bias with the channels it is added to."""
    bias = inputs[2] if len(inputs) > 2 else None
    if bias is None:
        return
    ids = trace.channels(bias.fields, 0, f"meets a fixed size at {where(node)}")
    if ids is None:
        trace.unions.freeze(makes, f"has a fixed bias at {where(node)}")
        return
    trace.unions.mark(ids, "bias")
    trace.unions.unite(ids, makes)


def _depthwise(
    trace: Trace, node: NodeProto, reads: Ids | None, makes: Ids, in_channels: int
) -> None:
    """Tie every input channel to the filters that read it alone."""
    trace.unions.mark(makes, "depthwise")
    if reads is None:
        trace.unions.freeze(makes, f"meets a fixed size at {where(node)}")
        return
    trace.unions.unite(reads[:, None], makes.reshape(in_channels, -1))
    trace.sizes.append(Sized(node=node.name, attribute="group", ids=reads))


def _is_grouped(trace: Trace, makes: Ids) -> bool:
    """Return whether filters are known to belong to a grouped convolution, not a depthwise one."""
    blocks = (trace.unions.blocks[index] for index in trace.unions.blocks_of(makes))
    return any(block.parameter in trace.grouped for block in blocks)


def _grouped(
    trace: Trace, node: NodeProto, reads: Ids | None, makes: Ids, takes: Ids | None, groups: int
) -> None:
    """Tie the same position of all groups, or let whole groups go: what leaves more to remove."""
    rows_out = makes.reshape(groups, -1)
    if takes is None:  # carved to one input channel per group: no axis is left to tie
        takes = trace.unions.fresh(1)
    trace.unions.mark(takes, "input")
    if reads is None:
        trace.unions.freeze(takes, f"meets a fixed size at {where(node)}")
        trace.unions.unite(rows_out[:1], rows_out)
        return
    rows_in = reads.reshape(groups, -1)
    counted = trace.unions.fresh(groups)
    fixed = f"belongs to a group of {where(node)}"
    positions = Option(
        unions=((takes[None], rows_in), (rows_out[:1], rows_out)), frozen=((counted, fixed),)
    )
    whole = Option(
        unions=((counted[:, None], rows_in), (counted[:, None], rows_out)),
        frozen=((takes, fixed),),
    )
    trace.choices.append((positions, whole))
    trace.sizes.append(Sized(node=node.name, attribute="group", ids=counted))


def _channels_out(ids: Ids, shape: tuple[int, ...], value: Value, weight: Value) -> Value:
    """Return a value whose second axis has these ids."""
    fields = (along(ids, len(shape), 1),) if ids.size > 1 else ()
    return Value(shape=shape, fields=fields, is_constant=value.is_constant and weight.is_constant)


def matmul(trace: Trace, node: NodeProto, inputs: Inputs) -> list[Value]:
    """Multiply matrices: the summed axis of both sides is one, the other axes stay."""
    left, right = present(inputs)[:2]
    shape = output_shapes(trace, node)[0]
    one = _at_least_2d(left, 0)
    other = _at_least_2d(right, 1)
    batch = _broadcast(one.shape[:-2], other.shape[:-2])
    grid = (*batch, one.shape[-2], one.shape[-1], other.shape[-1])
    rows = Value(shape=(*one.shape, 1), fields=tuple(f[..., None] for f in one.fields))
    columns = Value(
        shape=(*other.shape[:-2], 1, *other.shape[-2:]),
        fields=tuple(f[..., None, :, :] for f in other.fields),
    )
    _mark(trace, one, -1, -2)
    _mark(trace, other, -2, -1)
    fields = trace.join([rows, columns], grid, f"meets a fixed size at {where(node)}")
    if not (left.is_constant or right.is_constant):  # no weight reads them: nothing to mask
        for labels in fields:
            if labels.shape[len(grid) - 2] > 1:
                trace.unions.mix(labels, (len(grid) - 2,), node.op_type)
    kept = _summed(trace, fields, len(grid) - 2, node)
    rank = len(grid) - 1
    kept = [f.reshape((1,) * (rank - f.ndim) + f.shape) for f in kept]
    if len(left.shape) == 1:
        kept = [f.reshape((*f.shape[:-2], f.shape[-1])) for f in kept]
    if len(right.shape) == 1:
        kept = [f.reshape(f.shape[:-1]) for f in kept]
    return [
        Value(
            shape=shape,
            fields=tuple(kept),
            is_constant=left.is_constant and right.is_constant,
        )
    ]


def _broadcast(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(extent) for extent in np.broadcast_shapes(one, other))


def _at_least_2d(value: Value, axis: int) -> Value:
    """Return a vector as a matrix with a new axis of size 1, a matrix as it is."""
    if len(value.shape) > 1:
        return value
    return Value(
        shape=tuple(int(n) for n in np.expand_dims(np.empty(value.shape), axis).shape),
        fields=tuple(np.expand_dims(f, axis) for f in value.fields),
        is_constant=value.is_constant,
    )


def _mark(trace: Trace, value: Value, summed: int, made: int) -> None:
    """Mark the axes of a constant factor: the one that is summed over reads, the other makes."""
    if not value.is_constant:
        return
    for labels in value.fields:
        if labels.shape[summed] > 1:
            trace.unions.mark(labels, "input")
        elif labels.shape[made] > 1:
            trace.unions.mark(labels, "filter")


def _summed(trace: Trace, fields: tuple[Ids, ...], axis: int, node: NodeProto) -> list[Ids]:
    """Return fields after a sum over an axis; those that vary along it end there."""
    kept = []
    for labels in fields:
        if labels.shape[axis] == 1:
            kept.append(labels.reshape((*labels.shape[:axis], *labels.shape[axis + 1 :])))
            continue
        rest = [labels]
        for other in axes_of(labels):
            if other != axis:
                rest = trace.fix(rest, other, f"meets a fixed size at {where(node)}")
    return kept


def gemm(trace: Trace, node: NodeProto, inputs: Inputs) -> list[Value]:
    """Multiply two matrices and add a bias."""
    options = attributes(node)
    factors = [
        _transposed(value) if options.get(flag, 0) else value
        for value, flag in zip(present(inputs)[:2], ("transA", "transB"), strict=True)
    ]
    (product,) = matmul(trace, node, factors)
    bias = inputs[2] if len(inputs) > 2 else None
    if bias is None:
        return [product]
    for labels in bias.fields:
        trace.unions.mark(labels, "bias")
    fields = trace.join([product, bias], product.shape, f"meets a fixed size at {where(node)}")
    return [Value(shape=product.shape, fields=fields, is_constant=product.is_constant)]


def _transposed(value: Value) -> Value:
    """Return a matrix with its axes exchanged."""
    return Value(
        shape=value.shape[::-1],
        fields=tuple(squash(f.T) for f in value.fields),
        is_constant=value.is_constant,
    )

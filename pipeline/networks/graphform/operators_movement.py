"""Operators that move elements and compute nothing."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.networks.graphform.node import Node

# ONNX element types; floating ones are left out: casts between them follow the module's dtype.
INTEGERS = {
    2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
}  # fmt: skip


def reshape(node: Node, x: Tensor, *_: Tensor) -> Tensor:
    """Compute Reshape; 0 copies the length from the input."""
    target = node.integers(1) or []
    if not node.get("allowzero", 0):
        target = [x.shape[axis] if size == 0 else size for axis, size in enumerate(target)]
    return x.reshape(target)


def flatten(node: Node, x: Tensor) -> Tensor:
    """Compute Flatten, which leaves two axes."""
    axis = int(node.get("axis", 1)) % (x.ndim + 1)
    if axis == 0:
        return x.reshape(1, -1)
    return x.flatten(axis).flatten(0, axis - 1) if axis < x.ndim else x.reshape(-1, 1)


def squeeze(node: Node, x: Tensor, *_: Tensor) -> Tensor:
    """Compute Squeeze."""
    axes = node.integers(1) if len(node.inputs) > 1 else node.get("axes", None)
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def unsqueeze(node: Node, x: Tensor, *_: Tensor) -> Tensor:
    """Compute Unsqueeze, whose axes count in the result."""
    axes = (node.integers(1) if len(node.inputs) > 1 else node.get("axes", [])) or []
    for axis in sorted(axis % (x.ndim + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def transpose(node: Node, x: Tensor) -> Tensor:
    """Compute Transpose; without an order all axes are reversed."""
    return x.permute(node.get("perm", list(range(x.ndim))[::-1]))


def concat(node: Node, *parts: Tensor) -> Tensor:
    """Compute Concat."""
    return torch.cat(parts, dim=node.get("axis", 1))


def split(node: Node, x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    """Compute Split."""
    axis = node.get("axis", 0)
    sizes = node.integers(1) if len(node.inputs) > 1 else node.get("split", None)
    if sizes is None:
        step = -(-x.shape[axis] // len(node.outputs))
        return torch.split(x, step, dim=axis)
    return torch.split(x, sizes, dim=axis)


def slice_(node: Node, x: Tensor, *_: Tensor) -> Tensor:
    """Compute Slice."""
    starts, ends = node.integers(1), node.integers(2)
    if starts is None or ends is None:
        raise node.refuse("it has no bounds")
    axes = node.integers(3) or list(range(len(starts)))
    steps = node.integers(4) or [1] * len(starts)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step > 0:
            place = [slice(None)] * (axis % x.ndim) + [slice(start, end, step)]
            x = x[tuple(place)]
        else:
            picks = list(range(x.shape[axis]))[start:end:step]
            x = x.index_select(axis, torch.tensor(picks, device=x.device))
    return x


def gather(node: Node, x: Tensor, indices: Tensor) -> Tensor:
    """Compute Gather."""
    axis = int(node.get("axis", 0)) % x.ndim
    indices = indices % x.shape[axis]  # negative ones count from the end
    shape = [*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]]
    return x.index_select(axis, indices.reshape(-1)).reshape(shape)


def gather_nd(node: Node, x: Tensor, indices: Tensor) -> Tensor:
    """Compute GatherND: the last axis of the indices is a place in `x`, behind its batch axes."""
    batches, depth = int(node.get("batch_dims", 0)), indices.shape[-1]
    count = math.prod(indices.shape[:batches])
    data, places = x.reshape(count, *x.shape[batches:]), indices.reshape(count, -1, depth)
    batch = torch.arange(count, device=x.device).unsqueeze(1)
    picked = data[(batch, *places.unbind(-1))]
    return picked.reshape(*indices.shape[:-1], *x.shape[batches + depth :])


def pad(node: Node, x: Tensor, *_: Tensor | None) -> Tensor:
    """Compute Pad."""
    amounts = node.integers(1) if len(node.inputs) > 1 else node.get("pads", None)
    axes = node.integers(3) or list(range(x.ndim))
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    if amounts is None or (kind := node.get("mode", "constant")) not in mode:
        raise node.refuse("torch knows no such padding")
    both = {a % x.ndim: (amounts[i], amounts[i + len(axes)]) for i, a in enumerate(axes)}
    first = min((axis for axis, amount in both.items() if any(amount)), default=x.ndim)
    flat = [n for axis in reversed(range(first, x.ndim)) for n in both.get(axis, (0, 0))]
    if not flat:
        return x
    if kind != "constant":
        return functional.pad(x, flat, mode=mode[kind])
    value = node.constant(2)
    filler = node.get("value", 0.0) if value is None else float(value[0])
    return functional.pad(x, flat, value=filler)


def expand(node: Node, x: Tensor, *_: Tensor) -> Tensor:
    """Compute Expand; both sides broadcast."""
    target = node.integers(1) or []
    rank = max(len(target), x.ndim)
    asked, own = [1] * (rank - len(target)) + target, [1] * (rank - x.ndim) + list(x.shape)
    return x.expand([b if a == 1 else a for a, b in zip(asked, own, strict=True)])


def tile(node: Node, x: Tensor, *_: Tensor) -> Tensor:
    """Compute Tile."""
    return x.repeat(node.integers(1) or [])


def cast(node: Node, x: Tensor) -> Tensor:
    """Compute Cast; a floating type stays the one that the module computes in."""
    kind = node.get("to", 1)
    if kind in INTEGERS:
        return x.to(INTEGERS[kind])
    return x if x.is_floating_point() else x.to(torch.get_default_dtype())


def cast_like(node: Node, x: Tensor, like: Tensor) -> Tensor:
    """Compute CastLike."""
    return x.to(like.dtype)


def depth_to_space(node: Node, x: Tensor) -> Tensor:
    """Compute DepthToSpace; the channels' order is that of the mode."""
    size = node.get("blocksize", 1)
    if node.get("mode", "DCR") == "CRD":
        return functional.pixel_shuffle(x, size)
    n, channels, height, width = x.shape
    x = x.reshape(n, size, size, channels // size**2, height, width)
    x = x.permute(0, 3, 4, 1, 5, 2)
    return x.reshape(n, channels // size**2, height * size, width * size)


def space_to_depth(node: Node, x: Tensor) -> Tensor:
    """Compute SpaceToDepth."""
    size = node.get("blocksize", 1)
    n, channels, height, width = x.shape
    x = x.reshape(n, channels, height // size, size, width // size, size)
    x = x.permute(0, 3, 5, 1, 2, 4)
    return x.reshape(n, channels * size**2, height // size, width // size)

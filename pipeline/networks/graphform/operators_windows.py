"""Operators that look through windows: convolutions, pooling, resizing."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.networks.graphform.node import Node

CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
TRANSPOSED = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)
MAX_POOLS = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)
AVERAGES: tuple[Callable[..., Tensor], ...] = (
    functional.avg_pool1d,
    functional.avg_pool2d,
    functional.avg_pool3d,
)
MODES = {"linear": ("linear", "bilinear", "trilinear"), "cubic": ("", "bicubic", "")}


def paddings(node: Node, sizes: Sequence[int], kernel: Sequence[int]) -> list[tuple[int, int]]:
    """Return how much is padded before and behind every spatial axis.

    Args:
        node: with its strides, dilations and pads.
        sizes: of the input.
        kernel: of the window.
    """
    count = len(kernel)
    mode = node.get("auto_pad", "NOTSET")
    if mode == "NOTSET":
        pads = node.get("pads", [0] * 2 * count)
        return [(pads[axis], pads[axis + count]) for axis in range(count)]
    if mode == "VALID":
        return [(0, 0)] * count
    strides, dilations = node.get("strides", [1] * count), node.get("dilations", [1] * count)
    found = []
    for size, extent, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        reach = dilation * (extent - 1) + 1
        total = max(0, (-(-size // stride) - 1) * stride + reach - size)
        small, large = total // 2, total - total // 2
        found.append((small, large) if mode == "SAME_UPPER" else (large, small))
    return found


def is_symmetric(pads: Sequence[tuple[int, int]]) -> bool:
    """Return whether torch's own padding can say it."""
    return all(before == behind for before, behind in pads)


def pad_pixels(x: Tensor, pads: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    """Return images with their pixels padded."""
    flat = [amount for before, behind in reversed(pads) for amount in (before, behind)]
    return functional.pad(x, flat, value=value)


def conv(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute Conv."""
    count = weight.ndim - 2
    pads = paddings(node, x.shape[2:], weight.shape[2:])
    if not is_symmetric(pads):
        x, pads = pad_pixels(x, pads), [(0, 0)] * count
    return CONVOLUTIONS[count - 1](
        x,
        weight,
        bias,
        stride=node.get("strides", [1] * count),
        padding=[before for before, _ in pads],
        dilation=node.get("dilations", [1] * count),
        groups=node.get("group", 1),
    )


def conv_transpose(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ConvTranspose."""
    count = weight.ndim - 2
    if node.get("auto_pad", "NOTSET") != "NOTSET" or "output_shape" in node.attributes:
        raise node.refuse("auto_pad and output_shape are not supported, only pads")
    pads = paddings(node, x.shape[2:], weight.shape[2:])
    if not is_symmetric(pads):
        raise node.refuse(f"pads {pads} differ before and behind")
    return TRANSPOSED[count - 1](
        x,
        weight,
        bias,
        stride=node.get("strides", [1] * count),
        padding=[before for before, _ in pads],
        output_padding=node.get("output_padding", [0] * count),
        groups=node.get("group", 1),
        dilation=node.get("dilations", [1] * count),
    )


def max_pool(node: Node, x: Tensor) -> Tensor:
    """Compute MaxPool, without the indices of the largest values."""
    kernel = node.get("kernel_shape", [])
    pads = paddings(node, x.shape[2:], kernel)
    if len(node.outputs) > 1 and node.outputs[1]:
        raise node.refuse("its second output, the indices, is read")
    ceil, fits = bool(node.get("ceil_mode", 0)), is_symmetric(pads)
    if not fits or any(2 * b > k for (b, _), k in zip(pads, kernel, strict=True)):
        x, pads = pad_pixels(x, pads, -math.inf), [(0, 0)] * len(kernel)
    return MAX_POOLS[len(kernel) - 1](
        x,
        kernel,
        stride=node.get("strides", [1] * len(kernel)),
        padding=[before for before, _ in pads],
        dilation=node.get("dilations", [1] * len(kernel)),
        ceil_mode=ceil,
    )


def average_pool(node: Node, x: Tensor) -> Tensor:
    """Compute AveragePool."""
    kernel = node.get("kernel_shape", [])
    pads = paddings(node, x.shape[2:], kernel)
    if any(dilation != 1 for dilation in node.get("dilations", [])):
        raise node.refuse("dilated averages are not supported")
    pool = AVERAGES[len(kernel) - 1]
    options = {
        "stride": node.get("strides", [1] * len(kernel)),
        "ceil_mode": bool(node.get("ceil_mode", 0)),
    }
    counts_pads = bool(node.get("count_include_pad", 0))
    if is_symmetric(pads) and all(2 * b <= k for (b, _), k in zip(pads, kernel, strict=True)):
        padding = [before for before, _ in pads]
        return pool(x, kernel, padding=padding, count_include_pad=counts_pads, **options)
    mean = pool(pad_pixels(x, pads), kernel, **options)
    if counts_pads:
        return mean
    return mean / pool(pad_pixels(torch.ones_like(x[:1, :1]), pads), kernel, **options)


def global_pool(reduce: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the operator that reduces all pixels of an image to one."""

    def pool(node: Node, x: Tensor) -> Tensor:
        return reduce(x, dim=tuple(range(2, x.ndim)), keepdim=True)

    return pool


def resize(node: Node, x: Tensor, *_: Tensor | None) -> Tensor:
    """Compute Resize and Upsample, of pixels only."""
    scales_at, sizes_at = (1, 3) if node.operator == "Upsample" or node.opset < 11 else (2, 3)
    scales, sizes = node.constant(scales_at), node.integers(sizes_at)
    if node.get("axes", None) is not None:
        raise node.refuse("it names axes; only all axes are supported")
    mode, antialias = _mode(node, x.ndim - 2), bool(node.get("antialias", 0))
    aligned = node.get("coordinate_transformation_mode", "half_pixel") == "align_corners"
    corners = None if mode.startswith("nearest") else aligned
    if sizes:
        return functional.interpolate(
            x, size=sizes[2:], mode=mode, align_corners=corners, antialias=antialias
        )
    if scales is None or not scales or any(scale != 1 for scale in scales[:2]):
        raise node.refuse("it resizes other axes than those of pixels")
    factors = [float(scale) for scale in scales[2:]]
    return functional.interpolate(
        x, scale_factor=factors, mode=mode, align_corners=corners, antialias=antialias
    )


def _mode(node: Node, count: int) -> str:
    """Return torch's name of the interpolation."""
    is_old = node.operator == "Upsample" or node.opset < 11
    default = "asymmetric" if is_old else "half_pixel"
    place = node.get("coordinate_transformation_mode", default)
    mode = node.get("mode", "nearest")
    if mode == "nearest":
        rounding = node.get("nearest_mode", "floor" if is_old else "round_prefer_floor")
        if (place, rounding) == ("asymmetric", "floor"):
            return "nearest"
        if place == "half_pixel" and rounding.startswith("round"):
            return "nearest-exact"
        raise node.refuse(f"nearest by {place} and {rounding} is not known to torch")
    torch_mode = MODES.get(mode, ("", "", ""))[count - 1]
    if not torch_mode or place not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        raise node.refuse(f"{mode} by {place} on {count} axes is not known to torch")
    return torch_mode

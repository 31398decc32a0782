"""ONNX operators in torch: one pure function each, of a node and its input tensors."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.networks.graphform import operators_movement as moving
from pipeline.networks.graphform import operators_windows as windows
from pipeline.networks.graphform.node import Node

# Of a node and one tensor (or None, where an input is left out) per input.
Operator = Callable[..., Tensor | tuple[Tensor, ...]]


def plain(function: Callable[..., Tensor]) -> Operator:
    """Return the operator that a function of torch is, whatever the node says."""

    def run(node: Node, *inputs: Tensor) -> Tensor:
        return function(*inputs)

    return run


def folded(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """Return the operator that joins any number of tensors two by two."""

    def run(node: Node, *inputs: Tensor) -> Tensor:
        return functools.reduce(function, inputs)

    return run


def mean(node: Node, *inputs: Tensor) -> Tensor:
    """Compute Mean, of any number of tensors."""
    return functools.reduce(torch.add, inputs) / len(inputs)


def divide(node: Node, x: Tensor, y: Tensor) -> Tensor:
    """Compute Div; whole numbers give a whole number."""
    is_whole = not (x.is_floating_point() or y.is_floating_point())
    return torch.div(x, y, rounding_mode="trunc" if is_whole else None)


def clip(node: Node, x: Tensor, *_: Tensor | None) -> Tensor:
    """Compute Clip."""
    low, high = node.constant(1), node.constant(2)
    bounds = (
        node.get("min", None) if low is None else float(low[0]),
        node.get("max", None) if high is None else float(high[0]),
    )
    return x if bounds == (None, None) else x.clamp(*bounds)


def prelu(node: Node, x: Tensor, slope: Tensor) -> Tensor:
    """Compute PRelu; the slope broadcasts from the last axis on."""
    return torch.where(x < 0, slope * x, x)


def softmax(function: Callable[..., Tensor]) -> Operator:
    """Return Softmax or LogSoftmax; before opset 13 over all axes from `axis` on."""

    def run(node: Node, x: Tensor) -> Tensor:
        if node.opset >= 13:
            return function(x, dim=node.get("axis", -1))
        axis = int(node.get("axis", 1)) % x.ndim
        return function(x.flatten(axis), dim=-1).reshape(x.shape)

    return run


def reduction(function: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> Operator:
    """Return a Reduce operator; without axes over all of them."""

    def run(node: Node, x: Tensor, *_: Tensor | None) -> Tensor:
        axes = node.integers(1) if len(node.inputs) > 1 else node.get("axes", None)
        if not axes and node.get("noop_with_empty_axes", 0):
            return x
        every = tuple(axes) if axes else tuple(range(x.ndim))
        return function(x, every, bool(node.get("keepdims", 1)))

    return run


def gemm(node: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """Compute Gemm."""
    a = a.t() if node.get("transA", 0) else a
    b = b.t() if node.get("transB", 0) else b
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    product: Tensor = a @ b
    product = product if alpha == 1 else product * alpha
    if c is None:
        return product
    return product + (c if beta == 1 else c * beta)


def batch_norm(
    node: Node, x: Tensor, scale: Tensor, bias: Tensor, average: Tensor, variance: Tensor
) -> Tensor:
    """Compute a BatchNormalization that is no layer: with fixed statistics, or the batch's own."""
    epsilon = node.get("epsilon", 1e-5)
    if node.get("training_mode", 0):
        return functional.batch_norm(x, None, None, scale, bias, True, 0.0, epsilon)
    return functional.batch_norm(x, average, variance, scale, bias, False, 0.0, epsilon)


def instance_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Compute InstanceNormalization."""
    return functional.instance_norm(x, weight=scale, bias=bias, eps=node.get("epsilon", 1e-5))


def group_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Compute GroupNormalization: before opset 21 with a scale per group, then one per channel."""
    groups = node.get("num_groups", 1)
    if len(scale) != x.shape[1]:
        scale, bias = (part.repeat_interleave(x.shape[1] // groups) for part in (scale, bias))
    return functional.group_norm(x, groups, scale, bias, node.get("epsilon", 1e-5))


def layer_norm(node: Node, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute LayerNormalization, over all axes from `axis` on."""
    shape = x.shape[int(node.get("axis", -1)) % x.ndim :]
    shift = None if bias is None else bias.expand(shape)
    return functional.layer_norm(x, shape, scale.expand(shape), shift, node.get("epsilon", 1e-5))


def rms_norm(node: Node, x: Tensor, scale: Tensor) -> Tensor:
    """Compute RMSNormalization, over all axes from `axis` on."""
    shape = x.shape[int(node.get("axis", -1)) % x.ndim :]
    return functional.rms_norm(x, list(shape), scale.expand(shape), node.get("epsilon", 1e-5))


def local_norm(node: Node, x: Tensor) -> Tensor:
    """Compute LRN, which normalises by neighbouring channels."""
    options = node.get("alpha", 1e-4), node.get("beta", 0.75), node.get("bias", 1.0)
    return functional.local_response_norm(x, node.get("size", 1), *options)


def lp_norm(node: Node, x: Tensor) -> Tensor:
    """Compute LpNormalization."""
    axis, power = node.get("axis", -1), node.get("p", 2)
    size: Tensor = torch.linalg.vector_norm(x, ord=power, dim=axis, keepdim=True)
    return x / size


def same(node: Node, x: Tensor, *_: Tensor | None) -> Tensor:
    """Compute Identity, and Dropout in evaluation: in training a layer runs in its place."""
    return x


def alpha_of(function: Callable[[Tensor, float], Tensor], default: float) -> Operator:
    """Return an activation with the attribute `alpha`."""

    def run(node: Node, x: Tensor) -> Tensor:
        return function(x, node.get("alpha", default))

    return run


def hard_sigmoid(node: Node, x: Tensor) -> Tensor:
    """Compute HardSigmoid."""
    line: Tensor = x * node.get("alpha", 0.2) + node.get("beta", 0.5)
    return line.clamp(0, 1)


def swish(node: Node, x: Tensor) -> Tensor:
    """Compute Swish."""
    gate: Tensor = torch.sigmoid(x * node.get("alpha", 1.0))
    return x * gate


def gelu(node: Node, x: Tensor) -> Tensor:
    """Compute Gelu."""
    return functional.gelu(x, approximate=node.get("approximate", "none"))


# fmt: off
PLAIN: dict[str, Callable[..., Tensor]] = {
    "Abs": torch.abs, "And": torch.logical_and, "Ceil": torch.ceil, "Cos": torch.cos,
    "Equal": torch.eq, "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor,
    "Greater": torch.gt, "GreaterOrEqual": torch.ge, "HardSwish": functional.hardswish,
    "Less": torch.lt, "LessOrEqual": torch.le, "Log": torch.log, "MatMul": torch.matmul,
    "Mish": functional.mish, "Neg": torch.neg, "Not": torch.logical_not, "Or": torch.logical_or,
    "Pow": torch.pow, "Reciprocal": torch.reciprocal, "Relu": torch.relu, "Round": torch.round,
    "Selu": torch.selu, "Sigmoid": torch.sigmoid, "Sign": torch.sign, "Sin": torch.sin,
    "Softplus": functional.softplus, "Softsign": functional.softsign, "Sqrt": torch.sqrt,
    "Sub": torch.sub, "Tanh": torch.tanh, "Where": torch.where,
}

REDUCTIONS: dict[str, Callable[[Tensor, tuple[int, ...], bool], Tensor]] = {
    "ReduceL1": lambda x, axes, keep: torch.linalg.vector_norm(x, 1, axes, keep),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep),
    "ReduceLogSumExp": torch.logsumexp,
    "ReduceMax": torch.amax,
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keep),
    "ReduceMin": torch.amin,
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keep),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keep),
}
# fmt: on

OPERATORS: dict[str, Operator] = {
    **{name: plain(function) for name, function in PLAIN.items()},
    **{name: reduction(function) for name, function in REDUCTIONS.items()},
    # Element-wise, with something to say.
    "Add": folded(torch.add),
    "Celu": alpha_of(functional.celu, 1.0),
    "Clip": clip,
    "Div": divide,
    "Elu": alpha_of(functional.elu, 1.0),
    "Gelu": gelu,
    "HardSigmoid": hard_sigmoid,
    "LeakyRelu": alpha_of(functional.leaky_relu, 0.01),
    "Max": folded(torch.maximum),
    "Mean": mean,
    "Min": folded(torch.minimum),
    "Mul": folded(torch.mul),
    "PRelu": prelu,
    "Sum": folded(torch.add),
    "Swish": swish,
    # Layers.
    "Conv": windows.conv,
    "ConvTranspose": windows.conv_transpose,
    "Gemm": gemm,
    # Norms.
    "BatchNormalization": batch_norm,
    "GroupNormalization": group_norm,
    "InstanceNormalization": instance_norm,
    "LRN": local_norm,
    "LayerNormalization": layer_norm,
    "LogSoftmax": softmax(torch.log_softmax),
    "LpNormalization": lp_norm,
    "RMSNormalization": rms_norm,
    "Softmax": softmax(torch.softmax),
    # Pixels.
    "AveragePool": windows.average_pool,
    "GlobalAveragePool": windows.global_pool(torch.mean),
    "GlobalMaxPool": windows.global_pool(torch.amax),
    "MaxPool": windows.max_pool,
    "Resize": windows.resize,
    "Upsample": windows.resize,
    # Data movement.
    "Cast": moving.cast,
    "CastLike": moving.cast_like,
    "Concat": moving.concat,
    "DepthToSpace": moving.depth_to_space,
    "Dropout": same,
    "Expand": moving.expand,
    "Flatten": moving.flatten,
    "Gather": moving.gather,
    "GatherND": moving.gather_nd,
    "Identity": same,
    "Pad": moving.pad,
    "Reshape": moving.reshape,
    "Slice": moving.slice_,
    "SpaceToDepth": moving.space_to_depth,
    "Split": moving.split,
    "Squeeze": moving.squeeze,
    "Tile": moving.tile,
    "Transpose": moving.transpose,
    "Unsqueeze": moving.unsqueeze,
}

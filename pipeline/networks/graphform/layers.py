"""Nodes that torch has a layer for: it holds their parameters under the names that they have."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.networks.graphform.node import Node

Shapes = Mapping[str, tuple[int, ...]]
CONVOLUTIONS: Mapping[str, tuple[Callable[..., nn.Module], ...]] = {
    "Conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    "ConvTranspose": (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
}
BATCH_NORM_INPUTS = ("weight", "bias", "running_mean", "running_var")


class Norm(_BatchNorm):
    """A batch norm of images with any number of axes."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Refuse nothing: the graph has checked it."""


class Path(nn.Module):
    """A step on the way to a parameter's name; never called."""


def layer_of(node: Node, shapes: Shapes) -> tuple[str, nn.Module] | None:
    """Return the path and the layer that computes a node, None where torch has none.

    Args:
        node: of the graph.
        shapes: of the parameters and trained statistics by name; others are constants.

    Returns:
        The layer without numbers, on the meta device: its parameters are to be set. A dropout has
        no parameters, and the path of its node.
    """
    if node.operator == "Dropout":
        ratio = node.constant(1)
        share = node.get("ratio", 0.5) if ratio is None else float(ratio[0])
        return f"dropout_{node.name.replace('.', '_')}", nn.Dropout(share)
    path, _, last = (node.inputs[1] if len(node.inputs) > 1 else "").rpartition(".")
    if not path or last != "weight" or node.inputs[1] not in shapes:
        return None
    names = tuple(f"{path}.{part}" for part in BATCH_NORM_INPUTS)
    if node.operator == "BatchNormalization":
        if (
            node.get("training_mode", 0)
            or node.inputs[1:] != names
            or not all(name in shapes for name in names)
        ):
            return None
        momentum = round(1 - node.get("momentum", 0.9), 6)  # ONNX says how much of the old stays
        size = shapes[names[0]][0]
        return path, Norm(size, node.get("epsilon", 1e-5), momentum, device="meta")
    bias = node.inputs[2] if len(node.inputs) > 2 else ""
    if bias and (bias != names[1] or bias not in shapes):
        return None
    if node.operator in CONVOLUTIONS:
        layer = _convolution(node, shapes[names[0]], bool(bias))
    elif node.operator == "Gemm":
        layer = _linear(node, shapes[names[0]], bool(bias))
    else:
        layer = None
    return None if layer is None else (path, layer)


def _convolution(node: Node, shape: tuple[int, ...], bias: bool) -> nn.Module | None:
    count, groups = len(shape) - 2, node.get("group", 1)
    pads = tuple(node.get("pads", [0] * 2 * count))
    if node.get("auto_pad", "NOTSET") != "NOTSET" or pads[:count] != pads[count:]:
        return None
    is_transposed = node.operator == "ConvTranspose"
    if "output_shape" in node.attributes:
        return None
    own, other = shape[0], shape[1] * groups
    options = {"output_padding": tuple(node.get("output_padding", [0] * count))}
    return CONVOLUTIONS[node.operator][count - 1](
        own if is_transposed else other,
        other if is_transposed else own,
        shape[2:],
        stride=tuple(node.get("strides", [1] * count)),
        padding=pads[:count],
        dilation=tuple(node.get("dilations", [1] * count)),
        groups=groups,
        bias=bias,
        device="meta",
        **(options if is_transposed else {}),
    )


def _linear(node: Node, shape: tuple[int, ...], bias: bool) -> nn.Module | None:
    scales = node.get("alpha", 1.0), node.get("beta", 1.0)
    if node.get("transA", 0) or not node.get("transB", 0) or scales != (1.0, 1.0):
        return None
    return nn.Linear(shape[1], shape[0], bias=bias, device="meta")

"""Random weights and norm statistics under which a network's activations keep their size."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pipeline.records import Network
from pipeline.surgery.narrow import named_tensors

NEVER_RANDOM = "num_batches_tracked"


def randomised(network: Network, seed: int = 0) -> nn.Module:
    """Return a float64 CPU copy of a network's module with random parameters, evaluation mode.

    Trained parameters hide mistakes of surgery (a shift that is zero, two filters that are alike),
    so every parameter and every norm statistic is drawn anew. Then each convolution, linear layer
    and batch norm is scaled, in the order in which they run, so that its output has unit variance
    on a random batch: activations neither vanish nor explode in networks of any depth. The batch
    norms matter where weights are computed, as those of experts that are mixed image by image.

    Args:
        network: stays as it is.
        seed: of the generator that draws everything.

    Reference:
        Mishkin and Matas, "All you need is a good init", ICLR 2016, arXiv:1511.06422: the scaling,
        here in one pass instead of iterated.
    """
    generator = torch.Generator().manual_seed(seed)
    module = copy.deepcopy(network.module).cpu().double().eval()
    fan_ins = {id(layer.weight): _fan_in(layer) for layer in _scalable(module)}
    parameters = {id(parameter) for parameter in module.parameters()}
    with torch.no_grad():
        for name, tensor in named_tensors(module).items():
            if not tensor.is_floating_point() or name.endswith(NEVER_RANDOM):
                continue
            if id(tensor) in fan_ins:
                _normal(tensor, generator).div_(fan_ins[id(tensor)] ** 0.5)
            elif name.endswith(("running_mean", "bias")):
                _normal(tensor, generator).mul_(0.3)
            elif sum(extent > 1 for extent in tensor.shape) > 1:  # a weight of a layer of its own
                _normal(tensor, generator).div_((tensor.numel() / tensor.shape[0]) ** 0.5)
            elif name.endswith("running_var") or id(tensor) in parameters:
                tensor.uniform_(0.5, 1.5, generator=generator)
        _scale(module, network.example(batch=2).double())
    return module


def _normal(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return tensor.normal_(generator=generator)


def _scalable(module: nn.Module) -> list[_ConvNd | nn.Linear]:
    # A weight that is computed (a parametrisation) is no parameter, and stays as it is drawn.
    return [
        layer
        for layer in module.modules()
        if isinstance(layer, (_ConvNd, nn.Linear)) and "weight" in layer._parameters
    ]


def _fan_in(layer: _ConvNd | nn.Linear) -> int:
    weight = layer.weight
    per_filter = weight.numel() // weight.shape[0]
    if isinstance(layer, _ConvTransposeNd):
        return max(1, weight.numel() // weight.shape[1])
    return max(1, per_filter)


def _scale(module: nn.Module, batch: Tensor) -> None:
    scaled: set[int] = set()

    def hook(layer: nn.Module, _: object, output: object) -> Tensor | None:
        assert isinstance(layer, (_ConvNd, nn.Linear, _BatchNorm))
        if not isinstance(output, Tensor) or id(layer.weight) in scaled:
            return None
        scaled.add(id(layer.weight))
        size = float(output.std()) if output.numel() > 1 else float(output.abs().sum())
        if not 0 < size < float("inf"):
            return None
        layer.weight.div_(size)
        if layer.bias is not None:
            layer.bias.div_(size)
        return output / size

    norms = [n for n in module.modules() if isinstance(n, _BatchNorm) and n.affine]
    unhook: list[Callable[[], None]] = [
        layer.register_forward_hook(hook).remove for layer in [*_scalable(module), *norms]
    ]
    try:
        module(batch)
    finally:
        for remove in unhook:
            remove()

"""What each filter looks for: the image that makes it respond most, by gradient ascent."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hardware.graph.channel_map import ChannelMap, Group
from pipeline.tasks.evaluate import evaluating

STEPS = 8
STEP = 1.0  # length of a step, as a share of the first image's
CHUNK = 32  # images at a time
NOISE = 0.1  # size of the first image's pixels


class _Reached(Exception):  # noqa: N818 - nothing went wrong
    """The layer has run; the rest of the network need not."""


def collect_patterns(
    module: nn.Module, channels: ChannelMap, input_shape: tuple[int, ...], seed: int = 0
) -> dict[str, Tensor]:
    """Return per prunable group what each filter looks for, `(width, values of an image)`.

    All filters begin with the same faint noise and climb `STEPS` steps of equal length towards a
    larger response at the centre of their map, so that two filters that look for the same have
    the same pattern at the same place. A pattern is what was added to the noise; a filter that no
    change of the image moves has a pattern of zeros. Watched is the group's first batch norm, or
    else the first convolution or linear layer that makes it; a group with neither, or whose layer
    is not called as a module, is left out.

    Costs `STEPS` passes forward and back per filter, up to the layer: minutes for networks of small
    images, hours for ImageNet's.

    Args:
        module: run in eval mode; no gradient of its own changes.
        channels: its channel map.
        input_shape: of one image.
        seed: of the noise.

    Reference:
        Qin, Yu, Liu, Chen, "Functionality-Oriented Convolutional Filter Pruning", BMVC 2019,
        arXiv:1810.07322. Status: that a filter's function is found by activation maximisation is
        in the abstract; steps, start and the centre are ours.
    """
    tensors = [*module.parameters(), torch.empty(0)]
    draw = torch.Generator().manual_seed(seed)
    start = (NOISE * torch.randn(1, *input_shape, generator=draw)).to(tensors[0].device)
    found: dict[str, Tensor] = {}
    with evaluating(module), torch.enable_grad():
        for group in channels.prunable:
            place = _place_of(module, group)
            if place is None:
                continue
            layer, positions = place
            if _respond(module, layer, start) is None:
                continue  # its parameters are used, but not by calling it
            parts = [
                _climb(module, layer, positions[begin : begin + CHUNK], start)
                for begin in range(0, group.width, CHUNK)
            ]
            found[group.name] = torch.cat(parts).flatten(1).cpu()
    return found


def _place_of(module: nn.Module, group: Group) -> tuple[nn.Module, Tensor] | None:
    """Return the layer to watch, and for every channel of the group the first one there."""
    layers = dict(module.named_modules(remove_duplicate=False))
    for role, kinds in (("norm", (_BatchNorm,)), ("filter", (nn.Conv2d, nn.Linear))):
        for part in group.slices:
            name, _, last = part.parameter.rpartition(".")
            if part.role == role and last == "weight" and isinstance(layers.get(name), kinds):
                owners = torch.tensor(part.units)
                owned = [(owners == one).nonzero().flatten() for one in range(group.width)]
                if all(len(places) for places in owned):
                    return layers[name], torch.stack([places[0] for places in owned])
    return None


def _climb(module: nn.Module, layer: nn.Module, positions: Tensor, start: Tensor) -> Tensor:
    """Return what was added to the first image, one image per position."""
    images = start.repeat(len(positions), *[1] * (start.ndim - 1))
    rows = torch.arange(len(positions))
    for _ in range(STEPS):
        images = images.detach().requires_grad_(True)
        response = _respond(module, layer, images)
        assert response is not None  # it has run before
        while response.ndim > 2:  # the centre of the map, or the middle token
            response = response.select(2, response.shape[2] // 2)
        [slope] = torch.autograd.grad(response[rows, positions].sum(), images)
        lengths = slope.flatten(1).norm(dim=1).reshape(-1, *[1] * (slope.ndim - 1))
        step = slope / lengths.clamp_min(torch.finfo(slope.dtype).tiny)
        images = images + STEP * start.norm() * step
    return (images - start).detach()


def _respond(module: nn.Module, layer: nn.Module, images: Tensor) -> Tensor | None:
    """Return what a layer gives in its first run, `(n, channels, ...)`; the network stops there.

    None where the layer is never called.
    """
    seen: list[Tensor] = []

    def stop(_: nn.Module, __: object, output: Tensor) -> None:
        seen.append(output)
        raise _Reached

    hook: Callable[[nn.Module, object, Tensor], None] = stop
    handle = layer.register_forward_hook(hook)
    try:
        module(images)
    except _Reached:
        pass
    finally:
        handle.remove()
    if not seen:
        return None
    return seen[0].movedim(-1, 1) if isinstance(layer, nn.Linear) else seen[0]

"""What each input channel of a layer adds to outputs of that layer, at random places."""

import torch
from torch import Tensor, nn

Layer = nn.Conv2d | nn.ConvTranspose2d | nn.Linear


def contributions(layer: Layer, value: Tensor, places: int, draw: torch.Generator) -> Tensor:
    """Return the terms that sum to an output value, one per input channel, for random outputs.

    An output value of a layer is a sum over its input channels (plus the bias). Every row is one
    random output channel at one random place of one image. Of a transposed convolution a row has
    the terms of one input pixel only, and all terms where stride and kernel are equal.

    Args:
        layer: any stride, padding, dilation and number of convolution groups.
        value: its input `(images, channels, height, width)`; of a linear layer `(images, ..., in)`.
        places: outputs per image.
        draw: of the places and channels.

    Returns:
        `(images * places, channels)`; 0 for channels that the output does not read.
    """
    if isinstance(layer, nn.Linear):
        return _linear(layer, value, places, draw)
    if isinstance(layer, nn.ConvTranspose2d):
        return _transposed(layer, value, places, draw)
    return _convolution(layer, value, places, draw)


def _draw(high: int, images: int, places: int, draw: torch.Generator, like: Tensor) -> Tensor:
    return torch.randint(0, high, (images, places), generator=draw).to(like.device)


def _linear(layer: nn.Linear, value: Tensor, places: int, draw: torch.Generator) -> Tensor:
    flat = value.reshape(len(value), -1, layer.in_features)
    images = torch.arange(len(flat), device=flat.device)[:, None]
    where = _draw(flat.shape[1], len(flat), places, draw, flat)
    outputs = _draw(layer.out_features, len(flat), places, draw, flat)
    return (flat[images, where] * layer.weight.detach().float()[outputs]).flatten(0, 1)


def _convolution(layer: nn.Conv2d, value: Tensor, places: int, draw: torch.Generator) -> Tensor:
    # The module's own padding, in the order of F.pad: that of "same" included.
    padded = nn.functional.pad(value, layer._reversed_padding_repeated_twice)
    reach = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    sizes = [
        max(1, (size - span) // stride + 1)
        for size, span, stride in zip(padded.shape[2:], reach, layer.stride, strict=True)
    ]
    images = torch.arange(len(value), device=value.device)[:, None, None, None]
    rows, columns = (
        _draw(size, len(value), places, draw, value)[..., None] * stride
        + dilation * torch.arange(kernel, device=value.device)
        for size, stride, dilation, kernel in zip(
            sizes, layer.stride, layer.dilation, layer.kernel_size, strict=True
        )
    )
    # (images, places, kernel height, kernel width, channels)
    patches = padded.movedim(1, 3)[images, rows[..., None], columns[:, :, None]]
    outputs = _draw(layer.out_channels, len(value), places, draw, value)
    weight = layer.weight.detach().float()[outputs].permute(0, 1, 3, 4, 2)
    terms = (patches * weight.repeat(1, 1, 1, 1, layer.groups)).sum(dim=(2, 3))
    return _own(terms, outputs // (layer.out_channels // layer.groups), layer.groups)


def _transposed(
    layer: nn.ConvTranspose2d, value: Tensor, places: int, draw: torch.Generator
) -> Tensor:
    images = torch.arange(len(value), device=value.device)[:, None]
    flat = value.flatten(2).movedim(1, 2)
    where = _draw(flat.shape[1], len(flat), places, draw, flat)
    weight = layer.weight.detach().float().flatten(1)  # (in, out / groups * taps)
    taps = _draw(weight.shape[1], len(flat), places, draw, flat)
    chosen = _draw(layer.groups, len(flat), places, draw, flat)
    return _own(flat[images, where] * weight.T[taps], chosen, layer.groups)


def _own(terms: Tensor, chosen: Tensor, groups: int) -> Tensor:
    """Return the terms as rows, 0 outside the convolution group that was chosen."""
    of = torch.arange(terms.shape[-1], device=terms.device) // (terms.shape[-1] // groups)
    return (terms * (of == chosen[..., None])).flatten(0, 1)

"""What the processor that torch runs on can do."""

import torch
from torch import Tensor, nn

# Channels that oneDNN takes together: 8 with AVX2, 16 with AVX-512.
ONEDNN_BLOCK = 16


def has_bf16(place: torch.device) -> bool:
    """Return whether the processor computes in bf16 itself, rather than by emulation."""
    if place.type == "cuda":
        return torch.cuda.get_device_capability(place) >= (8, 0)
    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch
        return bool(torch.cpu._is_avx512_bf16_supported())
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def memory_format(module: nn.Module, place: torch.device) -> torch.memory_format:
    """Return the layout in which a module and its images compute gradients, channels last or not.

    Channels last is faster. On the CPU, however, oneDNN writes beyond its memory there where it
    differentiates a strided 1x1 convolution of few input channels, as in the shortcuts of narrow
    residual networks: gradients are wrong, or the process crashes or hangs
    (github.com/uxlfoundation/oneDNN/issues/6035).
    """
    is_faulty = place.type == "cpu" and any(
        isinstance(layer, nn.Conv2d)
        and layer.in_channels // layer.groups < ONEDNN_BLOCK
        and set(layer.kernel_size) == {1}
        and max(layer.stride) > 1
        for layer in module.modules()
    )
    return torch.contiguous_format if is_faulty else torch.channels_last


def laid_out(images: Tensor, layout: torch.memory_format) -> Tensor:
    """Return images `(n, channels, height, width)` in a memory layout.

    Images of one channel are in both layouts at once; only a copy says which one is meant.
    """
    if layout is torch.contiguous_format:
        return images.clone(memory_format=layout)
    return images.contiguous(memory_format=layout)

"""What the processor that torch runs on can do."""

import torch


def has_bf16(place: torch.device) -> bool:
    """Return whether the processor computes in bf16 itself, rather than by emulation."""
    if place.type == "cuda":
        return torch.cuda.get_device_capability(place) >= (8, 0)
    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch
        return bool(torch.cpu._is_avx512_bf16_supported())
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))

"""Sizes without numbers: what makes running a network on torch's meta device cheap."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class SizesOnly(TorchFunctionMode):
    """Batch norms that compute nothing: to be entered while a network runs on the meta device.

    There torch takes a batch norm apart into a dozen operations in Python, which is half of the
    time of a run. Its output has the size of its input; only its parameters must fit.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],  # Any: every function of torch comes by
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run a function of torch, other than a batch norm."""
        if func is functional.batch_norm:
            return _sized(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _sized(
    images: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: object,
    **__: object,
) -> Tensor:
    """Return the output of a batch norm on the meta device."""
    for tensor in (running_mean, running_var, weight, bias):
        if tensor is not None and tensor.numel() != images.shape[1]:
            raise RuntimeError(f"a batch norm of {tensor.numel()} channels reads {images.shape[1]}")
    return torch.empty_like(images)

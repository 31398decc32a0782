"""Batch-norm statistics, taken anew."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.errors import DataError
from pipeline.records import Network


def recalibrate(network: Network, batches: Iterable[tuple[Tensor, Tensor]]) -> Network:
    """Return a copy whose batch norms hold the mean statistics over the batches.

    Pruning shifts what a batch norm sees; its statistics can be had anew without training.

    Args:
        network: left as it is.
        batches: training images (n, channels, height, width), and labels, which are unused.

    Raises:
        DataError: there are no batches.

    Reference:
        Li et al., "EagleEye: Fast Sub-net Evaluation for Efficient Neural Network Pruning",
        ECCV 2020, arXiv:2007.02491, sec. 3.3. There the statistics move exponentially; here every
        batch counts the same.
    """
    module = deepcopy(network.module)
    recalibrate_module(module, batches)
    return replace(network, module=module.eval())


def recalibrate_module(module: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Replace the statistics of every batch norm by their mean over the batches, in place.

    Raises:
        DataError: there are no batches.
    """
    place = next(module.parameters(), torch.empty(0)).device
    norms = tuple(_tracking(module).values())
    modes = [(part, part.training) for part in module.modules()]
    momenta = [norm.momentum for norm in norms]
    try:
        module.eval()  # no dropout
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # every batch counts the same
            norm.train()
        seen = 0
        with torch.no_grad():
            for images, _ in batches:
                module(images.to(place))
                seen += 1
        if norms and not seen:
            raise DataError("There are no images to take batch-norm statistics from.")
    finally:
        for part, mode in modes:
            part.training = mode
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Mean and variance of what one batch norm receives, one number per channel."""

    mean: Tensor  # (channels,)
    variance: Tensor  # (channels,)


@contextmanager
def observing(module: nn.Module) -> Iterator[Mapping[str, Moments]]:
    """Yield what the batch norms received in the last run of a module inside the block, by name.

    A norm that runs more than once is left out: it has no single input.
    """
    seen: dict[str, Moments] = {}
    repeated: set[str] = set()

    def watch(name: str) -> Callable[[_BatchNorm, tuple[Tensor, ...]], None]:
        def see(norm: _BatchNorm, given: tuple[Tensor, ...]) -> None:
            if name in seen or name in repeated:
                repeated.add(name)
                seen.pop(name, None)
            else:
                seen[name] = _moments(norm, given[0])

        return see

    def begin(_: nn.Module, __: tuple[object, ...]) -> None:
        seen.clear()
        repeated.clear()

    handles = [module.register_forward_pre_hook(begin)]
    handles += [norm.register_forward_pre_hook(watch(n)) for n, norm in _tracking(module).items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def following(module: nn.Module, before: Mapping[str, Moments]) -> Iterator[None]:
    """Let the statistics of batch norms follow what a change of the network does to their inputs.

    Inside the block, the running mean is moved by as much as the mean of the norm's input moved
    since `before`, and the running variance is scaled by as much as the variance was
    (each with the norm's epsilon). So a network
    that was not changed computes what it did, however few images a batch has, and a changed one
    what it would after its statistics were taken anew on these images. Restored on leaving.

    Args:
        module: changed since `before`, in evaluation mode.
        before: what `observing` saw of the unchanged module, on the same images.

    Reference:
        Li et al., "EagleEye", ECCV 2020, arXiv:2007.02491, sec. 3.3, for judging a pruned network
        after its statistics were taken anew. Taking them as a difference is ours.
    """
    norms = _tracking(module)
    former: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[[_BatchNorm, tuple[Tensor, ...]], None]:
        def follow(norm: _BatchNorm, given: tuple[Tensor, ...]) -> None:
            mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
            kept = former.setdefault(name, (mean.clone(), variance.clone()))
            now, then = _moments(norm, given[0]), before[name]
            ratio = (now.variance + norm.eps) / (then.variance + norm.eps)
            mean.copy_(kept[0] + now.mean - then.mean)
            variance.copy_((kept[1] + norm.eps) * ratio - norm.eps)

        return follow

    handles = [norms[name].register_forward_pre_hook(watch(name)) for name in before]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, (mean, variance) in former.items():
            norms[name].get_buffer("running_mean").copy_(mean)
            norms[name].get_buffer("running_var").copy_(variance)


def _tracking(module: nn.Module) -> dict[str, _BatchNorm]:
    """Return the batch norms that hold statistics, by name."""
    return {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, _BatchNorm) and part.track_running_stats
    }


def _moments(norm: _BatchNorm, given: Tensor) -> Moments:
    """Return the moments of a norm's input `(batch, channels, ...)`."""
    shift = norm.get_buffer("running_mean")  # about it, squares keep their digits
    rows = given.movedim(1, -1).flatten(0, -2).to(torch.float32, copy=True).sub_(shift)
    mean = rows.mean(dim=0)
    variance = (rows.square_().mean(dim=0) - mean.square()).clamp_min(0)
    return Moments(mean=mean + shift, variance=variance)

"""Batch-norm statistics, taken anew."""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace

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
    norms = [
        part
        for part in module.modules()
        if isinstance(part, _BatchNorm) and part.track_running_stats
    ]
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

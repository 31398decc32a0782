"""Criteria by what the next layers would miss."""

import numpy as np
import torch
from torch import Tensor

from pipeline.criteria.combining import combine
from pipeline.evidence.needs import filters_of, responses_of
from pipeline.records import GroupView


def thinet(group: GroupView) -> Tensor:
    """Score each channel by its place in a greedy removal that spares the next layers' outputs.

    At random outputs of the layers that read the group, the error is the sum of what the removed
    channels would have added. Channels are removed one by one, each time the one that leaves the
    least mean squared error; the first to go scores 0, the last one highest. So two channels that
    cancel each other go early, whatever their size.

    Args:
        group: coupled layers, with responses. Where no layer that reads the group can be watched,
            their responses count as what they add.

    Returns:
        Saliency `(width,)`, >= 0, mean 1 (0 for a width of 1), higher = keep: the place in the
        order. The errors of several readers are added, each divided by its mean square.

    Raises:
        PipelineError: the view has no responses.

    Reference:
        Luo et al., "ThiNet: A Filter Level Pruning Method for Deep Neural Network Compression",
        ICCV 2017, arXiv:1707.06342. Status: reconstruction of the greedy choice, with 10 random
        outputs per image; the scaling of the kept channels by least squares is left out, and the
        sum over several readers is ours.
    """
    filters_of(group)
    total = torch.zeros(group.width, group.width, dtype=torch.float64)
    for found in responses_of(group, "Criterion thinet"):
        products = found.contributions.double()
        total += products / products.diagonal().sum().clamp_min(1e-300)
    if not bool(total.any()):
        return torch.zeros(group.width)
    return combine([removal_order(total).float()])


def removal_order(products: Tensor) -> Tensor:
    """Return per channel when it goes, 0 first, if each step adds the least to the error.

    Args:
        products: `(width, width)` mean products of what channels add; the error of removing a
            set is the sum of the products within it.
    """
    matrix = products.numpy()
    rise = matrix.diagonal().copy()  # of the error, if this channel went next
    order = np.zeros(len(matrix), dtype=np.int64)
    for step in range(len(matrix)):
        chosen = int(rise.argmin())
        order[chosen] = step
        rise += 2 * matrix[chosen]
        rise[chosen] = np.inf
    return torch.from_numpy(order)


def weight_dependency(group: GroupView) -> Tensor:
    """Score each channel by the weights that go with it: its filter's and those that read it.

    `score = combine(L1 of the filters) + combine(L1 of the columns of every reader)`, both of
    mean 1. The two other aspects of the paper, computational cost and number of parameters, are
    equal for all channels of a group: they move a group as a whole against the others. Scores
    here have mean 1 in every group, and the cost of a group is what the plan weighs them against,
    as measured on the device.

    Args:
        group: coupled layers; needs filters and readers only. Batch norms are folded into the
            filters, where one is known for every coupled layer.

    Returns:
        Saliency `(width,)`, >= 0, mean 1, higher = keep.

    Reference:
        Yan et al., "Channel Pruning via Multi-Criteria based on Weight Dependency" (CPMC), ICANN
        2021, arXiv:2011.03240. Status: reconstruction, the paper's formulas were not seen; that
        the next layer's weights, the cost and the parameters count is in its abstract. Cost and
        parameters are left to the plan, as said above.
    """
    own = [weight.abs().sum(dim=1) for weight in filters_of(group)]
    if len(group.norm_scales) == len(own):
        own = [size * scale.abs() for size, scale in zip(own, group.norm_scales, strict=True)]
    if not group.consumers:
        return combine(own)
    read = combine([column.abs().sum(dim=1) for column in group.consumers])
    return combine([combine(own) + read])

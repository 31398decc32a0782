"""Criteria by batch-norm parameters."""

import torch
from torch import Tensor

from pipeline.criteria.combining import combine, filters_of
from pipeline.records import GroupView


def norm_scale(group: GroupView) -> Tensor:
    """Score each channel by its batch-norm scale times the norm of the weights that read it.

    A channel leaves its batch norm with standard deviation |gamma|, and reaches the next layers
    through the columns that read it, so the product is how strongly it moves what comes next:
    `score = combine(|gamma| of every norm) * combine(L2 norm of the columns of every consumer)`.

    Args:
        group: coupled layers. Where no batch norm scales the group, the L2 norm of its filters
            stands in for |gamma|: it is the standard deviation under white input. Where nothing
            learned reads the group, the second factor is 1.

    Returns:
        Saliency `(width,)`, >= 0, mean 1 (divided by the group's mean), higher = keep.

    Reference:
        The scale alone: Liu et al., "Learning Efficient Convolutional Networks through Network
        Slimming", ICCV 2017, arXiv:1708.06519. The product and the rule for coupled layers are
        ours; counting the next layer's weights is also the idea of Yan et al. (CPMC),
        arXiv:2011.03240.
    """
    if group.norm_scales:
        scale = combine([gamma.abs() for gamma in group.norm_scales])
    else:
        scale = combine([weight.norm(dim=1) for weight in filters_of(group)])
    if not group.consumers:
        return scale
    read = combine([column.norm(dim=1) for column in group.consumers])
    return combine([torch.mul(scale, read)])

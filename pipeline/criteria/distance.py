"""Criteria by how far a filter lies from the others."""

import torch
from torch import Tensor

from pipeline.criteria.combining import combine
from pipeline.evidence.needs import filters_of
from pipeline.records import GroupView

WEISZFELD_STEPS = 200
CLOSE_ENOUGH = 1e-6  # of the filters' size: a step shorter than this ends the iteration


def geometric_median(group: GroupView) -> Tensor:
    """Score each channel by the sum of the distances from its filter to all others of the layer.

    A filter near the geometric median can be replaced by the others, however large it is.

    Args:
        group: coupled layers; needs their filters only.

    Returns:
        Saliency `(width,)`, >= 0, mean 1 (all 0 where all filters are equal), higher = keep:
        layers combined by `combine`.

    Reference:
        He et al., "Filter Pruning via Geometric Median for Deep Neural Networks Acceleration"
        (FPGM), CVPR 2019, arXiv:1811.00250. Status: reconstructed from the definition of the
        score; how coupled layers are combined is ours.
    """
    return combine([torch.cdist(weight, weight).sum(dim=1) for weight in filters_of(group)])


def fermat_point(group: GroupView) -> Tensor:
    """Score each channel by the distance of its filter from the Fermat point of the layer.

    The Fermat point has the least sum of distances to all filters of the layer; it is a point of
    the weight space and in general no filter. Where filters scatter about zero it is near zero,
    and the score near their L2 norm.

    Args:
        group: coupled layers; needs their filters only.

    Returns:
        Saliency `(width,)`, >= 0, mean 1 (all 0 where all filters are equal), higher = keep:
        layers combined by `combine`.

    Reference:
        Compared by Huang et al., "Rethinking the Pruning Criteria for Convolutional Neural
        Network", NeurIPS 2021, arXiv:2004.11627. Status: reconstruction, the paper's formula was
        not seen; the point is found by Weiszfeld's iteration.
    """
    return combine([(w - fermat_point_of(w)).norm(dim=1) for w in filters_of(group)])


def fermat_point_of(points: Tensor) -> Tensor:
    """Return the point `(d,)` of least summed distance to `(n, d)` points, by Weiszfeld's steps.

    A step that lands on one of the points takes their weights as if they were a little away, so
    the iteration cannot get stuck there by a division by zero.
    """
    found = points.mean(dim=0)
    scale = (points - found).norm(dim=1).mean()
    for _ in range(WEISZFELD_STEPS):
        weight = (points - found).norm(dim=1).clamp_min(CLOSE_ENOUGH * float(scale) + 1e-30)
        weight = weight.reciprocal()
        following = (weight[:, None] * points).sum(dim=0) / weight.sum()
        step, found = (following - found).norm(), following
        if float(step) <= CLOSE_ENOUGH * float(scale):
            break
    return found

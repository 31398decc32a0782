"""Criteria by what the loss would do: the first term of its Taylor expansion."""

import torch
from torch import Tensor

from pipeline.criteria.combining import combine, filters_of
from pipeline.errors import PipelineError
from pipeline.records import GroupView


def first_order(group: GroupView) -> Tensor:
    """Score each channel by the squared first-order change of the loss when its filters are zeroed.

    Coupled layers lose a unit at the same time, so their changes are added with their signs before
    the square: `score = mean over batches of (sum over layers and weights of g * w) ** 2`.
    The gradient is the batch's mean gradient, so the square is taken per batch, not per image.

    Args:
        group: coupled layers, with gradients of at least one batch.

    Returns:
        Saliency `(width,)`, >= 0, mean 1 (divided by the group's mean), higher = keep.

    Raises:
        PipelineError: the view was made without images.

    Reference:
        Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019,
        arXiv:1906.10771, eq. 8, on the weights of a filter. Adding the signed terms of coupled
        layers follows Shen et al., "Structural Pruning via Latency-Saliency Knapsack" (HALP),
        NeurIPS 2022, arXiv:2210.06659, which does so for batch-norm gates.
    """
    filters = filters_of(group)
    if len(group.filter_gradients) != len(filters):
        raise PipelineError(
            f"Criterion taylor needs gradients, and the view of group {group.name} has none. "
            "Pass calibration batches to group_views, or set plan.criterion to l2."
        )
    changes = [
        (gradient * weight).sum(dim=2)
        for weight, gradient in zip(filters, group.filter_gradients, strict=True)
    ]
    return combine([torch.stack(changes).sum(dim=0).square().mean(dim=0)])

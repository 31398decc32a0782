"""Criteria by what the loss would do: the first terms of its Taylor expansion."""

import torch
from torch import Tensor

from pipeline.criteria.combining import combine
from pipeline.evidence.needs import filters_of, gradients_of
from pipeline.records import GroupView


def first_order(group: GroupView) -> Tensor:
    """Score each channel by the squared first-order change of the loss when its filters are zeroed.

    Coupled layers lose a channel together, so their changes are added with their signs before the
    square: `score = mean over batches of (sum over layers and weights of g * w) ** 2`.
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
    gradients = gradients_of(group, group.filter_gradients, filters, "Criterion taylor")
    changes = [
        (gradient * weight).sum(dim=2) for weight, gradient in zip(filters, gradients, strict=True)
    ]
    return combine([torch.stack(changes).sum(dim=0).square().mean(dim=0)])


def first_order_norm(group: GroupView) -> Tensor:
    """Score each channel by the first-order change of the loss when its batch norms are zeroed.

    `score = mean over batches of |sum over norms of (gamma * g_gamma + beta * g_beta)|`.

    Args:
        group: coupled layers, with gradients of at least one batch. Where no batch norm scales the
            group, its filters stand in for the norms.

    Returns:
        Saliency `(width,)`, >= 0, mean 1 (divided by the group's mean), higher = keep.

    Raises:
        PipelineError: the view was made without images.

    Reference:
        Shen et al., "Structural Pruning via Latency-Saliency Knapsack" (HALP), NeurIPS 2022,
        arXiv:2210.06659. Status: verified in the authors' code, which sums over iterations of
        training; here over calibration batches.
    """
    who = "Criterion taylor_bn"
    filters = filters_of(group)
    weights: tuple[Tensor, ...] = (*group.norm_scales, *group.norm_shifts)
    if not group.norm_scales:
        own = gradients_of(group, group.filter_gradients, filters, who)
        changes = [(g * w).sum(dim=2) for w, g in zip(filters, own, strict=True)]
    else:
        found = (*group.norm_scale_gradients, *group.norm_shift_gradients)
        changes = [
            gradient * weight
            for weight, gradient in zip(
                weights, gradients_of(group, found, weights, who), strict=True
            )
        ]
    return combine([torch.stack(changes).sum(dim=0).abs().mean(dim=0)])


def first_order_gate(group: GroupView) -> Tensor:
    """Score each channel by the squared gradient of a gate on what its readers receive.

    A gate is a factor on the channel, 1 in the network as it is. A factor on what a layer reads is
    a factor on the columns that read it, so its gradient is the sum of `g * w` over them:
    `score = mean over batches of (sum over readers) ** 2`.

    Args:
        group: coupled layers, with gradients of at least one batch. Where nothing learned reads
            the group, its filters stand in for its readers.

    Returns:
        Saliency `(width,)`, >= 0, mean 1 (divided by the group's mean), higher = keep.

    Raises:
        PipelineError: the view was made without images.

    Reference:
        Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019,
        arXiv:1906.10771, who put gates behind batch norms. Status: reconstruction; one gate for
        all coupled layers, placed where they are read, is ours.
    """
    filters_of(group)
    if not group.consumers:
        return first_order(group)
    who = "Criterion taylor_gate"
    changes = gradients_of(group, group.gate_gradients, group.consumers, who)
    return combine([torch.stack(changes).sum(dim=0).square().mean(dim=0)])


def second_order(group: GroupView) -> Tensor:
    """Score each channel by the second-order change of the loss when its filters are zeroed.

    At a trained optimum the first order vanishes; the curvature is approximated by the diagonal of
    the empirical Fisher matrix: `score = sum over layers and weights of w^2 * mean of g^2 / 2`.
    The mean is over batches of their mean gradients, which is a constant times the Fisher matrix
    of single images where their gradients are independent.

    Args:
        group: coupled layers, with gradients of at least one batch.

    Returns:
        Saliency `(width,)`, >= 0, mean 1 (divided by the group's mean), higher = keep.

    Raises:
        PipelineError: the view was made without images.

    Reference:
        LeCun et al., "Optimal Brain Damage", NeurIPS 1989, with the Fisher matrix for the Hessian
        as Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018,
        arXiv:1801.05787. Status: reconstruction; the sum over the coupled layers is ours.
    """
    filters = filters_of(group)
    gradients = gradients_of(group, group.filter_gradients, filters, "Criterion second_order")
    changes = [
        (weight.square() * gradient.square().mean(dim=0)).sum(dim=1) / 2
        for weight, gradient in zip(filters, gradients, strict=True)
    ]
    return combine([torch.stack(changes).sum(dim=0)])

"""Criteria by batch-norm parameters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.criteria.combining import combine
from pipeline.evidence.needs import filters_of
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


def norm_scale_alone(group: GroupView) -> Tensor:
    """Score each channel by its batch-norm scale |gamma|.

    Args:
        group: coupled layers. Where no batch norm scales the group, the L2 norm of its filters
            stands in for |gamma|.

    Returns:
        Saliency `(width,)`, >= 0, mean 1, higher = keep: batch norms combined by `combine`.

    Reference:
        Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV
        2017, arXiv:1708.06519. Status: reconstructed from the definition of the score; the paper
        trains with an L1 penalty on the scales first, and ranks them over the network undivided.
    """
    if group.norm_scales:
        return combine([gamma.abs() for gamma in group.norm_scales])
    return combine([weight.norm(dim=1) for weight in filters_of(group)])


def activation_probability(group: GroupView) -> Tensor:
    """Score each channel by how likely a ReLU behind its batch norm lets it through.

    Behind a batch norm a channel is about N(beta, gamma^2), so a ReLU gives 0 with probability
    Phi(-beta / |gamma|); the score is one minus that. A channel that is 0 almost always adds
    almost nothing.

    Args:
        group: coupled layers. Where no batch norm scales the group, the sum of the channel's
            biases and the L2 norm of its filters in all coupled layers stand in for beta and
            |gamma|: mean and deviation of their sum under white input.

    Returns:
        Saliency `(width,)`, >= 0, mean 1, higher = keep: batch norms combined by `combine`.

    Reference:
        Kang and Han, "Operation-Aware Soft Channel Pruning using Differentiable Masks" (SCP),
        ICML 2020, arXiv:2007.03938. Status: that batch norm and ReLU are judged together by the
        probability of deactivation is in the abstract; the formula is a reconstruction, and the
        rule for coupled layers is ours.
    """
    if not group.norm_scales:
        spread = torch.stack([w.square().sum(dim=1) for w in filters_of(group)]).sum(dim=0).sqrt()
        biases = [torch.zeros_like(spread), *group.biases]
        return combine([_passed(torch.stack(biases).sum(dim=0), spread)])
    spreads = [gamma.abs() for gamma in group.norm_scales]
    shifts: Sequence[Tensor] = group.norm_shifts
    if len(shifts) != len(spreads):  # a norm without shifts
        shifts = [torch.zeros_like(spread) for spread in spreads]
    return combine([_passed(b, s) for b, s in zip(shifts, spreads, strict=True)])


def _passed(mean: Tensor, spread: Tensor) -> Tensor:
    """Return the probability that a normal value is above 0; a constant one is or is not."""
    constant = spread <= torch.finfo(spread.dtype).tiny
    share = torch.special.ndtr(mean / torch.where(constant, 1.0, spread))
    return torch.where(constant, (mean > 0).float(), share)

"""Criteria by the size of a filter's weights."""

from torch import Tensor

from pipeline.criteria.combining import combine
from pipeline.evidence.needs import filters_of
from pipeline.records import GroupView


def l1_norm(group: GroupView) -> Tensor:
    """Score each channel by the L1 norm of the filters that produce it.

    Args:
        group: coupled layers; needs their filters only.

    Returns:
        Saliency `(width,)`, >= 0, mean 1, higher = keep: layers combined by `combine`.

    Reference:
        Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, arXiv:1608.08710, sec. 3.1.
        The paper scores one layer; how coupled layers are combined is ours.
    """
    return combine([weight.abs().sum(dim=1) for weight in filters_of(group)])


def l2_norm(group: GroupView) -> Tensor:
    """Score each channel by the L2 norm of the filters that produce it.

    Args:
        group: coupled layers; needs their filters only.

    Returns:
        Saliency `(width,)`, >= 0, mean 1, higher = keep: layers combined by `combine`.

    Reference:
        Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, arXiv:1608.08710, which
        compares it with L1 (sec. 4.5 there); how coupled layers are combined is ours.
    """
    return combine([weight.norm(dim=1) for weight in filters_of(group)])

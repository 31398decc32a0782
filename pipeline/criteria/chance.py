"""The criterion that every other one has to beat."""

import zlib

import torch
from torch import Tensor

from pipeline.criteria.combining import combine
from pipeline.evidence.needs import filters_of
from pipeline.records import GroupView


def random(group: GroupView, seed: int = 0) -> Tensor:
    """Score each channel at random: the control.

    Args:
        group: its name and the seed decide the scores, whatever the weights are.
        seed: another one gives other scores.

    Returns:
        Saliency `(width,)`, > 0, mean 1, uniform.

    Reference:
        Status: a control. Wang et al., CVPR 2021, arXiv:2104.03438, argue that in a redundant
        layer it is nearly as good as any other.
    """
    filters_of(group)
    draw = torch.Generator().manual_seed(zlib.crc32(f"{seed} {group.name}".encode()))
    return combine([1 - torch.rand(group.width, generator=draw)])

"""How scores of coupled layers become one score, and when scores of groups may be compared."""

from collections.abc import Sequence

import torch
from torch import Tensor


def combine(scores: Sequence[Tensor]) -> Tensor:
    """Return the mean over coupled layers of each layer's scores divided by their mean.

    Dividing first gives every layer the same weight, whatever its fan-in and the size of its
    weights. The result has mean 1 (0 where every layer scores 0), so the scores of different
    groups are on one scale too: a filter of score 1 is an average filter of its group. That is
    the normalisation per layer that a comparison over the whole network needs.

    Args:
        scores: one tensor `(width,)` per coupled layer, >= 0, higher = keep.

    Returns:
        Saliency `(width,)`, >= 0, higher = keep.

    Reference:
        Division by the layer's mean: Fang et al., "DepGraph", CVPR 2023, arXiv:2301.12900, whose
        code averages over the layers first and divides then; the order here is ours.
    """
    normalised = [score / score.mean().clamp_min(torch.finfo(score.dtype).tiny) for score in scores]
    return torch.stack(normalised).mean(dim=0)

"""Criteria by what the layers that read a channel receive on calibration images."""

import torch
from torch import Tensor

from pipeline.criteria.combining import combine
from pipeline.evidence.needs import filters_of, responses_of
from pipeline.records import GroupView

BINS = 16  # of the histograms behind the entropy


def active_share(group: GroupView) -> Tensor:
    """Score each channel by the share of its responses that are above 0.

    One minus the average percentage of zeros (APoZ) behind a ReLU; behind activations that give
    no exact zeros, the share above 0 is what comes closest.

    Args:
        group: coupled layers, with responses.

    Returns:
        Saliency `(width,)`, >= 0, mean 1, higher = keep: readers combined by `combine`.

    Raises:
        PipelineError: the view has no responses.

    Reference:
        Hu et al., "Network Trimming: A Data-Driven Neuron Pruning Approach towards Efficient Deep
        Architectures", 2016, arXiv:1607.03250. Status: reconstructed from the definition of the
        score; the average over all layers that read a channel is ours.
    """
    filters_of(group)
    return combine([found.active for found in responses_of(group, "Criterion apoz")])


def mean_activation(group: GroupView) -> Tensor:
    """Score each channel by the mean of its absolute responses.

    Args:
        group: coupled layers, with responses.

    Returns:
        Saliency `(width,)`, >= 0, mean 1, higher = keep: readers combined by `combine`.

    Raises:
        PipelineError: the view has no responses.

    Reference:
        Compared by Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient
        Inference", ICLR 2017, arXiv:1611.06440. Status: reconstructed from the definition of the
        score; absolute values, so that activations below 0 count, are ours.
    """
    filters_of(group)
    return combine([r.magnitude for r in responses_of(group, "Criterion mean_activation")])


def entropy(group: GroupView, bins: int = BINS) -> Tensor:
    """Score each channel by the entropy of its mean response over the calibration images.

    The means of a channel, one per image, are sorted into `bins` equal intervals between their
    least and their largest. A channel that responds alike to all images has entropy 0.

    Args:
        group: coupled layers, with responses.
        bins: intervals; the entropy is at most their logarithm, or that of the number of images.

    Returns:
        Saliency `(width,)`, >= 0, mean 1, higher = keep: readers combined by `combine`.

    Raises:
        PipelineError: the view has no responses.

    Reference:
        Luo and Wu, "An Entropy-based Pruning Method for CNN Compression", 2017, arXiv:1706.05791.
        Status: reconstruction; the paper's number of bins and their range were not seen, the range
        per channel is ours.
    """
    filters_of(group)
    found = responses_of(group, "Criterion entropy")
    return combine([entropies(responses.pooled, bins) for responses in found])


def entropies(values: Tensor, bins: int) -> Tensor:
    """Return the entropy `(width,)` in nats of the histogram of every column of `(n, width)`."""
    low, high = values.amin(dim=0), values.amax(dim=0)
    span = high - low
    # A span of nothing but rounding is no span.
    real = span > 1e-6 * torch.maximum(low.abs(), high.abs())
    places = (values - low) / torch.where(real, span, 1.0) * real * bins
    places = places.long().clamp(0, bins - 1)
    counts = torch.zeros(bins, values.shape[1]).scatter_add_(0, places, torch.ones_like(values))
    shares = counts / len(values)
    found: Tensor = torch.special.entr(shares)
    return found.sum(dim=0).clamp_min(0)


def map_rank(group: GroupView) -> Tensor:
    """Score each channel by the average rank of its feature maps.

    Args:
        group: coupled layers, with responses: the ranks of the first images' maps, thinned where
            they are larger than 32 pixels.

    Returns:
        Saliency `(width,)`, >= 0, mean 1, higher = keep: readers combined by `combine`. A reader
        behind global pooling sees maps of one pixel, whose rank is 1 unless they are 0.

    Raises:
        PipelineError: the view has no responses.

    Reference:
        Lin et al., "HRank: Filter Pruning using High-Rank Feature Map", CVPR 2020,
        arXiv:2002.10179. Status: reconstructed from the definition of the score; the paper takes
        500 images and whole maps, and says that the rank hardly depends on the image.
    """
    filters_of(group)
    return combine([found.map_ranks for found in responses_of(group, "Criterion hrank")])

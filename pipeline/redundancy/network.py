"""Redundancy of a whole network: how much may go at most, and which groups respond alike."""

import math
from collections.abc import Sequence

from torch import Tensor

from hardware.records import Record
from pipeline.errors import PipelineError
from pipeline.records import GroupView
from pipeline.redundancy.effective import MaximumCompression, maximum_compression


class NetworkRedundancy(Record):
    """What redundancy says about a whole network."""

    compression: tuple[MaximumCompression, ...]  # by every count of effective filters
    note: str = ""  # why there is none
    groups: tuple[str, ...]  # whose responses were compared
    similarity: tuple[tuple[float, ...], ...]  # linear CKA of every two of them, 0..1


def network_redundancy(views: Sequence[GroupView]) -> NetworkRedundancy:
    """Return the maximum compression by each count, and how alike the groups respond.

    A group responds with the means of its channels, image by image, at the first layer that reads
    it. Layers that respond alike (1) hold the same information up to rotation and scale.

    Args:
        views: of every group, with gradients and responses.

    Reference:
        See `maximum_compression` and `linear_cka`.
    """
    seen = [view for view in views if view.responses]
    pooled = [view.responses[0].pooled for view in seen]
    compression: tuple[MaximumCompression, ...] = ()
    note = ""
    try:
        compression = maximum_compression(views)
    except PipelineError as error:
        note = str(error)
    return NetworkRedundancy(
        compression=compression,
        note=note,
        groups=tuple(view.name for view in seen),
        similarity=tuple(tuple(linear_cka(one, other) for other in pooled) for one in pooled),
    )


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Return the linear CKA of two layers' responses to the same images.

    It is 0 for unrelated responses, 1 where they are equal but for rotation and scale.

    Args:
        first: `(images, width)`.
        second: `(images, other width)`.

    Reference:
        Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019,
        arXiv:1905.00414. Status: reconstructed from the definition.
    """
    one, other = (values.double() - values.double().mean(dim=0) for values in (first, second))
    shared = float((one.T @ other).square().sum())
    scale = math.sqrt(float((one.T @ one).square().sum() * (other.T @ other).square().sum()))
    return shared / scale if scale else 0.0

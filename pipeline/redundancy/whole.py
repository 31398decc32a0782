"""How redundant a network is as a whole: how much may go at most, and which layers say the same."""

from collections.abc import Sequence

from hardware.records import Record
from pipeline.errors import PipelineError
from pipeline.records import GroupView
from pipeline.redundancy.effective import maximum_compression
from pipeline.redundancy.responses import similarity


class MaximumCompression(Record):
    """The largest share of all prunable filters that may go, by one count of effective filters."""

    count: str
    share: float
    low: float  # of resampled calibration batches, 5 %
    high: float  # 95 %


class NetworkRedundancy(Record):
    """What redundancy says about a whole network."""

    compression: tuple[MaximumCompression, ...]
    note: str = ""  # why there is none
    groups: tuple[str, ...]  # whose responses were compared
    likeness: tuple[tuple[float, ...], ...]  # linear CKA of every two of them, 0..1


def network_redundancy(views: Sequence[GroupView]) -> NetworkRedundancy:
    """Return the maximum compression by each count, and how alike the groups respond.

    A group responds with the means of its channels, image by image, at the first layer that reads
    it. Layers that respond alike (1) hold the same information up to rotation and scale.

    Args:
        views: of every group, with gradients and responses.

    Reference:
        See `maximum_compression` and `similarity`.
    """
    seen = [view for view in views if view.responses]
    pooled = [view.responses[0].pooled for view in seen]
    found: tuple[MaximumCompression, ...] = ()
    note = ""
    try:
        found = tuple(
            MaximumCompression(
                count=count.removeprefix("by_"), share=one.share, low=one.low, high=one.high
            )
            for count, one in maximum_compression(views).items()
        )
    except PipelineError as error:
        note = str(error)
    return NetworkRedundancy(
        compression=found,
        note=note,
        groups=tuple(view.name for view in seen),
        likeness=tuple(tuple(similarity(one, other) for other in pooled) for one in pooled),
    )

"""Which units of a group stay: one rule for planning, and for measuring what planning compares."""

import numpy as np
from torch import Tensor

from pipeline.records import Array


def most_salient(saliency: Tensor | Array, width: int) -> tuple[int, ...]:
    """Return the `width` units of highest saliency, ascending; among equals the first ones.

    Args:
        saliency: `(units,)`, higher = keep.
        width: how many stay.
    """
    order = np.argsort(-np.asarray(saliency, dtype=np.float64), kind="stable")
    return tuple(sorted(int(unit) for unit in order[:width]))

"""Criteria: which channels of a group to keep. One file per family, one line per criterion here."""

from collections.abc import Callable, Mapping

from torch import Tensor

from pipeline.criteria import batchnorm, magnitude, taylor
from pipeline.records import GroupView

CRITERIA: Mapping[str, Callable[[GroupView], Tensor]] = {
    "l1": magnitude.l1_norm,
    "l2": magnitude.l2_norm,
    "taylor": taylor.first_order,
    "bn_scale": batchnorm.norm_scale,
}

NEEDS_GRADIENTS = frozenset({"taylor"})
"""Criteria whose views must be made with calibration images."""

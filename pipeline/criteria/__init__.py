"""Criteria: which channels of a group to keep. One file per family, one line per criterion here."""

from collections.abc import Callable, Mapping

from torch import Tensor

from pipeline.criteria import (
    activation,
    batchnorm,
    chance,
    distance,
    magnitude,
    reconstruction,
    taylor,
)
from pipeline.evidence.needs import GRADIENTS, RESPONSES
from pipeline.records import GroupView

CRITERIA: Mapping[str, Callable[[GroupView], Tensor]] = {
    "l1": magnitude.l1_norm,
    "l2": magnitude.l2_norm,
    "fpgm": distance.geometric_median,
    "fermat": distance.fermat_point,
    "bn_scale": batchnorm.norm_scale,
    "bn_scale_alone": batchnorm.norm_scale_alone,
    "scp": batchnorm.activation_probability,
    "cpmc": reconstruction.weight_dependency,
    "taylor": taylor.first_order,
    "taylor_bn": taylor.first_order_norm,
    "taylor_gate": taylor.first_order_gate,
    "second_order": taylor.second_order,
    "apoz": activation.active_share,
    "entropy": activation.entropy,
    "mean_activation": activation.mean_activation,
    "hrank": activation.map_rank,
    "thinet": reconstruction.thinet,
    "random": chance.random,
}

NEEDS: Mapping[str, str] = {
    "taylor": GRADIENTS,
    "taylor_bn": GRADIENTS,
    "taylor_gate": GRADIENTS,
    "second_order": GRADIENTS,
    "apoz": RESPONSES,
    "entropy": RESPONSES,
    "mean_activation": RESPONSES,
    "hrank": RESPONSES,
    "thinet": RESPONSES,
}
"""What a view must hold besides weights, for the criteria that need calibration images."""

"""What criteria and redundancy measures may need of a view, and the error where it is missing."""

from collections.abc import Sequence

from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.records import GroupView, Responses

GRADIENTS = "gradients"
RESPONSES = "responses"
PATTERNS = "patterns"


def filters_of(group: GroupView) -> tuple[Tensor, ...]:
    """Return the group's filters, one tensor `(width, in * kh * kw)` per layer; never empty.

    Raises:
        PipelineError: no layer with learned filters produces the group.
    """
    if not group.filters:
        raise PipelineError(
            f"Group {group.name} has no learned filters: its channels come from a constant, so "
            "there is nothing to score and no redundancy to measure. Please report the network."
        )
    return group.filters


def responses_of(group: GroupView, who: str) -> tuple[Responses, ...]:
    """Return what the readers of a group receive; never empty.

    Args:
        group: made with calibration images.
        who: the criterion or measure that asks, for the error.

    Raises:
        PipelineError: the view was made without responses, or nothing in the group can be watched.
    """
    if not group.responses:
        raise PipelineError(
            f"{who} needs responses, and the view of group {group.name} has none: it was made "
            "without calibration images, or no convolution or linear layer that runs as a module "
            "reads or makes the group. Choose a criterion and a measure that need weights only, "
            "as l2 and graph."
        )
    return group.responses


def patterns_of(group: GroupView, who: str) -> Tensor:
    """Return what the filters of a group look for, `(width, values of an image)`.

    Raises:
        PipelineError: the view was made without patterns, or nothing that makes the group can be
            watched.
    """
    if group.patterns is None:
        raise PipelineError(
            f"{who} needs patterns, and the view of group {group.name} has none: they were not "
            "asked for, or no batch norm, convolution or linear layer that runs as a module makes "
            "the group. Choose a measure that needs weights only, as graph."
        )
    return group.patterns


def gradients_of(
    group: GroupView, gradients: Sequence[Tensor], layers: Sequence[Tensor], who: str
) -> tuple[Tensor, ...]:
    """Return the gradients that belong to `layers`, one tensor each.

    Raises:
        PipelineError: the view was made without images.
    """
    if len(gradients) != len(layers):
        raise PipelineError(
            f"{who} needs gradients, and the view of group {group.name} has none. "
            "Pass calibration batches to group_views, or choose a criterion and a measure that "
            "need weights only, as l2 and graph."
        )
    return tuple(gradients)

"""Redundancy by what filters respond to: filters of one function, and the rank of responses."""

from collections.abc import Sequence

import torch
from scipy.cluster import hierarchy
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.evidence.needs import patterns_of, responses_of
from pipeline.records import Floor, GroupView, Responses

ALIKE = 0.9  # least correlation of two filters of one function
ENERGY = 0.99  # share of the variance that the counted directions hold
ROUNDING = 1e-5


def functionality(group: GroupView, alike: float = ALIKE) -> Floor:
    """Return the floor of a group by how many functions its filters have: one survives of each.

    Filters respond to the same thing where their responses, at random places of the calibration
    images, are correlated; with several readers, where they are so on average. A cluster is a
    function: within it every pair is correlated by `alike` or more (complete linkage). Filters
    whose response never changes have no function; two opposite filters have two functions.

    Args:
        group: coupled layers, with responses.
        alike: least correlation within a function.

    Returns:
        floor = number of functions, at least 1; score = width / floor, 1 = no two filters alike.

    Raises:
        PipelineError: the view has no responses.

    Reference:
        Qin, Yu, Liu, Chen, "Functionality-Oriented Convolutional Filter Pruning", BMVC 2019,
        arXiv:1810.07322. Status: that repetitive filters are those of the same preference, and
        that none of the functions may be lost, is in the abstract; the paper finds preferences by
        activation maximisation, as `functionality_maximised` does. Correlation in its place,
        linkage and threshold are ours.
    """
    found = responses_of(group, "Measure functionality")
    live = torch.stack([changes(one) for one in found]).any(dim=0)
    # A reader that cannot see two filters respond says nothing about how alike they are.
    seen = torch.stack([changes(one)[:, None] & changes(one) for one in found]).float()
    summed = torch.stack([correlations(one) for one in found]).sum(dim=0)
    mean = summed / seen.sum(dim=0).clamp_min(1)
    sizes = _cluster_sizes(mean[live][:, live], alike)
    constant = int((~live).sum())
    what = f"functions of {group.width} filters (correlation {alike:g} within)"
    return _one_per_cluster(group, sizes, what, f"{constant} never change")


def functionality_maximised(group: GroupView, alike: float = ALIKE) -> Floor:
    """Return the floor of a group by how many different things its filters look for.

    As `functionality`, with the patterns of activation maximisation in place of responses: two
    filters look for the same where the cosine of their patterns is `alike` or more.

    Args:
        group: with patterns.
        alike: least cosine within a function.

    Returns:
        floor = number of functions, at least 1; score = width / floor, 1 = no two filters alike.

    Raises:
        PipelineError: the view has no patterns.

    Reference:
        As `functionality`; see `collect_patterns`. Status: clustering by patterns is in the
        abstract's terms; linkage and threshold are ours.
    """
    patterns = patterns_of(group, "Measure functionality_maximised")
    live = patterns.any(dim=1)
    directions = torch.nn.functional.normalize(patterns[live], dim=1)
    sizes = _cluster_sizes(directions @ directions.T, alike)
    rest = int((~live).sum())
    what = f"patterns of {group.width} filters (cosine {alike:g} within)"
    return _one_per_cluster(group, sizes, what, f"{rest} look for nothing")


def feature_rank(group: GroupView, energy: float = ENERGY) -> Floor:
    """Return the floor of a group by the rank of its responses: a control.

    The rank is the fewest principal directions that hold `energy` of the variance of all filters'
    responses, each scaled to variance 1; the largest over the readers that saw enough places.

    Args:
        group: coupled layers, with responses.
        energy: share of the variance.

    Returns:
        floor = rank, at least 1; score = width / floor, 1 = full rank.

    Raises:
        PipelineError: the view has no responses, or no reader saw as many places as filters.

    Reference:
        Status: a control of ours; that responses have low rank is what reconstruction methods
        exploit.
    """
    found = responses_of(group, "Measure feature_rank")
    enough = [one for one in found if one.rows >= group.width]
    if not enough:
        most = max(one.rows for one in found)
        raise PipelineError(
            f"Measure feature_rank saw {most} responses of group {group.name}, too few for the "
            f"rank of {group.width} filters. Raise plan.calibration_images."
        )
    ranks = [_rank(correlations(one), energy) for one in enough]
    floor = max(1, *ranks)
    return Floor(
        group=group.name,
        width=group.width,
        floor=floor,
        score=group.width / floor,
        detail=(
            f"rank {floor} of {group.width} at {100 * energy:g} % of the variance, "
            f"the largest of {len(enough)} readers"
        ),
    )


def correlations(responses: Responses) -> Tensor:
    """Return `(width, width)` correlations of responses; 0 with a filter that never changes."""
    variance = responses.covariance.diagonal()
    live = changes(responses)
    scale = torch.where(live, variance, 1.0).rsqrt() * live
    return (responses.covariance * scale[:, None] * scale).clamp(-1, 1)


def changes(responses: Responses) -> Tensor:
    """Return for every filter whether its responses differ from place to place, beyond rounding."""
    scale = responses.magnitude.square()
    return responses.covariance.diagonal() > 1e-10 * scale.clamp_min(1e-20)


def _one_per_cluster(group: GroupView, sizes: Sequence[int], what: str, rest: str) -> Floor:
    """Return the floor that keeps one filter per cluster."""
    floor = max(1, len(sizes))
    return Floor(
        group=group.name,
        width=group.width,
        floor=floor,
        score=group.width / floor,
        detail=f"{len(sizes)} {what}, the largest shared by {max(sizes, default=0)}; {rest}",
    )


def _cluster_sizes(similarity: Tensor, least: float) -> list[int]:
    """Return how many filters every function has."""
    width = len(similarity)
    if width < 2:
        return [1] * width
    rows, columns = torch.triu_indices(width, width, offset=1)
    apart = (1 - similarity[rows, columns]).clamp_min(0).double().numpy()
    labels = hierarchy.fcluster(hierarchy.complete(apart), 1 - least + ROUNDING, "distance")
    return [int(count) for count in torch.bincount(torch.from_numpy(labels).long()) if count]


def _rank(matrix: Tensor, energy: float) -> int:
    """Return how many of the largest eigenvalues sum to a share of all; 0 for no variance."""
    values = torch.linalg.eigvalsh(matrix.double()).clamp_min(0).flip(0)
    if float(values.sum()) == 0:
        return 0
    shares = values.cumsum(0) / values.sum()
    return int((shares < energy - 1e-9).sum()) + 1

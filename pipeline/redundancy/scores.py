"""How well the other filters of a group replace each one: 1 = entirely, 0 = not at all.

A measure says how redundant a group is; its score here, how redundant each filter is. Status: ours;
the measures' sources rank filters by other scores, or not at all.
"""

import torch
from torch import Tensor

from pipeline.evidence.needs import filters_of, patterns_of, responses_of
from pipeline.records import GroupView
from pipeline.redundancy.effective import products_of
from pipeline.redundancy.graph import mean_cosines
from pipeline.redundancy.responses import changes, correlations

RIDGE = 1e-6  # on unit diagonals: twins would make the inverse infinite


def by_weights(group: GroupView) -> Tensor:
    """Score each filter by the cosine of the nearest other one; opposite ones do not count.

    Returns:
        `(width,)`, 0..1: 1 for twins and for dead filters, 0 for orthogonal filters.

    Raises:
        PipelineError: no layer with learned filters produces the group.
    """
    filters = filters_of(group)
    live = torch.stack([weight.any(dim=1) for weight in filters]).any(dim=0)
    found = torch.ones(group.width)
    found[live] = _nearest(mean_cosines(filters))
    return found


def by_gradients(group: GroupView) -> Tensor:
    """Score each filter by the share of its gradients that others' gradients span.

    Returns:
        `(width,)`, 0..1: 1 where they are a combination of others' (or 0), 0 where orthogonal.

    Raises:
        PipelineError: no gradients, or too few to tell this many filters apart.
    """
    return _spanned(products_of(group).sum(dim=0))


def by_correlation(group: GroupView) -> Tensor:
    """Score each filter by the correlation of its responses with those of the most alike other one.

    Returns:
        `(width,)`, 0..1: 1 where another one responds to the same, or where it never changes.

    Raises:
        PipelineError: the view has no responses.
    """
    found = responses_of(group, "Measure functionality")
    live = torch.stack([changes(one) for one in found]).any(dim=0)
    mean = torch.stack([correlations(one) for one in found]).mean(dim=0)
    return torch.where(live, _nearest(mean), 1.0)


def by_patterns(group: GroupView) -> Tensor:
    """Score each filter by the cosine of its pattern with the nearest other one.

    Returns:
        `(width,)`, 0..1: 1 where another one looks for the same, or where it looks for nothing.

    Raises:
        PipelineError: the view has no patterns.
    """
    patterns = patterns_of(group, "Measure functionality_maximised")
    directions = torch.nn.functional.normalize(patterns, dim=1)
    return torch.where(patterns.any(dim=1), _nearest(directions @ directions.T), 1.0)


def by_responses(group: GroupView) -> Tensor:
    """Score each filter by the share of its responses' variance that the others predict linearly.

    Returns:
        `(width,)`, 0..1: of several readers the mean.

    Raises:
        PipelineError: the view has no responses.
    """
    found = responses_of(group, "Measure feature_rank")
    return torch.stack([_spanned(one.covariance) for one in found]).mean(dim=0)


def unknown(group: GroupView) -> Tensor:
    """Score every filter 0: nothing was measured."""
    return torch.zeros(group.width)


def _nearest(similarity: Tensor) -> Tensor:
    """Return the largest entry of each row beside the diagonal, at least 0."""
    if len(similarity) < 2:
        return torch.zeros(len(similarity))
    others = similarity.clone().fill_diagonal_(-1)
    return others.amax(dim=1).clamp(0, 1)


def _spanned(products: Tensor) -> Tensor:
    """Return 1 less the share of each row that is orthogonal to all others, by their products."""
    own = products.diagonal().double()
    live = own > RIDGE * own.max()
    scale = torch.where(live, own, 1.0).rsqrt()
    unit = (products.double() * scale[:, None] * scale)[live][:, live]
    kept = torch.linalg.inv(unit + RIDGE * torch.eye(len(unit), dtype=torch.float64)).diagonal()
    found = torch.ones(len(products), dtype=torch.float64)
    found[live] = (1 - 1 / kept).clamp(0, 1)
    return found.float()

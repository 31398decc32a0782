"""What criteria mean on one network: do they agree, can they tell filters apart, and why not.

The three questions of Huang, Shao, Wang, Lin, Luo, "Rethinking the Pruning Criteria for
Convolutional Neural Network", NeurIPS 2021, arXiv:2004.11627: *similarity* of rankings,
*applicability* of scores, and the weight distribution that explains both. Status: the claims are
verified in the abstract; the nulls follow from Gaussian filters by arithmetic (spread of L2
0.707 / sqrt(d), Spearman of L1 and L2 0.930), and the statistics and thresholds are ours.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from hardware.records import Record
from pipeline.diagnosis.distribution import WeightDistribution, describe_weights
from pipeline.records import GroupView, Plan

Criterion = Callable[[GroupView], Tensor]
Criteria = Mapping[str, Criterion]

# Criteria whose scores are chance where filters and gradients are independent Gaussian numbers.
HAVE_NULL = frozenset(
    ("l1", "l2", "fpgm", "fermat", "cpmc", "taylor", "taylor_gate", "second_order")
)
CONTROLS = frozenset(("random",))  # their scores differ, and say nothing of the filters
LEAST_SPREAD = 0.01  # of scores that have no null
DEVIATIONS = 3.0  # of the null's spread, as estimated from this many filters
NULL_DRAWS = 2
LARGE_SHARE = 0.1  # of the pruned channels: from here on a warning is due
ALIKE = 0.9  # Spearman of criteria that rank alike


class Spread(Record):
    """Whether one criterion tells the filters of one group apart."""

    criterion: str
    spread: float  # standard deviation of the scores over their mean
    null: float | None  # the same for Gaussian filters and gradients of this shape, where known
    applicable: bool


class Agreement(Record):
    """How alike two criteria rank; None where one of them gives all filters the same score."""

    first: str
    second: str
    spearman: float | None
    kendall: float | None


class GroupDiagnosis(Record):
    """What was found in one pruning group."""

    group: str
    width: int
    spreads: tuple[Spread, ...]
    agreements: tuple[Agreement, ...]
    weights: tuple[WeightDistribution, ...]  # one per coupled layer
    verdict: str


class Diagnosis(Record):
    """What was found in a network, group by group and over all of them."""

    criteria: tuple[str, ...]
    images: int
    groups: tuple[GroupDiagnosis, ...]
    network: tuple[Agreement, ...]  # over the scores of all groups, each of mean 1
    verdicts: tuple[str, ...]


def diagnose(views: Sequence[GroupView], criteria: Criteria, images: int = 0) -> Diagnosis:
    """Return similarity, applicability and weight distribution of every group, with verdicts.

    Args:
        views: with all that the criteria need.
        criteria: by name.
        images: calibration images behind the views, for the record.

    Raises:
        PipelineError: a criterion needs what the views lack.
    """
    groups = []
    scores: dict[str, list[Tensor]] = {name: [] for name in criteria}
    for view in views:
        found = {name: criterion(view) for name, criterion in criteria.items()}
        for name, score in found.items():
            scores[name].append(score)
        groups.append(_diagnose_group(view, criteria, found))
    joined = {name: torch.cat(parts) if parts else torch.zeros(0) for name, parts in scores.items()}
    return Diagnosis(
        criteria=tuple(criteria),
        images=images,
        groups=tuple(groups),
        network=agreements(joined),
        verdicts=_verdicts(tuple(criteria), groups),
    )


def spread_of(view: GroupView, name: str, criterion: Criterion, scores: Tensor) -> Spread:
    """Return the spread of a criterion's scores beside its null.

    With a null the criterion is applicable where its spread is more than `DEVIATIONS` standard
    errors above it; without one, where scores differ by more than `LEAST_SPREAD`. A control never
    is.
    """
    spread = relative_spread(scores)
    if name in CONTROLS:
        return Spread(criterion=name, spread=spread, null=None, applicable=False)
    if name not in HAVE_NULL:
        return Spread(criterion=name, spread=spread, null=None, applicable=spread > LEAST_SPREAD)
    draw = torch.Generator().manual_seed(0)
    nulls = [relative_spread(criterion(gaussian_view(view, draw))) for _ in range(NULL_DRAWS)]
    null = sum(nulls) / len(nulls)
    error = 1 / math.sqrt(2 * max(view.width - 1, 1))  # relative, of a standard deviation
    applicable = spread > null * (1 + DEVIATIONS * error)
    return Spread(criterion=name, spread=spread, null=null, applicable=applicable)


def relative_spread(scores: Tensor) -> float:
    """Return standard deviation over mean; 0 for one score, or where all are 0."""
    mean = float(scores.double().mean())
    return float(scores.double().std()) / mean if len(scores) > 1 and mean > 0 else 0.0


def gaussian_view(view: GroupView, draw: torch.Generator) -> GroupView:
    """Return the view with independent Gaussian filters, readers and gradients of the same sizes.

    Batch-norm scales are 1: the null says nothing about parameters that are one number per filter.
    """

    def noise(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(
            torch.randn(tensor.shape, generator=draw) * tensor.square().mean().sqrt()
            for tensor in tensors
        )

    return replace(
        view,
        filters=noise(view.filters),
        consumers=noise(view.consumers),
        filter_gradients=noise(view.filter_gradients),
        gate_gradients=noise(view.gate_gradients),
        norm_scales=tuple(torch.ones_like(scale) for scale in view.norm_scales),
    )


def agreements(scores: Mapping[str, Tensor]) -> tuple[Agreement, ...]:
    """Return Spearman's and Kendall's correlation of every two criteria's scores `(n,)`."""
    values = {name: score.double().numpy() for name, score in scores.items()}
    ranks = {name: stats.rankdata(value) for name, value in values.items()}
    ranked = {name for name, value in values.items() if len(value) > 1 and np.ptp(value) > 0}
    found = []
    for one, other in combinations(scores, 2):
        known = {one, other} <= ranked
        spearman = float(np.corrcoef(ranks[one], ranks[other])[0, 1]) if known else None
        kendall = float(stats.kendalltau(values[one], values[other]).statistic) if known else None
        found.append(Agreement(first=one, second=other, spearman=spearman, kendall=kendall))
    return tuple(found)


def inapplicable_groups(
    views: Sequence[GroupView],
    name: str,
    criterion: Criterion,
    saliency: Mapping[str, Tensor],
) -> frozenset[str]:
    """Return the groups in which a criterion's scores are no more than chance."""
    return frozenset(
        view.name
        for view in views
        if not spread_of(view, name, criterion, saliency[view.name]).applicable
    )


def applicability_warning(plan: Plan, inapplicable: frozenset[str], criterion: str) -> str | None:
    """Return a warning where a criterion chose by chance among many of the pruned channels.

    Emptied groups do not count: there, nothing was chosen.

    Args:
        plan: whose channels go.
        inapplicable: groups in which the criterion cannot tell filters apart.
        criterion: its name.
    """
    narrowed = [choice for choice in plan.choices if 0 < choice.width < choice.full]
    removed = sum(choice.full - choice.width for choice in narrowed)
    doubtful = [choice for choice in narrowed if choice.group in inapplicable]
    lost = sum(choice.full - choice.width for choice in doubtful)
    if not removed or lost <= LARGE_SHARE * removed:
        return None
    names = ", ".join(choice.group for choice in doubtful[:3])
    names += ", ..." if len(doubtful) > 3 else ""
    return (
        f"Criterion {criterion} cannot tell filters apart in {len(doubtful)} of {len(narrowed)} "
        f"narrowed groups ({names}), which lose {lost} of {removed} pruned channels: there it "
        "chooses nearly at random. Compare criteria with `espalier inspect MODEL --data SOURCE "
        "--diagnose`, and set plan.criterion."
    )


def _diagnose_group(
    view: GroupView, criteria: Criteria, scores: Mapping[str, Tensor]
) -> GroupDiagnosis:
    spreads = tuple(
        spread_of(view, name, criterion, scores[name]) for name, criterion in criteria.items()
    )
    weights = tuple(describe_weights(weight) for weight in view.filters)
    judged = [one for one in spreads if one.criterion not in CONTROLS]
    inapplicable = [one.criterion for one in judged if not one.applicable]
    if not inapplicable:
        finding = "every criterion tells filters apart"
    elif len(inapplicable) == len(judged):
        finding = "no criterion tells filters apart"
    else:
        finding = f"cannot tell filters apart: {', '.join(inapplicable)}"
    return GroupDiagnosis(
        group=view.name,
        width=view.width,
        spreads=spreads,
        agreements=agreements(scores),
        weights=weights,
        verdict=f"{finding}; weights: {weights[0].verdict if weights else 'none'}",
    )


def _verdicts(names: tuple[str, ...], groups: Sequence[GroupDiagnosis]) -> tuple[str, ...]:
    """Return what holds over the network, one sentence per question."""
    if not groups:
        return ("No group can be pruned, so there is nothing to compare.",)
    alike = [
        f"{one} and {other}"
        for one, other in combinations(names, 2)
        if (mean := mean_spearman(groups, one, other)) is not None and mean >= ALIKE
    ]
    inapplicable = {
        name: sum(not s.applicable for g in groups for s in g.spreads if s.criterion == name)
        for name in names
        if name not in CONTROLS
    }
    worst = [f"{name} in {count}" for name, count in inapplicable.items() if count]
    layers = [layer for group in groups for layer in group.weights]
    gaussian = sum(layer.is_gaussian for layer in layers)
    return (
        f"Similarity: {'; '.join(alike)} rank filters alike (mean Spearman of {ALIKE:g} or more)."
        if alike
        else f"Similarity: no two criteria rank alike (mean Spearman of {ALIKE:g} or more).",
        f"Applicability: of {len(groups)} groups, filters cannot be told apart by "
        f"{', '.join(worst)}."
        if worst
        else f"Applicability: every criterion tells filters apart in all {len(groups)} groups.",
        f"Weights: {gaussian} of {len(layers)} layers look Gaussian with zero mean, common "
        "variance and weak correlation.",
    )


def mean_spearman(groups: Sequence[GroupDiagnosis], first: str, second: str) -> float | None:
    """Return the mean over groups, by width, of two criteria's Spearman correlation."""
    found = [
        (group.width, pair.spearman)
        for group in groups
        for pair in group.agreements
        if (pair.first, pair.second) == (first, second) and pair.spearman is not None
    ]
    width = sum(weight for weight, _ in found)
    return sum(weight * value for weight, value in found) / width if width else None

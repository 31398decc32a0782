"""Redundancy by the graph of a group's filters: how few of them cover all of them.

Structural redundancy reduction (Wang, Li, Wang, "Convolutional Neural Network Pruning with
Structural Redundancy Reduction", CVPR 2021, arXiv:2104.03438). Filters of unit length are the
vertices of a graph, with an edge where two are at most gamma apart. Few connected components, and
few balls that cover all vertices, mean much redundancy.

Where this departs from the paper, which was known to us through a reproduction only:

- *gamma is calibrated per group* against random Gaussian filters of the same shape. A fixed gamma
  on distances divided by the square root of the fan-in, as the reproduction has it, connects every
  pair once the fan-in passes some thousands. Here gamma is such that a random filter has
  `NULL_NEIGHBOURS` neighbours on average, whatever the width and the fan-in: a random layer counts
  as hardly redundant, and what is measured is how much more alike than chance the filters are.
- *Coupled layers*: a channel's vertex is its filters in all of them, so the cosine of two channels
  is the mean over the layers of the cosine of their filters. It is compared with the chance of a
  single layer: channels are neighbours where their filters are, on average, as alike as in one.
- *Dead filters* (all zero) are no vertices: nothing has to cover them.
- A measure gives the effective width, as the floor. The paper's own allocation is the loop of its
  figure 1, `removals`: take the group with the largest score, remove one vertex of its graph, score
  it anew, and go on until enough is removed; no weight is touched, and which filters go is decided
  afterwards.

Status: the loop is verified in the figure, the score N / (0.35 k + 0.65 N1) in a reproduction's
code. Which vertex goes, and how many at a time, is not known: here the one of most neighbours, dead
filters first, and in groups of more than 256 filters several at a time.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from pipeline.evidence.needs import filters_of
from pipeline.records import Floor, GroupView, Removal

Edges = npt.NDArray[np.bool_]

# Weights of the two graph quantities, as in the reproduction of the paper.
COMPONENTS_WEIGHT = 0.35
COVER_WEIGHT = 0.65

NULL_NEIGHBOURS = 0.1  # of a random filter, on average, at the calibrated gamma
NULL_DRAWS = 2
VISITS = 256  # of one group by the loop, at most
NULL_FAN_IN = 4096  # longer random filters are drawn this short, and their cosines scaled

ROUNDING = 1e-5  # float32 cosines of equal filters


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterGraph:
    """What the graph of one group says."""

    width: int  # of the group, dead filters included
    components: float  # connected components among the live filters
    cover: float  # greedy 1- and 2-covering numbers, averaged as in the reproduction

    @property
    def effective_width(self) -> float:
        """Filters that the group is worth: 0 (all dead) to `width` (no two alike)."""
        return COMPONENTS_WEIGHT * self.components + COVER_WEIGHT * self.cover

    @property
    def score(self) -> float:
        """Redundancy: 1 = none, `width` = all filters alike."""
        return self.width / max(self.effective_width, 1.0)


def structural(group: GroupView, neighbours: float = NULL_NEIGHBOURS) -> Floor:
    """Return the floor of a group by its filter graph, gamma calibrated against random filters.

    Args:
        group: coupled layers; needs their filters only.
        neighbours: how many neighbours a random filter has on average at the gamma that is used.

    Returns:
        floor = effective width `0.35 * components + 0.65 * cover`, rounded up, at least 1;
        score = width / effective width, 1 = not redundant.

    Raises:
        PipelineError: no layer with learned filters produces the group.
    """
    filters = filters_of(group)
    threshold = calibrated_cosine(group.width, tuple(f.shape[1] for f in filters), neighbours)
    return _floor(group, filters, threshold, f"calibrated to {neighbours:g} random neighbours")


def structural_fixed(group: GroupView, gamma: float = 0.023) -> Floor:
    """Return the floor of a group by its filter graph at one gamma for all, as the paper has it.

    Distances are divided by the square root of the fan-in (all coupled filters of a channel in
    one vector), so with gamma = 0.023 every pair of a layer is connected from a fan-in of about
    3800 on, random or not: compare with the null in the floor's detail.

    Args:
        group: coupled layers; needs their filters only.
        gamma: longest normalised distance of neighbours; 0.023 is the reproduction's value.

    Returns:
        As `structural`.
    """
    filters = filters_of(group)
    fan_in = sum(f.shape[1] for f in filters)
    return _floor(group, filters, 1 - gamma**2 * fan_in / 2, f"fixed at {gamma:g} * sqrt(fan-in)")


def calibrated_cosine(width: int, fan_ins: Sequence[int], neighbours: float) -> float:
    """Return the least cosine of neighbours: random filters have `neighbours` each on average.

    The cosine t of two random directions in d dimensions has (t + 1) / 2 ~ Beta((d-1)/2, (d-1)/2).
    Coupled layers count as one layer of the harmonic mean of their fan-ins, which has the mean of
    their variances.

    Args:
        width: filters in the layer.
        fan_ins: weights per filter, one entry per coupled layer.
        neighbours: expected among the `width - 1` others.
    """
    share = min(0.5, neighbours / max(width - 1, 1))
    fan_in = len(fan_ins) / sum(1 / fan_in for fan_in in fan_ins)
    shape = max((fan_in - 1) / 2, 0.5)  # in one dimension cosines are -1 and 1 only
    return float(2 * stats.beta.isf(share, shape, shape) - 1)


def filter_graph(cosines: Tensor, threshold: float, width: int | None = None) -> FilterGraph:
    """Return components and covering numbers of the graph with an edge at `threshold` or above.

    Args:
        cosines: `(vertices, vertices)` between the live filters.
        threshold: least cosine of neighbours; gamma is `sqrt(2 - 2 * threshold)`.
        width: of the group, dead filters included; None: as many as vertices.
    """
    near = cosines >= threshold - ROUNDING
    near.fill_diagonal_(True)
    within_two = near.float() @ near.float() > 0
    return graph_from_balls(near.numpy(), within_two.numpy(), len(near) if width is None else width)


def graph_from_balls(near: Edges, within_two: Edges, width: int) -> FilterGraph:
    """Return components and covering numbers of a graph.

    Args:
        near: `(vertices, vertices)`, which are one step apart at most, each with itself.
        within_two: which are two steps apart at most.
        width: of the group, dead filters included.
    """
    degree = near.sum(axis=1)
    components = connected_components(near)[0] if len(near) else 0
    return FilterGraph(
        width=width,
        components=components,
        cover=(_covering_number(near, degree) + _covering_number(within_two, degree)) / 2,
    )


def neighbours_of(group: GroupView, neighbours: float = NULL_NEIGHBOURS) -> Tensor:
    """Return the edges `(live, live)` between a group's filters at the calibrated gamma.

    Raises:
        PipelineError: no layer with learned filters produces the group.
    """
    filters = filters_of(group)
    threshold = calibrated_cosine(group.width, tuple(f.shape[1] for f in filters), neighbours)
    return (mean_cosines(filters) >= threshold - ROUNDING).fill_diagonal_(True)


def mean_cosines(filters: Sequence[Tensor]) -> Tensor:
    """Return `(live, live)`: the mean over the layers of the cosines of live filters.

    Two filters that are both zero count as equal, a zero filter and another one as orthogonal.
    """
    live = torch.stack([weight.any(dim=1) for weight in filters]).any(dim=0)
    total = torch.zeros(int(live.sum()), int(live.sum()))
    for weight in filters:
        kept = weight[live]
        # By the largest entry first: a norm of tiny weights would underflow.
        kept = kept / kept.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(kept.dtype).tiny)
        dead = ~kept.any(dim=1, keepdim=True)
        direction = torch.cat([torch.nn.functional.normalize(kept, dim=1), dead], dim=1)
        total += direction @ direction.T
    return total / len(filters)


def _floor(group: GroupView, filters: Sequence[Tensor], threshold: float, how: str) -> Floor:
    cosines = mean_cosines(filters)
    graph = filter_graph(cosines, threshold, width=group.width)
    null = _null_effective_width(group.width, tuple(f.shape[1] for f in filters), threshold)
    null_score = group.width / max(null, 1.0)
    dead = group.width - len(cosines)
    return Floor(
        group=group.name,
        width=group.width,
        floor=min(group.width, max(1, math.ceil(graph.effective_width - ROUNDING))),
        score=graph.score,
        null=null_score,
        detail=(
            f"effective width {graph.effective_width:.1f} of {group.width} (random filters "
            f"{null:.1f}): {graph.components:g} components, cover {graph.cover:g}, {dead} dead, "
            f"gamma {math.sqrt(max(0.0, 2 - 2 * threshold)):.3f} (cosine {threshold:.3f}, {how})"
        ),
    )


def _covering_number(balls: Edges, degree: npt.NDArray[np.int64]) -> int:
    """Return how many balls the greedy cover takes: largest degree first among the uncovered."""
    covered = np.zeros(len(balls), dtype=bool)
    count = 0
    for vertex in np.argsort(-degree, kind="stable"):
        if not covered[vertex]:
            covered |= balls[vertex]
            count += 1
    return count


@lru_cache(maxsize=512)
def _null_effective_width(width: int, fan_ins: tuple[int, ...], threshold: float) -> float:
    """Return the mean effective width of groups of random Gaussian filters of this shape."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(NULL_DRAWS):
        cosines = torch.zeros(width, width)
        for fan_in in fan_ins:
            drawn = min(fan_in, NULL_FAN_IN)
            weight = torch.randn(width, drawn, generator=generator)
            cosines += mean_cosines([weight]) * math.sqrt(drawn / fan_in)
        found.append(filter_graph(cosines / len(fan_ins), threshold).effective_width)
    return sum(found) / len(found)


def removals(views: Sequence[GroupView]) -> tuple[Removal, ...]:
    """Return in which order the loop removes filters, until every group has one left.

    The first `n` removals are the paper's allocation for `n` filters in all. Gamma is calibrated
    per group, as in `structural`; of equal scores the earlier group goes first.

    Args:
        views: of every group; needs their filters only.

    Raises:
        PipelineError: no layer with learned filters produces a group.
    """
    graphs = [_ShrinkingGraph(view) for view in views]
    queue = [(-graph.score(), place) for place, graph in enumerate(graphs)]
    heapq.heapify(queue)
    found: list[Removal] = []
    while queue:
        score, place = heapq.heappop(queue)
        graph = graphs[place]
        if graph.width <= 1:
            continue
        for _ in range(min(graph.at_a_time, graph.width - 1)):
            graph.remove()
            found.append(Removal(group=views[place].name, score=-score, width=graph.width))
        heapq.heappush(queue, (-graph.score(), place))
    return tuple(found)


class _ShrinkingGraph:
    """What the loop has left of one group's filter graph."""

    def __init__(self, view: GroupView) -> None:
        self.width, self.at_a_time = view.width, math.ceil(view.width / VISITS)
        self.near: npt.NDArray[np.bool_] = neighbours_of(view).numpy()
        counted = self.near.astype(np.float32)
        self.paths: npt.NDArray[np.float32] = counted @ counted  # of two steps between vertices
        self.left = np.ones(len(self.near), dtype=bool)
        self.degree = self.near.sum(axis=1)

    def score(self) -> float:
        """Return the redundancy of what is left."""
        if not self.left.all():  # what is gone is dropped once per visit: removing stays cheap
            kept = np.flatnonzero(self.left)
            self.near = self.near[np.ix_(kept, kept)]
            self.paths = self.paths[np.ix_(kept, kept)]
            self.degree, self.left = self.degree[kept], self.left[kept]
        return graph_from_balls(self.near, self.paths > 0, self.width).score

    def remove(self) -> None:
        """Remove a dead filter, or the vertex of most neighbours, of equals the first."""
        if self.width == self.left.sum():
            vertex = int(np.argmax(np.where(self.left, self.degree, -1)))
            column = self.near[:, vertex] & self.left
            self.paths -= np.outer(column, column)
            self.degree = self.degree - column
            self.left[vertex] = False
        self.width -= 1

"""Which group gives up filters first: structural redundancy reduction's loop over all groups.

Wang, Li, Wang, "Convolutional Neural Network Pruning with Structural Redundancy Reduction", CVPR
2021, arXiv:2104.03438, fig. 1: take the group with the largest score, remove one vertex of its
graph, score it anew, and go on until enough is removed; no weight is touched, and which filters go
is decided afterwards. Status: the loop is verified in the figure, the score N / (0.35 k + 0.65 N1)
in a reproduction's code. Which vertex goes, and how many at a time, is not known: here the one of
most neighbours, dead filters first, and in groups of more than 256 filters several at a time.
"""

import heapq
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline.records import GroupView, Removal
from pipeline.redundancy.graph import graph_from_balls, neighbours_of

VISITS = 256  # of one group, at most


def removals(views: Sequence[GroupView]) -> tuple[Removal, ...]:
    """Return in which order the loop removes filters, until every group has one left.

    The first `n` removals are the paper's allocation for `n` filters in all. Gamma is calibrated
    per group, as in `structural`; of equal scores the earlier group goes first.

    Args:
        views: of every group; needs their filters only.

    Raises:
        PipelineError: no layer with learned filters produces a group.
    """
    graphs = [_Graph(view) for view in views]
    queue = [(-graph.score(), place) for place, graph in enumerate(graphs)]
    heapq.heapify(queue)
    found: list[Removal] = []
    while queue:
        score, place = heapq.heappop(queue)
        graph = graphs[place]
        if graph.units <= 1:
            continue
        for _ in range(min(graph.at_a_time, graph.units - 1)):
            graph.remove()
            found.append(Removal(group=views[place].name, score=-score, width=graph.units))
        heapq.heappush(queue, (-graph.score(), place))
    return tuple(found)


class _Graph:
    """What is left of one group's filter graph."""

    def __init__(self, view: GroupView) -> None:
        self.units, self.at_a_time = view.width, math.ceil(view.width / VISITS)
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
        return graph_from_balls(self.near, self.paths > 0, self.units).score

    def remove(self) -> None:
        """Remove a dead filter, or the vertex of most neighbours, of equals the first."""
        if self.units == self.left.sum():
            vertex = int(np.argmax(np.where(self.left, self.degree, -1)))
            column = self.near[:, vertex] & self.left
            self.paths -= np.outer(column, column)
            self.degree = self.degree - column
            self.left[vertex] = False
        self.units -= 1

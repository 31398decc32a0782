import numpy as np
import torch
from torch import Tensor

from hardware.graph.channel_map import ChannelMap
from hardware.latency.predict import LayerCost
from pipeline.planning.widths import allocate, values_from_removals
from pipeline.records import GroupView, Removal
from pipeline.redundancy.graph import (
    NULL_NEIGHBOURS,
    calibrated_cosine,
    filter_graph,
    structural,
    unit_cosines,
)
from pipeline.redundancy.removal_loop import removals
from tests.pipeline.maps import group


def view(name: str, *filters: Tensor) -> GroupView:
    return GroupView(
        name=name, width=len(filters[0]), filters=filters, consumers=(), norm_scales=(),
        norm_shifts=(),
    )  # fmt: skip


def families(count: int, size: int) -> Tensor:
    """Return `count` orthogonal directions, each in `size` filters."""
    return torch.eye(count, 64).repeat(size, 1)


def random(width: int, fan_in: int) -> Tensor:
    return torch.randn(width, fan_in, generator=torch.Generator().manual_seed(0))


def test_the_most_redundant_group_gives_up_filters_until_the_scores_meet() -> None:
    # Scores 4 and 2: the first group falls to 2 before the second one gives anything.
    order = removals([view("a", families(4, 4)), view("b", families(8, 2))])

    assert [(r.group, r.score) for r in order[:8]] == [("a", n / 4) for n in range(16, 8, -1)]
    assert order[8] == Removal(group="a", score=2.0, width=7)  # of equals the first
    assert order[9] == Removal(group="b", score=2.0, width=15)


def test_twins_go_before_filters_that_nothing_replaces() -> None:
    filters = torch.cat([families(1, 3), torch.eye(8, 64)[1:]])  # three of one kind, seven alone

    order = removals([view("a", filters)])

    # Nothing but size is lost until two of the three are gone.
    assert [round(r.score, 6) for r in order[:3]] == [10 / 8, 9 / 8, 1.0]
    assert [r.width for r in order] == list(range(9, 0, -1))


def test_dead_filters_go_first() -> None:
    filters = torch.eye(6, 64)
    filters[4:] = 0

    order = removals([view("a", filters)])

    assert [r.score for r in order[:3]] == [6 / 4, 5 / 4, 1.0]


def test_scores_are_those_of_the_graph_that_is_left() -> None:
    base = random(8, 20)
    filters = torch.cat([base, base + 0.3 * random(24, 20)[16:], random(8, 20).flip(1)])
    one = view("a", filters)
    [*order] = removals([one])

    assert order[0].score == structural(one).score
    # By hand: the first vertex of most neighbours goes, and the rest is a graph of its own.
    cosines = unit_cosines([filters])
    threshold = calibrated_cosine(len(filters), (20,), NULL_NEIGHBOURS)
    left = list(range(len(filters)))
    for removal in order[1:10]:
        near = cosines[left][:, left] >= threshold - 1e-5
        left.pop(int(np.argmax(near.sum(dim=1).numpy())))
        expected = filter_graph(cosines[left][:, left], threshold).score
        assert removal.score == expected


def test_wide_groups_give_up_several_at_a_time() -> None:
    order = removals([view("a", families(8, 64))])  # 512 filters: two at a time

    assert [r.score for r in order[:4]] == [64, 64, 510 / 8, 510 / 8]
    assert len(order) == 511


def test_where_all_filters_take_the_same_time_the_solver_follows_the_loop() -> None:
    views = [view("a", families(4, 3)), view("b", families(5, 2)), view("c", families(6, 1))]
    order = removals(views)
    channels = ChannelMap(groups=tuple(group(v.width, [v.name], name=v.name) for v in views))
    candidates = {v.name: tuple(range(1, v.width + 1)) for v in views}
    costs = [
        LayerCost(
            layer=name,
            groups=(name,),
            cost_us=np.array(widths, dtype=float),
            measured=np.ones(len(widths), dtype=bool),
        )
        for name, widths in candidates.items()
    ]
    values = values_from_removals(order, candidates)

    for count in (3, 6, 10):
        left = {v.name: v.width for v in views}
        for removal in order[:count]:
            left[removal.group] = removal.width
        found = allocate(channels, candidates, values, costs, target_us=28 - count)
        worth = {n: values[n][w] for n, w in found.widths.items()}
        assert sum(worth.values()) <= sum(values[n][w] for n, w in left.items()) + 1e-4
        assert sum(found.widths.values()) == 28 - count
        assert found.widths["c"] == 6 == left["c"]

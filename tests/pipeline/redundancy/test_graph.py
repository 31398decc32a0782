"""Redundancy by the filter graph, on filters whose components and covers are known."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hardware.graph.channel_map import ChannelMap
from hardware.latency.predict import LayerCost
from pipeline.errors import PipelineError
from pipeline.planning.solve import allocate
from pipeline.planning.widths import values_from_removals
from pipeline.records import GroupView, PlanningInputs, Removal
from pipeline.redundancy import MEASURES, NEEDS
from pipeline.redundancy.graph import (
    NULL_NEIGHBOURS,
    calibrated_cosine,
    filter_graph,
    mean_cosines,
    removals,
    structural,
    structural_fixed,
)
from tests.pipeline.maps import group


def view(*filters: Tensor, name: str = "conv1") -> GroupView:
    return GroupView(
        name=name,
        width=len(filters[0]),
        filters=filters,
        consumers=(),
        norm_scales=(),
        norm_shifts=(),
    )


def random_filters(width: int, fan_in: int, seed: int = 0) -> Tensor:
    return torch.randn(width, fan_in, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["graph", "graph_fixed"])
def test_orthogonal_filters_all_stay(name: str) -> None:
    floor = MEASURES[name](view(torch.eye(16, 144)))

    assert floor.floor == 16 and floor.score == 1


@pytest.mark.parametrize("name", ["graph", "graph_fixed"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_each_family_of_parallel_filters_counts_once(name: str, scale: float) -> None:
    # Four directions, four filters each: 4 components, covered by 4 balls.
    filters = torch.eye(4, 144).repeat(4, 1)
    filters[4:] *= scale

    floor = MEASURES[name](view(filters))

    assert floor.floor == 4 and floor.score == 4


@pytest.mark.parametrize("name", ["graph", "graph_fixed"])
def test_filters_that_are_all_alike_leave_one(name: str) -> None:
    floor = MEASURES[name](view(torch.ones(8, 27)))

    assert floor.floor == 1 and floor.score == 8


def test_the_score_stands_beside_that_of_random_filters() -> None:
    filters = random_filters(64, 144)
    twins = filters.clone()
    twins[32:] = filters[:32]

    assert structural(view(filters)).score == pytest.approx(structural(view(filters)).null, rel=0.1)
    assert structural(view(twins)).score > 1.8 * structural(view(twins)).null
    # At a fixed gamma and this fan-in all pairs are neighbours, random or not.
    assert structural_fixed(view(random_filters(64, 4608))).null == 64


def test_opposite_filters_do_not_replace_one_another() -> None:
    filters = torch.cat([torch.eye(4, 144), -torch.eye(4, 144)])

    assert structural(view(filters)).floor == 8


def test_dead_filters_need_no_cover() -> None:
    filters = torch.eye(8, 144)
    filters[5:] = 0

    floor = structural(view(filters))

    assert floor.floor == 5 and "3 dead" in floor.detail
    assert structural(view(torch.zeros(8, 144))).floor == 1


def test_twins_in_one_coupled_layer_only_are_no_twins() -> None:
    twins, apart = torch.eye(4, 144).repeat(2, 1), torch.eye(8, 144)

    # Alike in one of four layers: a mean cosine of 1/4, below the one in 400 of a random layer.
    assert structural(view(twins, apart, apart, apart, apart, apart)).floor == 8
    assert structural(view(twins, twins)).floor == 4


def test_a_chain_of_neighbours_is_one_component_with_many_balls() -> None:
    # 0 - 1 - 2 - 3 - 4: greedy takes 1 (degree as 2 and 3, first), then 3 covers 2, 3, 4.
    near = torch.eye(5)
    for one in range(4):
        near[one, one + 1] = near[one + 1, one] = 1

    graph = filter_graph(near, threshold=0.5)

    assert graph.components == 1
    # Balls of radius 1: {0, 1, 2}, {2, 3, 4}. Of radius 2: {0..3} around 1, {2..4} around 4.
    assert graph.cover == 2
    assert graph.effective_width == pytest.approx(0.35 * 1 + 0.65 * 2)
    assert graph.score == pytest.approx(5 / 1.65)


@pytest.mark.parametrize(("width", "fan_in"), [(16, 144), (64, 576), (256, 27)])
def test_random_filters_have_as_many_neighbours_as_calibrated(width: int, fan_in: int) -> None:
    threshold = calibrated_cosine(width, (fan_in,), neighbours=1.0)

    found = []
    for seed in range(30):
        unit = torch.nn.functional.normalize(random_filters(width, fan_in, seed), dim=1)
        found.append(((unit @ unit.T >= threshold).sum() - width) / width)

    # 30 * width / 2 pairs expected, so the mean is within 4 standard errors of 1.
    assert abs(float(torch.stack(found).mean()) - 1) < 4 / math.sqrt(30 * width / 2)


def test_in_one_dimension_of_freedom_the_cosine_follows_the_arcsine_law() -> None:
    # Two dimensions: P(cos >= c) = acos(c) / pi, so a tenth lies above cos(pi / 10).
    assert calibrated_cosine(11, (2,), neighbours=1.0) == pytest.approx(math.cos(math.pi / 10))


@pytest.mark.parametrize(("width", "fan_in"), [(16, 144), (64, 576), (512, 4608)])
def test_random_layers_hardly_count_as_redundant_at_any_shape(width: int, fan_in: int) -> None:
    assert structural(view(random_filters(width, fan_in))).floor >= 0.85 * width


def test_a_fixed_gamma_calls_wide_random_layers_redundant() -> None:
    # cos >= 1 - 0.023 ** 2 * 4608 / 2 = -0.219 holds for every pair of random filters.
    floor = structural_fixed(view(random_filters(64, 4608)))

    assert floor.floor == 1 and "random filters 1.0" in floor.detail


def test_the_null_is_reported_beside_the_layer() -> None:
    floor = structural(view(torch.eye(4, 144).repeat(4, 1)))

    assert floor.detail.startswith("effective width 4.0 of 16 (random filters 1")


@pytest.mark.parametrize("name", sorted(set(MEASURES) - set(NEEDS)))
@pytest.mark.parametrize("shape", [(1, 9), (2, 1), (5, 4), (40, 9)])
def test_floors_lie_between_one_filter_and_all(name: str, shape: tuple[int, int]) -> None:
    floor = MEASURES[name](view(random_filters(*shape)))

    assert 1 <= floor.floor <= floor.width == shape[0]
    assert 1 <= floor.score <= shape[0]


def test_a_group_without_filters_is_refused() -> None:
    empty = GroupView(name="add", width=4, filters=(), consumers=(), norm_scales=(), norm_shifts=())

    with pytest.raises(PipelineError, match="Group add has no learned filters"):
        structural(empty)
    assert MEASURES["none"](empty).floor == 1


def families(count: int, size: int) -> Tensor:
    """Return `count` orthogonal directions, each in `size` filters."""
    return torch.eye(count, 64).repeat(size, 1)


def test_the_most_redundant_group_gives_up_filters_until_the_scores_meet() -> None:
    # Scores 4 and 2: the first group falls to 2 before the second one gives anything.
    order = removals([view(families(4, 4), name="a"), view(families(8, 2), name="b")])

    assert [(r.group, r.score) for r in order[:8]] == [("a", n / 4) for n in range(16, 8, -1)]
    assert order[8] == Removal(group="a", score=2.0, width=7)  # of equals the first
    assert order[9] == Removal(group="b", score=2.0, width=15)


def test_twins_go_before_filters_that_nothing_replaces() -> None:
    filters = torch.cat([families(1, 3), torch.eye(8, 64)[1:]])  # three of one kind, seven alone

    order = removals([view(filters, name="a")])

    # Nothing but size is lost until two of the three are gone.
    assert [round(r.score, 6) for r in order[:3]] == [10 / 8, 9 / 8, 1.0]
    assert [r.width for r in order] == list(range(9, 0, -1))


def test_dead_filters_go_first() -> None:
    filters = torch.eye(6, 64)
    filters[4:] = 0

    order = removals([view(filters, name="a")])

    assert [r.score for r in order[:3]] == [6 / 4, 5 / 4, 1.0]


def test_scores_are_those_of_the_graph_that_is_left() -> None:
    base = random_filters(8, 20)
    filters = torch.cat(
        [base, base + 0.3 * random_filters(24, 20)[16:], random_filters(8, 20).flip(1)]
    )
    one = view(filters, name="a")
    [*order] = removals([one])

    assert order[0].score == structural(one).score
    # By hand: the first vertex of most neighbours goes, and the rest is a graph of its own.
    cosines = mean_cosines([filters])
    threshold = calibrated_cosine(len(filters), (20,), NULL_NEIGHBOURS)
    left = list(range(len(filters)))
    for removal in order[1:10]:
        near = cosines[left][:, left] >= threshold - 1e-5
        left.pop(int(np.argmax(near.sum(dim=1).numpy())))
        expected = filter_graph(cosines[left][:, left], threshold).score
        assert removal.score == expected


def test_wide_groups_give_up_several_at_a_time() -> None:
    order = removals([view(families(8, 64), name="a")])  # 512 filters: two at a time

    assert [r.score for r in order[:4]] == [64, 64, 510 / 8, 510 / 8]
    assert len(order) == 511


def test_where_all_filters_take_the_same_time_the_solver_follows_the_loop() -> None:
    views = [
        view(families(4, 3), name="a"),
        view(families(5, 2), name="b"),
        view(families(6, 1), name="c"),
    ]
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
    inputs = PlanningInputs(channels=channels, candidates=candidates, values=values)

    for count in (3, 6, 10):
        left = {v.name: v.width for v in views}
        for removal in order[:count]:
            left[removal.group] = removal.width
        found = allocate(inputs, costs, target_us=28 - count)
        worth = {n: values[n][w] for n, w in found.widths.items()}
        assert sum(worth.values()) <= sum(values[n][w] for n, w in left.items()) + 1e-4
        assert sum(found.widths.values()) == 28 - count
        assert found.widths["c"] == 6 == left["c"]

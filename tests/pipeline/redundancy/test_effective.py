"""Redundancy by gradients, on matrices whose effective filters are known."""

import math

import pytest
import torch

from pipeline.errors import PipelineError
from pipeline.records import GroupView
from pipeline.redundancy import MEASURES, NEEDS
from pipeline.redundancy.effective import effective_filters, maximum_compression
from tests.pipeline.maps import draw, view

EFFECTIVE = ["effective", "effective_threshold", "effective_entropy"]


@pytest.mark.parametrize("name", EFFECTIVE)
def test_orthogonal_gradients_leave_every_filter_effective(name: str) -> None:
    floor = MEASURES[name](view(torch.eye(8, 18).repeat(3, 1, 1)))

    assert floor.floor == 8 and floor.score == pytest.approx(1)
    assert "0 elimination, 0 overlap, 0 linear" in floor.detail


@pytest.mark.parametrize("name", EFFECTIVE)
def test_duplicated_filters_count_once(name: str) -> None:
    twins = torch.eye(4, 18).repeat(2, 1)

    floor = MEASURES[name](view(twins[None], twins[None]))

    assert floor.floor == 4 and floor.score == pytest.approx(2)
    assert "0 elimination, 4 overlap, 0 linear" in floor.detail


@pytest.mark.parametrize("name", EFFECTIVE)
def test_gradients_of_rank_3_leave_3_effective_filters(name: str) -> None:
    # Sixteen filters along 3 orthogonal directions of equal size: a tight frame, no two parallel.
    angles = 2 * math.pi * torch.arange(16.0) / 16
    frame = torch.stack([angles.cos(), angles.sin(), torch.full((16,), math.sqrt(0.5))], dim=1)
    rows = frame @ torch.linalg.qr(torch.randn(20, 3, generator=draw()))[0].T

    floor = MEASURES[name](view(rows[None]))

    assert floor.floor == 3
    assert "0 elimination, 0 overlap, 13 linear" in floor.detail


def test_silent_gradients_are_eliminations_and_at_least_one_filter_stays() -> None:
    rows = torch.eye(6, 9)
    rows[4:] = 0

    assert "2 elimination, 0 overlap, 0 linear" in MEASURES["effective"](view(rows[None])).detail
    assert MEASURES["effective"](view(torch.zeros(1, 6, 9))).floor == 1


def test_effective_filters_do_not_depend_on_the_size_of_gradients() -> None:
    rows = torch.randn(2, 12, 30, generator=draw())

    assert MEASURES["effective"](view(1e-20 * rows)) == MEASURES["effective"](view(rows))


def test_the_three_counts_by_arithmetic() -> None:
    # Squared singular values 0.6, 0.395, 0.004995, 0.000005 of 1.
    squares = torch.tensor([0.6, 0.395, 0.004995, 0.000005], dtype=torch.float64)

    found = effective_filters(torch.diag(squares))

    assert found.by_energy == 2  # 0.995 >= 0.99
    assert found.by_threshold == 3  # 0.000005 / 0.6 < 0.01 ** 2
    assert found.by_entropy == pytest.approx(math.exp(-sum(s * math.log(s) for s in squares)))


def test_batches_that_disagree_widen_the_interval() -> None:
    # Each of 4 batches moves 2 other filters; a resample misses some of them.
    apart = torch.zeros(4, 8, 8)
    for batch in range(4):
        apart[batch, 2 * batch, 0] = apart[batch, 2 * batch + 1, 1] = 1
    agreeing = torch.eye(8).repeat(4, 1, 1)

    assert "energy from 8.0 to 8.0 over 4 batches" in MEASURES["effective"](view(agreeing)).detail
    assert MEASURES["effective"](view(apart)).floor == 8
    found = maximum_compression([view(apart, name="a"), view(agreeing, name="b")])[0]
    assert found.share == 0 == found.low and found.high > 0  # the share is part of its interval
    assert found.high <= 6 / 16  # at the very least 2 of 8 stay in one group, all in the other


def test_the_maximum_compression_weighs_groups_by_their_width() -> None:
    twins, apart = torch.eye(2, 8).repeat(2, 1), torch.eye(8, 8)

    found = maximum_compression([view(twins[None], name="a"), view(apart[None], name="b")])

    for one in found:  # equal gradients: all counts are the rank
        assert [one.share, one.low, one.high] == pytest.approx([2 / 12] * 3, abs=1e-6)


def test_too_few_batches_to_tell_filters_apart_are_refused() -> None:
    with pytest.raises(PipelineError, match=r"8 gradient columns of group conv1 in 2 batches.* 9"):
        MEASURES["effective"](view(torch.randn(2, 9, 4, generator=draw())))


@pytest.mark.parametrize("name", sorted(NEEDS))
def test_a_measure_without_what_it_needs_says_so(name: str) -> None:
    bare = GroupView(
        name="conv1",
        width=4,
        filters=(torch.eye(4),),
        consumers=(),
        norm_scales=(),
        norm_shifts=(),
    )

    with pytest.raises(PipelineError, match=f"needs {NEEDS[name]}, and the view of group conv1"):
        MEASURES[name](bare)

"""Measures that need images, on gradients and responses whose effective filters are known."""

import math

import pytest
import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.records import GroupView, Responses
from pipeline.redundancy import MEASURES, NEEDS
from pipeline.redundancy.effective import effective_filters, maximum_compression
from pipeline.redundancy.responses import functionality, similarity
from pipeline.redundancy.whole import network_redundancy
from tests.pipeline.maps import seen

EFFECTIVE = ["effective", "effective_threshold", "effective_entropy"]


def view(*gradients: Tensor, name: str = "conv1", seen: tuple[Responses, ...] = ()) -> GroupView:
    """Return a group with these gradients `(batches, width, fan-in)`, one per coupled layer."""
    width = gradients[0].shape[1] if gradients else len(seen[0].active)
    return GroupView(
        name=name,
        width=width,
        filters=tuple(gradient[0] for gradient in gradients) or (torch.eye(width),),
        consumers=(),
        norm_scales=(),
        norm_shifts=(),
        filter_gradients=gradients,
        responses=seen,
    )


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
    rows = frame @ torch.linalg.qr(torch.randn(20, 3, generator=_draw()))[0].T

    floor = MEASURES[name](view(rows[None]))

    assert floor.floor == 3
    assert "0 elimination, 0 overlap, 13 linear" in floor.detail


def test_silent_gradients_are_eliminations_and_at_least_one_filter_stays() -> None:
    rows = torch.eye(6, 9)
    rows[4:] = 0

    assert "2 elimination, 0 overlap, 0 linear" in MEASURES["effective"](view(rows[None])).detail
    assert MEASURES["effective"](view(torch.zeros(1, 6, 9))).floor == 1


def test_effective_filters_do_not_depend_on_the_size_of_gradients() -> None:
    rows = torch.randn(2, 12, 30, generator=_draw())

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
    found = maximum_compression([view(apart, name="a"), view(agreeing, name="b")])["by_energy"]
    assert found.share == 0 == found.low and found.high > 0  # the share is part of its interval
    assert found.high <= 6 / 16  # at the very least 2 of 8 stay in one group, all in the other


def test_the_maximum_compression_weighs_groups_by_their_width() -> None:
    twins, apart = torch.eye(2, 8).repeat(2, 1), torch.eye(8, 8)

    found = maximum_compression([view(twins[None], name="a"), view(apart[None], name="b")])

    for one in found.values():  # equal gradients: all counts are the rank
        assert [one.share, one.low, one.high] == pytest.approx([2 / 12] * 3, abs=1e-6)


def test_a_network_as_a_whole_has_a_maximum_compression_and_groups_that_respond_alike() -> None:
    values = torch.randn(40, 6, generator=_draw())
    turned = 3 * values @ torch.linalg.qr(torch.randn(6, 6, generator=_draw()))[0] + 1
    other = torch.randn(40, 6, generator=torch.Generator().manual_seed(99))
    views = [
        view(torch.eye(6, 8)[None], name=name, seen=(seen(one),))
        for name, one in (("a", values), ("b", turned), ("c", other))
    ]

    found = network_redundancy(views)

    assert found.groups == ("a", "b", "c")
    assert found.likeness[0] == pytest.approx([1, 1, found.likeness[2][0]])
    assert found.likeness[0][2] < 0.5
    assert [(one.count, one.share) for one in found.compression] == [
        ("energy", 0), ("threshold", 0), ("entropy", pytest.approx(0, abs=1e-6))
    ]  # fmt: skip


def test_a_network_whose_compression_cannot_be_told_says_why() -> None:
    few = view(torch.randn(2, 9, 4, generator=_draw()), seen=(seen(torch.randn(20, 9)),))

    found = network_redundancy([few])

    assert found.compression == () and "too few to tell 9 filters apart" in found.note


def test_too_few_batches_to_tell_filters_apart_are_refused() -> None:
    with pytest.raises(PipelineError, match=r"8 gradient columns of group conv1 in 2 batches.* 9"):
        MEASURES["effective"](view(torch.randn(2, 9, 4, generator=_draw())))


def test_filters_that_respond_alike_share_a_function() -> None:
    # Three independent functions; filters 3 and 4 repeat 0 and 1 with another size and offset.
    values = torch.linalg.qr(torch.randn(60, 4, generator=_draw()))[0]
    values = values - values.mean(dim=0)
    values = torch.cat([values[:, :3], 5 * values[:, :1] + 2, 0.1 * values[:, 1:2]], dim=1)

    floor = functionality(view(seen=(seen(values),)))

    assert floor.floor == 3 and floor.score == pytest.approx(5 / 3)
    assert "3 functions of 5" in floor.detail


def test_opposite_filters_have_two_functions_and_constant_ones_none() -> None:
    wave = torch.randn(50, 1, generator=_draw())
    values = torch.cat([wave, -wave, torch.full((50, 1), 7.0), torch.zeros(50, 1)], dim=1)

    floor = functionality(view(seen=(seen(values),)))

    assert floor.floor == 2 and "2 never change" in floor.detail


def test_a_chain_of_neighbours_is_not_one_function() -> None:
    # Correlations of neighbours cos(20 degrees) = 0.94, of the ends cos(40 degrees) = 0.77.
    base = torch.linalg.qr(torch.randn(80, 3, generator=_draw()) - 0.0)[0]
    base = torch.linalg.qr(base - base.mean(dim=0))[0][:, :2]
    angles = [math.radians(degrees) for degrees in (0, 20, 40)]
    values = torch.stack([base @ torch.tensor([math.cos(a), math.sin(a)]) for a in angles], dim=1)

    assert functionality(view(seen=(seen(values),))).floor == 2


def test_functions_that_one_of_two_readers_tells_apart_survive() -> None:
    wave, other = torch.randn(2, 400, 1, generator=_draw())
    alike, apart = torch.cat([wave, wave], dim=1), torch.cat([wave, other], dim=1)

    assert functionality(view(seen=(seen(alike), seen(apart)))).floor == 2
    assert functionality(view(seen=(seen(alike), seen(alike)))).floor == 1


def test_the_feature_rank_is_that_of_the_widest_reader() -> None:
    base = torch.randn(100, 4, generator=_draw())
    mixed = base[:, :2] @ torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, -1.0]])

    assert MEASURES["feature_rank"](view(seen=(seen(mixed),))).floor == 2
    assert MEASURES["feature_rank"](view(seen=(seen(mixed), seen(base)))).floor == 4
    with pytest.raises(
        PipelineError, match=r"saw 3 responses of group conv1, too few .* 4 filters"
    ):
        MEASURES["feature_rank"](view(seen=(seen(base[:3]),)))


def test_cka_ignores_rotation_and_scale_and_sees_independence() -> None:
    values = torch.randn(50, 4, generator=_draw())
    turn = torch.linalg.qr(torch.randn(4, 4, generator=_draw()))[0]
    apart = torch.linalg.qr(torch.cat([torch.ones(50, 1), values, values.roll(7, 0)], dim=1))[0]

    assert similarity(values, 3 * values @ turn) == pytest.approx(1, abs=1e-5)
    assert similarity(apart[:, 1:5], apart[:, 5:9]) == pytest.approx(0, abs=1e-5)


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


def _draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)

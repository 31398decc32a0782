from dataclasses import replace

import pytest
import torch

from pipeline.criteria import CRITERIA, NEEDS_GRADIENTS
from pipeline.errors import PipelineError
from pipeline.records import GroupView


def view(**fields) -> GroupView:
    """Return three units: [3, 4] (L1 7, L2 5), [1, 0] (L1 1, L2 1) and [0, 0]."""
    given = {
        "name": "conv1",
        "width": 3,
        "filters": (torch.tensor([[3.0, -4.0], [1.0, 0.0], [0.0, 0.0]]),),
        "consumers": (),
        "norm_scales": (),
        "norm_shifts": (),
    }
    return GroupView(**{**given, **fields})


def test_l1_is_the_sum_of_absolute_weights_over_their_mean() -> None:
    # Sums 7, 1, 0; mean 8 / 3.
    torch.testing.assert_close(CRITERIA["l1"](view()), torch.tensor([7.0, 1.0, 0.0]) * 3 / 8)


def test_l2_is_the_euclidean_norm_over_its_mean() -> None:
    torch.testing.assert_close(CRITERIA["l2"](view()), torch.tensor([5.0, 1.0, 0.0]) * 3 / 6)


def test_coupled_layers_count_alike_whatever_the_size_of_their_weights() -> None:
    one = torch.tensor([[1.0], [2.0], [3.0]])
    other = 1000 * torch.tensor([[3.0], [2.0], [1.0]])

    # (1 + 3) / 2 / 2 = 1 for every unit.
    scores = CRITERIA["l1"](view(filters=(one, other)))

    torch.testing.assert_close(scores, torch.ones(3))


def test_taylor_is_the_squared_sum_of_gradient_times_weight_averaged_over_batches() -> None:
    gradients = torch.tensor(
        [[[1.0, 1.0], [2.0, 5.0], [9.0, 9.0]], [[2.0, 1.0], [4.0, 5.0], [9.0, 9.0]]]
    )

    scores = CRITERIA["taylor"](view(filter_gradients=(gradients,)))

    # Batch 1: 3 - 4 = -1, 2, 0; batch 2: 6 - 4 = 2, 4, 0. Mean squares 2.5, 10, 0.
    torch.testing.assert_close(scores, torch.tensor([2.5, 10.0, 0.0]) * 3 / 12.5)


def test_taylor_adds_coupled_layers_with_their_signs() -> None:
    weight = torch.tensor([[1.0], [1.0]])
    up, down = torch.tensor([[[1.0], [1.0]]]), torch.tensor([[[-1.0], [1.0]]])

    scores = CRITERIA["taylor"](
        view(width=2, filters=(weight, weight), filter_gradients=(up, down))
    )

    # Changes 1 - 1 = 0 and 1 + 1 = 2.
    torch.testing.assert_close(scores, torch.tensor([0.0, 2.0]))


def test_taylor_without_gradients_says_what_to_do() -> None:
    with pytest.raises(PipelineError, match=r"needs gradients.* group conv1 has none.* to l2"):
        CRITERIA["taylor"](view())


def test_bn_scale_is_the_scale_times_the_norm_of_what_reads_the_channel() -> None:
    norm = torch.tensor([-2.0, 1.0, 3.0])
    columns = torch.tensor([[3.0, 4.0], [5.0, 0.0], [0.0, 0.0]])

    scores = CRITERIA["bn_scale"](view(norm_scales=(norm,), consumers=(columns,)))

    # 2 * 5, 1 * 5, 3 * 0; mean 5.
    torch.testing.assert_close(scores, torch.tensor([2.0, 1.0, 0.0]))


def test_bn_scale_falls_back_on_the_filters_where_nothing_is_normalised() -> None:
    torch.testing.assert_close(CRITERIA["bn_scale"](view()), CRITERIA["l2"](view()))


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_every_criterion_scores_every_unit_with_mean_1_and_a_dead_unit_with_0(name: str) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, columns = torch.randn(6, 9, generator=draw), torch.randn(6, 5, generator=draw)
    gradient, scale = torch.randn(2, 6, 9, generator=draw), torch.randn(6, generator=draw)
    for tensor in (weight, columns, scale):
        tensor[4] = 0
    full = view(
        width=6,
        filters=(weight, 2 * weight),
        consumers=(columns,),
        norm_scales=(scale,),
        filter_gradients=(gradient, gradient),
    )

    scores = CRITERIA[name](full)

    assert scores.shape == (6,) and scores[4] == 0 and bool((scores >= 0).all())
    assert float(scores.mean()) == pytest.approx(1)


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_every_criterion_gives_0_where_all_is_0(name: str) -> None:
    nothing = view(
        filters=(torch.zeros(3, 2),),
        filter_gradients=(torch.zeros(1, 3, 2),),
        norm_scales=(torch.zeros(3),),
    )

    assert CRITERIA[name](nothing).tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_a_group_without_filters_is_refused(name: str) -> None:
    with pytest.raises(PipelineError, match="Group conv1 has no learned filters"):
        CRITERIA[name](replace(view(), filters=()))


def test_criteria_that_need_gradients_are_registered() -> None:
    for name, criterion in CRITERIA.items():
        if name in NEEDS_GRADIENTS:
            with pytest.raises(PipelineError, match="needs gradients"):
                criterion(view())
        else:
            assert criterion(view()).shape == (3,)

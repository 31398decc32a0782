import math
from dataclasses import replace

import pytest
import torch

from pipeline.criteria import CRITERIA, NEEDS, chance
from pipeline.criteria.activation import entropies
from pipeline.criteria.distance import fermat_point_of
from pipeline.criteria.reconstruction import removal_order
from pipeline.errors import PipelineError
from pipeline.records import GroupView, Responses


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
    with pytest.raises(PipelineError, match=r"needs gradients.* group conv1 has none.* as l2"):
        CRITERIA["taylor"](view())


def test_bn_scale_is_the_scale_times_the_norm_of_what_reads_the_channel() -> None:
    norm = torch.tensor([-2.0, 1.0, 3.0])
    columns = torch.tensor([[3.0, 4.0], [5.0, 0.0], [0.0, 0.0]])

    scores = CRITERIA["bn_scale"](view(norm_scales=(norm,), consumers=(columns,)))

    # 2 * 5, 1 * 5, 3 * 0; mean 5.
    torch.testing.assert_close(scores, torch.tensor([2.0, 1.0, 0.0]))


def test_bn_scale_falls_back_on_the_filters_where_nothing_is_normalised() -> None:
    torch.testing.assert_close(CRITERIA["bn_scale"](view()), CRITERIA["l2"](view()))


def responses(**fields) -> Responses:
    """Return what three units answer to two images: the last one nothing."""
    given = {
        "reader": "conv2",
        "active": torch.tensor([0.75, 0.25, 0.0]),
        "magnitude": torch.tensor([3.0, 1.0, 0.0]),
        "pooled": torch.tensor([[1.0, 2.0, 0.0], [3.0, 2.0, 0.0]]),
        "map_ranks": torch.tensor([4.0, 2.0, 0.0]),
        "covariance": torch.diag(torch.tensor([4.0, 1.0, 0.0])),
        "contributions": torch.diag(torch.tensor([9.0, 1.0, 0.0])),
        "rows": 20,
    }
    return Responses(**{**given, **fields})


def test_fpgm_is_the_sum_of_distances_to_the_other_filters() -> None:
    # [0, 0], [3, 4], [6, 8]: distances 5, 10 and 5; sums 15, 10, 15.
    weight = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])

    scores = CRITERIA["fpgm"](view(filters=(weight,)))

    torch.testing.assert_close(scores, torch.tensor([15.0, 10.0, 15.0]) * 3 / 40)


def test_the_fermat_point_of_a_triangle_sees_its_sides_under_120_degrees() -> None:
    triangle = torch.tensor([[0.0, 0.0], [4.0, 0.0], [1.0, 3.0]])

    arms = torch.nn.functional.normalize(triangle - fermat_point_of(triangle), dim=1)

    cosines = (arms @ arms.T)[[0, 0, 1], [1, 2, 2]]
    torch.testing.assert_close(cosines, torch.full((3,), -0.5), atol=1e-4, rtol=0)


def test_the_fermat_point_of_points_on_a_line_is_the_middle_one() -> None:
    line = torch.tensor([[0.0], [1.0], [10.0]])

    torch.testing.assert_close(fermat_point_of(line), torch.tensor([1.0]), atol=1e-3, rtol=0)


def test_taylor_on_norms_adds_scale_and_shift_before_the_absolute_value() -> None:
    group = view(
        norm_scales=(torch.tensor([2.0, 1.0, 1.0]),),
        norm_shifts=(torch.tensor([1.0, 1.0, 0.0]),),
        norm_scale_gradients=(torch.tensor([[1.0, 1.0, 3.0]]),),
        norm_shift_gradients=(torch.tensor([[-2.0, 1.0, 5.0]]),),
    )

    # |2 - 2|, |1 + 1|, |3 + 0|.
    scores = CRITERIA["taylor_bn"](group)

    torch.testing.assert_close(scores, torch.tensor([0.0, 2.0, 3.0]) * 3 / 5)


def test_taylor_on_gates_adds_readers_before_the_square() -> None:
    columns = (torch.ones(3, 2), torch.ones(3, 4))
    gates = (torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[1.0, -1.0, 1.0]]))

    scores = CRITERIA["taylor_gate"](view(consumers=columns, gate_gradients=gates))

    # (1 + 1)^2, (1 - 1)^2, (0 + 1)^2.
    torch.testing.assert_close(scores, torch.tensor([4.0, 0.0, 1.0]) * 3 / 5)


def test_second_order_is_half_the_weights_squared_times_the_mean_squared_gradient() -> None:
    gradients = torch.tensor(
        [[[1.0, 0.0], [3.0, 1.0], [1.0, 1.0]], [[1.0, 2.0], [1.0, 1.0], [1, 1]]]
    )

    scores = CRITERIA["second_order"](view(filter_gradients=(gradients,)))

    # (9 * 1 + 16 * 2) / 2 = 20.5, 1 * 5 / 2 = 2.5, 0.
    torch.testing.assert_close(scores, torch.tensor([20.5, 2.5, 0.0]) * 3 / 23)


def test_bn_scale_alone_is_the_absolute_scale() -> None:
    scores = CRITERIA["bn_scale_alone"](view(norm_scales=(torch.tensor([-2.0, 1.0, 0.0]),)))

    torch.testing.assert_close(scores, torch.tensor([2.0, 1.0, 0.0]))


def test_scp_is_the_probability_that_a_relu_lets_a_channel_through() -> None:
    # beta / |gamma| = 1, -1, 0: Phi = 0.8413, 0.1587, 0.5.
    group = view(
        norm_scales=(torch.tensor([2.0, -1.0, 3.0]),),
        norm_shifts=(torch.tensor([2.0, -1.0, 0.0]),),
    )

    phi = [(1 + math.erf(z / math.sqrt(2))) / 2 for z in (1, -1, 0)]
    torch.testing.assert_close(CRITERIA["scp"](group), torch.tensor(phi) * 3 / sum(phi))


def test_scp_of_a_constant_channel_is_0_or_1() -> None:
    group = view(norm_scales=(torch.zeros(3),), norm_shifts=(torch.tensor([1.0, -1.0, 1.0]),))

    torch.testing.assert_close(CRITERIA["scp"](group), torch.tensor([1.5, 0.0, 1.5]))


def test_scp_takes_bias_and_filter_norm_where_nothing_is_normalised() -> None:
    # Norms 5, 1, 0 and biases 5, 1, -1: Phi(1), Phi(1), 0.
    scores = CRITERIA["scp"](view(biases=(torch.tensor([5.0, 1.0, -1.0]),)))

    torch.testing.assert_close(scores, torch.tensor([1.5, 1.5, 0.0]))


def test_cpmc_adds_the_filter_and_the_columns_that_read_it() -> None:
    columns = torch.tensor([[0.0, 0.0], [3.0, -3.0], [0.0, 6.0]])

    # Filters 7, 1, 0 over 8 / 3; columns 0, 6, 6 over 4; their sum has mean 2.
    expected = torch.tensor([7 * 3 / 8, 3 / 8 + 1.5, 1.5]) / 2
    torch.testing.assert_close(CRITERIA["cpmc"](view(consumers=(columns,))), expected)


def test_criteria_of_responses_are_what_was_counted_over_its_mean() -> None:
    group = view(responses=(responses(),))

    torch.testing.assert_close(CRITERIA["apoz"](group), torch.tensor([2.25, 0.75, 0.0]))
    torch.testing.assert_close(CRITERIA["mean_activation"](group), torch.tensor([2.25, 0.75, 0.0]))
    torch.testing.assert_close(CRITERIA["hrank"](group), torch.tensor([2.0, 1.0, 0.0]))
    # Unit 0 falls into two bins (entropy log 2), the others answer both images alike.
    torch.testing.assert_close(CRITERIA["entropy"](group), torch.tensor([3.0, 0.0, 0.0]))


def test_entropy_is_the_logarithm_of_the_bins_where_all_are_equally_full() -> None:
    values = torch.arange(32.0)[:, None] * torch.tensor([1.0, -7.0])

    torch.testing.assert_close(entropies(values, bins=16), torch.full((2,), math.log(16)))


def test_thinet_gives_up_channels_that_cancel_first() -> None:
    # Terms of three channels at four outputs: 0 and 1 cancel, 2 is small and alone.
    terms = torch.tensor([[5.0, -5.0, 1.0], [3.0, -3.0, 1.0], [-2.0, 2.0, 1.0], [1.0, -1.0, 1.0]])

    order = removal_order((terms.T @ terms / 4).double())

    # 2 costs 1; then 0 would cost 9.75 (all products with 2 included), 1 likewise; then the rest.
    assert order.tolist().index(0) == 2
    pair = removal_order((terms[:, :2].T @ terms[:, :2]).double())
    assert pair.tolist() == [0, 1]


def test_thinet_errors_follow_from_brute_force() -> None:
    terms = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    order = removal_order(terms.T @ terms)

    gone: list[int] = []
    for step in range(6):
        error = {
            j: float(terms[:, [*gone, j]].sum(dim=1).square().sum())
            for j in range(6)
            if j not in gone
        }
        gone.append(min(error, key=error.__getitem__))
        assert int(order[gone[-1]]) == step


def test_random_depends_on_seed_and_group_only() -> None:
    same = CRITERIA["random"](view(filters=(torch.ones(3, 9),)))

    assert torch.equal(CRITERIA["random"](view()), same)
    assert not torch.equal(CRITERIA["random"](view(name="conv2")), same)
    assert not torch.equal(chance.random(view(), seed=1), same)


# Of a dead unit these say something else than 0: how far it lies from the others, what its norm
# would let through, nothing at all, or when it goes.
BEYOND_SIZE = {"fpgm", "fermat", "scp", "random"}


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_every_criterion_has_mean_1_and_gives_0_to_a_dead_unit(name: str) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, columns = torch.randn(6, 9, generator=draw), torch.randn(6, 5, generator=draw)
    gradient, scale = torch.randn(2, 6, 9, generator=draw), torch.randn(6, generator=draw)
    for tensor in (weight, columns, scale):
        tensor[4] = 0
    values = torch.randn(40, 6, generator=draw).relu()
    values[:, 4] = 0
    seen = responses(
        active=(values > 0).float().mean(dim=0),
        magnitude=values.mean(dim=0),
        pooled=values,
        map_ranks=(values > 0).any(dim=0).float(),
        covariance=values.T.cov(),
        contributions=values.T @ values,
    )
    full = view(
        width=6,
        filters=(weight, 2 * weight),
        consumers=(columns,),
        norm_scales=(scale,),
        norm_shifts=(scale,),
        filter_gradients=(gradient, gradient),
        norm_scale_gradients=(gradient[:, :, 0],),
        norm_shift_gradients=(gradient[:, :, 1],),
        gate_gradients=((gradient[:, :, :5] * columns).sum(dim=2),),
        responses=(seen,),
    )

    scores = CRITERIA[name](full)

    assert scores.shape == (6,) and bool((scores >= 0).all())
    assert scores[4] == 0 or name in BEYOND_SIZE
    assert float(scores.mean()) == pytest.approx(1)


@pytest.mark.parametrize("name", sorted(set(CRITERIA) - {"random"}))
def test_every_criterion_gives_0_where_all_is_0(name: str) -> None:
    zeros = torch.zeros(3, 3)
    nothing = view(
        filters=(torch.zeros(3, 2),),
        filter_gradients=(torch.zeros(1, 3, 2),),
        norm_scales=(torch.zeros(3),),
        norm_shifts=(torch.zeros(3),),
        norm_scale_gradients=(torch.zeros(1, 3),),
        norm_shift_gradients=(torch.zeros(1, 3),),
        responses=(
            responses(
                active=zeros[0],
                magnitude=zeros[0],
                pooled=zeros,
                map_ranks=zeros[0],
                covariance=zeros,
                contributions=zeros,
            ),
        ),
    )

    assert CRITERIA[name](nothing).tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_a_group_without_filters_is_refused(name: str) -> None:
    with pytest.raises(PipelineError, match="Group conv1 has no learned filters"):
        CRITERIA[name](replace(view(), filters=()))


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_what_a_criterion_needs_is_registered(name: str) -> None:
    if name in NEEDS:
        with pytest.raises(PipelineError, match=f"Criterion {name} needs {NEEDS[name]}, .*l2"):
            CRITERIA[name](view(consumers=(torch.ones(3, 2),)))
    else:
        assert CRITERIA[name](view()).shape == (3,)

import pytest
import torch
from torch import Tensor

from pipeline.records import GroupView
from pipeline.redundancy import MEASURES, SCORES
from tests.pipeline.maps import seen

MEASURED = [name for name in MEASURES if name != "none"]


def view(directions: Tensor) -> GroupView:
    """Return filters that are these rows, with gradients and responses in the same directions."""
    basis = torch.randn(400, directions.shape[1], generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(basis - basis.mean(dim=0))[0]
    return GroupView(
        name="g",
        width=len(directions),
        filters=(directions,),
        consumers=(),
        norm_scales=(),
        norm_shifts=(),
        filter_gradients=(directions.repeat(2, 1, 1),),
        responses=(seen(basis @ directions.T),),
        patterns=directions,
    )


def test_every_measure_has_a_score_per_filter() -> None:
    assert SCORES.keys() == MEASURES.keys()
    assert SCORES["none"](view(torch.eye(3))).tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", MEASURED)
def test_twins_replace_one_another_and_orthogonal_filters_nothing(name: str) -> None:
    filters = torch.eye(6)
    filters[4] = 2 * filters[0]  # 0 and 4 are twins but for the size; 1, 2, 3, 5 stand alone

    scores = SCORES[name](view(filters))

    assert scores.tolist() == pytest.approx([1, 0, 0, 0, 1, 0], abs=1e-4)


@pytest.mark.parametrize("name", MEASURED)
def test_a_dead_filter_is_replaceable(name: str) -> None:
    filters = torch.eye(5)
    filters[2] = 0

    assert SCORES[name](view(filters)).tolist() == pytest.approx([0, 0, 1, 0, 0], abs=1e-4)


def test_a_combination_of_others_is_spanned_though_none_is_alike() -> None:
    filters = torch.eye(5)
    filters[4] = torch.tensor([1.0, 1, 1, 1, 0]) / 2  # cosine 1/2 with each of the others
    group = view(filters)

    assert SCORES["graph"](group).tolist() == pytest.approx([0.5] * 5, abs=1e-5)
    assert SCORES["functionality_maximised"](group).tolist() == pytest.approx([0.5] * 5, abs=1e-5)
    assert SCORES["functionality"](group).tolist() == pytest.approx([0.5] * 5, abs=1e-4)
    for name in ("effective", "feature_rank"):  # any of the five is a combination of the rest
        assert SCORES[name](group).tolist() == pytest.approx([1] * 5, abs=1e-4)

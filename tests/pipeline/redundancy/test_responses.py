"""Redundancy by responses, on filters whose functions and ranks are known."""

import math

import pytest
import torch

from pipeline.errors import PipelineError
from pipeline.redundancy import MEASURES
from pipeline.redundancy.responses import functionality
from tests.pipeline.maps import draw, seen, view


def test_filters_that_respond_alike_share_a_function() -> None:
    # Three independent functions; filters 3 and 4 repeat 0 and 1 with another size and offset.
    values = torch.linalg.qr(torch.randn(60, 4, generator=draw()))[0]
    values = values - values.mean(dim=0)
    values = torch.cat([values[:, :3], 5 * values[:, :1] + 2, 0.1 * values[:, 1:2]], dim=1)

    floor = functionality(view(seen=(seen(values),)))

    assert floor.floor == 3 and floor.score == pytest.approx(5 / 3)
    assert "3 functions of 5" in floor.detail


def test_opposite_filters_have_two_functions_and_constant_ones_none() -> None:
    wave = torch.randn(50, 1, generator=draw())
    values = torch.cat([wave, -wave, torch.full((50, 1), 7.0), torch.zeros(50, 1)], dim=1)

    floor = functionality(view(seen=(seen(values),)))

    assert floor.floor == 2 and "2 never change" in floor.detail


def test_a_chain_of_neighbours_is_not_one_function() -> None:
    # Correlations of neighbours cos(20 degrees) = 0.94, of the ends cos(40 degrees) = 0.77.
    base = torch.linalg.qr(torch.randn(80, 3, generator=draw()) - 0.0)[0]
    base = torch.linalg.qr(base - base.mean(dim=0))[0][:, :2]
    angles = [math.radians(degrees) for degrees in (0, 20, 40)]
    values = torch.stack([base @ torch.tensor([math.cos(a), math.sin(a)]) for a in angles], dim=1)

    assert functionality(view(seen=(seen(values),))).floor == 2


def test_functions_that_one_of_two_readers_tells_apart_survive() -> None:
    wave, other = torch.randn(2, 400, 1, generator=draw())
    alike, apart = torch.cat([wave, wave], dim=1), torch.cat([wave, other], dim=1)

    assert functionality(view(seen=(seen(alike), seen(apart)))).floor == 2
    assert functionality(view(seen=(seen(alike), seen(alike)))).floor == 1


def test_the_feature_rank_is_that_of_the_widest_reader() -> None:
    base = torch.randn(100, 4, generator=draw())
    mixed = base[:, :2] @ torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, -1.0]])

    assert MEASURES["feature_rank"](view(seen=(seen(mixed),))).floor == 2
    assert MEASURES["feature_rank"](view(seen=(seen(mixed), seen(base)))).floor == 4
    with pytest.raises(
        PipelineError, match=r"saw 3 responses of group conv1, too few .* 4 filters"
    ):
        MEASURES["feature_rank"](view(seen=(seen(base[:3]),)))

import math
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware.latency.predict import predict_plan_ms
from pipeline.errors import PlanError
from pipeline.networks.analyse import Subject
from pipeline.planning.fit import AIM, CLOSED, Aims, Wishes, allocate_settled
from pipeline.recipe import PlanSection
from tests.hardware import templates
from tests.hardware.latency.test_predict import learnt


def test_a_plan_that_took_too_long_lowers_the_aim_by_as_much():
    aims = Aims().after(1.25)

    assert aims.aim == pytest.approx(AIM * AIM / 1.25)
    assert (aims.low, aims.high) == (0.0, AIM)


def test_a_plan_that_left_time_unused_raises_the_aim():
    aims = Aims().after(0.8)

    assert aims.aim == pytest.approx(AIM * AIM / 0.8)
    assert (aims.low, aims.high) == (AIM, math.inf)


def test_between_a_plan_that_met_the_target_and_one_that_did_not_the_aim_is_halved():
    aims = Aims(aim=1.0, low=0.9, high=1.1).after(0.5)  # a proposal of 1.97 lies outside

    assert aims.aim == pytest.approx(1.05)


@given(error=st.floats(0.7, 1.4), step=st.floats(0.001, 0.05))
def test_the_bracket_closes_on_what_may_be_spent(error, step):
    """The network takes `error` times what the table says, and its widths allow only steps."""
    aims, used = Aims(), math.inf
    for _ in range(40):
        spent = math.floor(aims.aim / step) * step
        used = spent * error
        if 0.97 <= used <= 1 or aims.is_closed:
            break
        aims = aims.after(used)

    assert 0.97 <= used <= 1 or aims.high - aims.low <= CLOSED


def test_a_plan_is_made_at_the_costs_that_it_leads_to() -> None:
    table, layers, candidates = learnt(templates.residual)
    _, channels = templates.residual()
    subject = cast(Subject, SimpleNamespace(channels=channels, layers=layers))
    values = {name: {w: float(w) for w in widths} for name, widths in candidates.items()}
    wishes = Wishes(floors=(), saliency={}, candidates=candidates, values=values)
    least = {name: min(widths) for name, widths in candidates.items()}
    target_ms = 1.01 * predict_plan_ms(table, layers, least)

    found = allocate_settled(subject, wishes, table, target_ms, None, PlanSection())

    assert predict_plan_ms(table, layers, found.widths) <= target_ms

    wide_ms = 0.9 * predict_plan_ms(table, layers, {n: max(w) for n, w in candidates.items()})
    found = allocate_settled(subject, wishes, table, wide_ms, None, PlanSection())
    assert 0.85 * wide_ms <= predict_plan_ms(table, layers, found.widths) <= wide_ms

    with pytest.raises(PlanError):
        allocate_settled(subject, wishes, table, 0.5 * target_ms, None, PlanSection())

"""The loop of planning and measuring, on a device whose every time is arithmetic."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.errors import MissingLatencyError
from hardware.intervals import Interval
from hardware.latency import predict as predicting
from hardware.latency.predict import LayerCost
from hardware.latency.table import LatencyTable
from pipeline.errors import PlanError
from pipeline.networks.analyse import Subject
from pipeline.planning import turns as planning
from pipeline.planning.turns import AIM, Request, Trial, plan_widths, what_to_spend
from pipeline.recipe import PlanSection
from pipeline.records import FittedPlan, Plan, PlanningInputs
from pipeline.rig import Rig
from pipeline.run import plan_and_measure
from tests.hardware import templates
from tests.hardware.latency.test_table import KEY
from tests.pipeline.planning.test_solve import channels_of

FULL = {"a": 64, "b": 64}
WORTH = {"a": 2.0, "b": 1.0}
STEP_US = 10.0  # what a channel takes


@dataclass
class Device:
    """A device and its table in one: what networks take, and what the table says that they do."""

    error: float = 1.0  # what narrowed networks take, over what the table says
    learns: float = 0.0  # how much of that the table learns about all networks from measuring one
    knows: bool = False  # whether it predicts a measured network as it was measured
    context: float = 0.0  # how much less a channel takes in a network without any other channels
    noise: float = 0.0  # half the width of a measurement's interval
    factor: float = 1.0  # what the table has learnt
    known: dict[tuple[int, ...], float] = field(default_factory=dict)
    measured: list[dict[str, int]] = field(default_factory=list)

    def full_ms(self, digest: str) -> float:
        return self.said_ms(FULL)

    def said_ms(self, widths: Mapping[str, int]) -> float:
        """Return what the table says before it has learnt anything."""
        share = sum(widths.values()) / sum(FULL.values())
        return sum(widths.values()) * STEP_US * (1 - self.context * (1 - share)) / 1000

    def costs(self, table, layers, candidates, around=None) -> tuple[LayerCost, ...]:
        around = {**FULL, **(around or {})}
        each_us = 1000 * self.factor * self.said_ms(around) / sum(around.values())
        return tuple(
            LayerCost(
                layer=name,
                groups=(name,),
                cost_us=each_us * np.array(widths, dtype=float),
                measured=np.ones(len(widths), dtype=bool),
            )
            for name, widths in candidates.items()
        )

    def predicted_ms(self, table, layers, widths) -> float:
        return self.known.get(tuple(widths.values()), self.factor * self.said_ms(widths))

    def measure(self, subject, widths) -> tuple["Device", Interval]:
        assert widths not in self.measured, "nothing is measured twice"
        self.measured.append(dict(widths))
        ms = self.error * self.said_ms(widths)
        if self.knows:
            self.known[tuple(widths.values())] = ms
        self.factor *= (ms / (self.factor * self.said_ms(widths))) ** self.learns
        return self, self.confirm(subject, widths)

    def confirm(self, subject, widths) -> Interval:
        share = self.error * self.said_ms(widths) / self.full_ms("")
        return Interval(share, share - self.noise, share + self.noise)


def request_of(share: float, step: int = 1, least: int = 1, **section: object) -> Request:
    candidates = {name: (*range(least, width, step), width) for name, width in FULL.items()}
    return Request(
        subject=cast(Subject, SimpleNamespace(layers=(), template=templates.residual()[0])),
        inputs=PlanningInputs(
            channels=channels_of(candidates),
            candidates=candidates,
            values={
                "a": {w: 2.0 * w for w in candidates["a"]},
                "b": {w: w for w in candidates["b"]},
            },
            saliency={name: np.arange(64.0) for name in FULL},
        ),
        section=PlanSection(objective="saliency", **section),
        share=share,
    )


@contextmanager
def predicting_by(device: Device) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predicting, "costs", device.costs)
        patch.setattr(predicting, "predict_plan_ms", device.predicted_ms)
        patch.setattr("pipeline.run.predict_plan_ms", device.predicted_ms)
        yield


def looped(request: Request, device: Device) -> FittedPlan:
    with predicting_by(device):
        table, rig = cast(LatencyTable, device), cast(Rig, device)
        return plan_and_measure(request, table, rig, lambda done, total, text: None)


HALF = {"a": 32, "b": 32}


def trial(device: Device, share: float) -> Trial:
    """Return half of the network as if it had taken such a share of the latency."""
    plan = Plan(
        target_ms=1, predicted_ms=1, baseline_ms=1, gap=0, objective="", value=0, solver_s=0,
        measured=True, choices=(), keep={},
    )  # fmt: skip
    return Trial(
        plan=plan,
        widths=HALF,
        predicted_ms=device.said_ms(HALF),
        measured_ms=share * device.full_ms(""),
        share=Interval(share, share, share),
    )


@pytest.mark.parametrize(
    ("took", "knows", "expected"),
    [
        ([1.25], False, 1 / 1.25),  # the table is as wrong as before
        ([1.25], True, 1.25**-0.5),  # it knows that plan now; the next one is picked like it
        ([1.5, 1.25], True, 1 / 1.25),  # it was so twice
        ([0.8], False, 1 / 0.8),
        ([0.8], True, 1.0),
        ([1.25, 0.8], True, 1.0),
    ],
)
def test_what_is_spent_next_follows_how_wrong_the_table_is(took, knows, expected) -> None:
    device, request = Device(), request_of(0.5)
    if knows:
        device.known[32, 32] = took[-1] * device.said_ms(HALF)
    trials = [trial(device, 0.5 * factor) for factor in took]

    with predicting_by(device):
        found = what_to_spend(request, device, trials)

    assert found == pytest.approx(AIM * 0.5 * device.full_ms("") * expected)


@settings(max_examples=30, deadline=None)
@given(
    error=st.floats(0.8, 1.25),
    learns=st.sampled_from([0.0, 0.5, 1.0]),
    knows=st.booleans(),
    share=st.floats(0.3, 0.75),
    step=st.sampled_from([2, 4, 8]),
)
def test_the_loop_ends_within_four_turns_even_with_a_table_a_quarter_off(
    error, learns, knows, share, step
) -> None:
    device = Device(error=error, learns=learns, knows=knows)

    fitted = looped(request_of(share, step, least=step), device)

    assert len(fitted.loop) <= 4
    assert device.confirm(None, fitted.plan.widths).estimate <= share


def test_a_plan_that_uses_the_target_ends_the_loop() -> None:
    assert len(looped(request_of(0.5), Device()).loop) == 1


def test_more_is_not_sought_where_measuring_cannot_tell_it_from_enough() -> None:
    # The first plan uses 0.985 * 0.95 of the target, 0.936: less than what counts as enough.
    assert len(looped(request_of(0.5), Device(error=0.95, noise=0.005)).loop) == 2
    assert len(looped(request_of(0.5), Device(error=0.95, noise=0.02)).loop) == 1


def test_a_plan_that_is_proposed_again_is_not_measured_again() -> None:
    coarse = request_of(0.6, step=32, least=32)  # a half, three quarters, or all of it

    fitted = looped(coarse, Device())

    assert len(fitted.loop) == 1 and fitted.loop[0].measured_ms < 0.9 * fitted.loop[0].target_ms


def test_where_nothing_meets_the_target_the_fastest_plan_is_named() -> None:
    only = request_of(0.52, step=32, least=32)

    with pytest.raises(PlanError, match=r"None of 1 measured plans took 0\.6656 ms or less; the"):
        looped(only, Device(error=1.1))


def test_a_target_that_only_the_least_widths_meet_is_left_to_the_measurement() -> None:
    only = request_of(0.505, step=32, least=32)  # half of it is predicted: 0.99 of the target

    assert looped(only, Device()).plan.widths == HALF
    with pytest.raises(PlanError, match=r"target of 0\.6336 ms.*least .* is 0\.6400 ms"):
        looped(request_of(0.495, step=32, least=32), Device())


def test_a_plan_is_made_at_the_costs_that_it_leads_to() -> None:
    device = Device(context=0.5)  # a quarter of the channels takes 0.156 of the time, not 0.25
    request = request_of(0.2)
    limits_ms = (AIM * request.target_ms(device), request.target_ms(device))

    with predicting_by(device):
        found = plan_widths(request, device, limits_ms, None)

    assert 0.9 * limits_ms[0] <= device.said_ms(found.widths) <= limits_ms[0]


def test_what_is_possible_only_in_a_narrow_network_is_found() -> None:
    device = Device(context=0.5)
    request = request_of(0.2, least=16)  # 0.25 at the costs of the full network, 0.156 at its own
    limits_ms = (AIM * request.target_ms(device), request.target_ms(device))

    with predicting_by(device):
        found = plan_widths(request, device, limits_ms, None)

    assert device.said_ms(found.widths) <= limits_ms[0]


def test_a_table_without_the_network_says_so() -> None:
    request = request_of(0.5)

    with pytest.raises(MissingLatencyError, match=r"no measurement of this network. Measure it:"):
        planning.next_widths(request, LatencyTable(key=KEY), ())

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

from hardware.graph.channel_map import ChannelMap, Group
from hardware.latency.predict import LayerCost
from hardware.records import load_record, save_record
from pipeline.errors import PlanError
from pipeline.evidence.sensitivity import most_salient
from pipeline.planning.plans import join_rounds, make_plan, original_names
from pipeline.planning.solve import Allocation, allocate
from pipeline.planning.widths import candidate_widths, values_from_saliency
from pipeline.records import Choice, FittedPlan, Floor, Plan, PlanningInputs, Turn
from tests.pipeline import maps
from tests.pipeline.planning.test_solve import cost as cost_of
from tests.pipeline.planning.test_widths import channels_of, floor, group


def cost(groups: tuple[str, ...], cost_us: object, measured: object = None) -> LayerCost:
    found = cost_of(groups, cost_us)
    return found if measured is None else replace(found, measured=np.asarray(measured))


def test_the_most_salient_units_stay_and_the_first_among_equals() -> None:
    assert most_salient(torch.tensor([1.0, 5.0, 1.0, 9.0]), 3) == (0, 1, 3)
    assert most_salient(np.array([1.0, 2.0]), 0) == ()


def plan_of(measured: object = None) -> Plan:
    """Return a plan in which every group has its width for another reason."""
    names = ("emptied", "floor", "stair", "worth", "kept", "least")
    groups = [group(name, 16) for name in names]
    channels = channels_of(
        *groups, group("logits", 10, frozen="network output"), branches=("emptied",)
    )
    floors = [floor("floor", 16, 7), floor("worth", 16, 1)]
    candidates = candidate_widths(channels, floors, step=8)
    full = np.array([50.0, 100.0])  # at 8 and at 16 units
    costs = [
        cost((), 400),
        cost(("emptied",), [0, *full]),
        cost(("floor",), full),
        cost(("stair",), [99.9, 100.0]),
        cost(("worth",), full, measured),
        cost(("kept",), [99.9, 100.0]),
        cost(("least",), full),
    ]
    worth = {"emptied": 1, "floor": 1, "stair": 9, "worth": 90, "kept": 9, "least": 1}
    values = {
        name: {width: width / 16 * worth[name] for width in candidates[name]} for name in names
    }
    widths = {"emptied": 0, "floor": 8, "stair": 16, "worth": 16, "kept": 16, "least": 8}
    inputs = PlanningInputs(
        channels=channels,
        candidates=candidates,
        values=values,
        floors=tuple(floors),
        saliency={name: torch.arange(16.0) for name in names},
    )
    return make_plan(
        inputs,
        costs,
        Allocation(widths=widths, value=1.0, bound=1.1, gap=0.1, cost_us=799.9, seconds=0.5),
        target_ms=0.81,
        baseline_ms=1.0,
        objective="saliency",
    )


def test_every_width_has_its_reason() -> None:
    reasons = {choice.group: choice.reason for choice in plan_of().choices}

    assert reasons == {
        "emptied": "emptied",
        "floor": "redundancy floor",
        "stair": "no measured gain below",
        "worth": "full: worth its time",
        "kept": "no measured gain below",
        "least": "least candidate",
        "logits": "frozen: network output",
    }


def test_the_detail_says_what_the_neighbouring_widths_would_do() -> None:
    details = {choice.group: choice.detail for choice in plan_of().choices}

    # 50 us of the full network's 1000; half of 90 and of 1.
    assert details["worth"] == "at 8: -50.0 us (-5.0% of the network), -45 saliency"
    assert details["floor"] == "at 16: +50.0 us (+5.0% of the network), +0.5 saliency"


def test_a_plan_keeps_the_most_salient_units_and_survives_the_disk(tmp_path) -> None:
    plan = plan_of()

    assert plan.keep["floor"] == tuple(range(8, 16)) and plan.keep["emptied"] == ()
    assert "logits" not in plan.keep and plan.widths["logits"] == 10
    assert plan.predicted_ms == pytest.approx(0.8) and plan.measured
    save_record(plan, tmp_path / "plan.json")
    assert load_record(Plan, tmp_path / "plan.json") == plan


def test_a_plan_on_an_estimated_latency_says_so() -> None:
    assert plan_of(measured=[False, True]).measured  # the estimate is at a width not chosen
    assert not plan_of(measured=[True, False]).measured


def test_floors_hold_in_the_plan_that_is_chosen() -> None:
    channels = channels_of(group("a", 16), group("b", 16))
    floors = [floor("a", 16, 9)]
    candidates = candidate_widths(channels, floors)
    values = values_from_saliency({name: np.ones(16) for name in "ab"}, candidates)
    # Group a is the dearer one, but only down to its floor.
    costs = [cost(("a",), [120, 160]), cost(("b",), [4, 8, 12, 16])]

    inputs = PlanningInputs(channels=channels, candidates=candidates, values=values)
    found = allocate(inputs, costs, target_us=130)

    assert found.widths == {"a": 12, "b": 8}


def block() -> ChannelMap:
    """A stem, and a block whose second convolution is the first to make the wide stream."""
    return ChannelMap(
        groups=(
            maps.group(8, ["stem"], name="stem"),
            maps.group(8, ["conv1"], name="conv1"),
            maps.group(16, ["conv2", "shortcut"], name="conv2"),
            maps.group(4, ["head"], name="head", frozen="output"),
        )
    )


def pruned_block() -> ChannelMap:
    """The same without the block's branch, three of eight channels of the stem, half the stream."""
    return ChannelMap(
        groups=(
            maps.group(3, ["stem"], name="stem"),
            maps.group(8, ["shortcut"], name="shortcut"),
            maps.group(4, ["head"], name="head", frozen="output"),
        )
    )


FIRST_KEEP = {"stem": (1, 4, 6), "conv1": (), "conv2": tuple(range(0, 16, 2))}


def fitted(
    channels: ChannelMap, keep: Mapping[str, tuple[int, ...]], times_ms: tuple[float, ...]
) -> FittedPlan:
    """Return a plan for (target, predicted, baseline) with a floor for every prunable group."""
    target_ms, predicted_ms, baseline_ms = times_ms
    plan = Plan(
        target_ms=target_ms,
        predicted_ms=predicted_ms,
        baseline_ms=baseline_ms,
        gap=0.0,
        objective="saliency",
        value=1.0,
        solver_s=2.0,
        measured=True,
        choices=tuple(
            Choice(
                group=one.name,
                full=one.width,
                floor=2,
                width=len(keep.get(one.name, range(one.width))),
                reason=f"because of {one.name}",
                detail="the detail",
            )
            for one in channels.groups
        ),
        keep=keep,
    )
    return FittedPlan(
        plan=plan,
        floors=tuple(
            Floor(group=one.name, width=one.width, floor=2, score=1.0, detail="alike")
            for one in channels.prunable
        ),
        loop=(Turn(predicted_ms=predicted_ms, measured_ms=1.0, target_ms=target_ms, value=1.0),),
    )


def test_a_group_is_recognised_although_the_layer_that_named_it_is_gone() -> None:
    names = original_names(block(), FIRST_KEEP, pruned_block())

    assert names == {"stem": "stem", "shortcut": "conv2", "head": "head"}


def test_two_groups_of_one_parameter_are_told_apart_by_where_their_channels_lie() -> None:
    def halves(one: int, other: int) -> ChannelMap:
        """One convolution whose output is split; its halves are two groups."""
        units = ((*range(one), *[-1] * other), (*[-1] * one, *range(other)))
        return ChannelMap(
            groups=tuple(
                Group(name=name, width=width, slices=(maps.cut("conv.weight", "filter", part),))
                for name, width, part in zip(("conv", "conv#2"), (one, other), units, strict=True)
            )
        )

    alone = ChannelMap(groups=(maps.group(2, ["conv"], name="conv"),))

    assert original_names(halves(3, 4), {"conv": (0, 1)}, halves(2, 4)) == {
        "conv": "conv",
        "conv#2": "conv#2",
    }
    # The first half is gone, so that the second one is now called after the convolution.
    assert original_names(halves(3, 4), {"conv": (), "conv#2": (1, 2)}, alone) == {"conv": "conv#2"}


def test_two_rounds_are_one_plan_for_the_original_network() -> None:
    first = fitted(block(), FIRST_KEEP, (0.8, 0.75, 1.0))
    second = fitted(pruned_block(), {"stem": (0, 1, 2), "shortcut": (3, 5)}, (0.64, 0.6, 0.8))

    whole = join_rounds(first, block(), second, pruned_block(), 2)

    plan = whole.plan
    assert plan.keep == {"stem": (1, 4, 6), "conv1": (), "conv2": (6, 10)}
    assert {c.group: (c.full, c.width) for c in plan.choices} == {
        "stem": (8, 3),
        "conv1": (8, 0),
        "conv2": (16, 2),
        "head": (4, 4),
    }
    reasons = {choice.group: (choice.reason, choice.detail) for choice in plan.choices}
    assert reasons["stem"] == ("because of stem", "the detail")  # the first round decided it
    assert reasons["conv1"] == ("because of conv1", "the detail")
    assert reasons["conv2"] == ("because of shortcut", "in round 2, of 8: the detail")
    assert {f.group: (f.width, f.detail) for f in whole.floors}["conv2"] == (
        16,
        "in round 2, of 8: alike",
    )
    # 0.75 of the original, and 0.6 / 0.8 of that; allowed were 0.8 and 0.64 / 0.8.
    assert plan.baseline_ms == 1.0 and plan.predicted_ms == pytest.approx(0.5625)
    assert plan.target_ms == pytest.approx(0.64)
    assert plan.solver_s == 4.0 and whole.loop == (*first.loop, *second.loop)


def test_channels_that_were_in_no_group_before_are_not_narrowed_in_silence() -> None:
    first = fitted(block(), FIRST_KEEP, (0.8, 0.75, 1.0))
    more = ChannelMap(groups=(*pruned_block().groups, maps.group(4, ["late"], name="late")))
    second = fitted(more, {"late": (0, 1)}, (0.64, 0.6, 0.8))

    with pytest.raises(PlanError, match=r"Round 2 narrows late, which belongs to no pruning group"):
        join_rounds(first, block(), second, more, 2)

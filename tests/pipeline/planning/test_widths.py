import numpy as np
import pytest
import torch

from hardware.graph.channel_map import Branch, ChannelMap, Group
from hardware.latency.predict import LayerCost
from hardware.records import load_record, save_record
from pipeline.errors import PlanError
from pipeline.evidence.sensitivity import most_salient
from pipeline.planning.widths import (
    Allocation,
    allocate,
    candidate_widths,
    default_step,
    make_plan,
    values_from_damage,
    values_from_saliency,
)
from pipeline.records import Floor, Plan


def channels_of(*groups: Group, branches: tuple[str, ...] = ()) -> ChannelMap:
    return ChannelMap(
        groups=groups,
        branches=tuple(
            Branch(name=name, groups=(name,), layers=(), join="add", parameters=())
            for name in branches
        ),
    )


def group(name: str, width: int, frozen: str | None = None) -> Group:
    return Group(name=name, width=width, slices=(), frozen=frozen)


def floor(name: str, width: int, least: int) -> Floor:
    return Floor(group=name, width=width, floor=least, score=1.0)


def cost(groups: tuple[str, ...], cost_us: object, measured: object = None) -> LayerCost:
    table = np.asarray(cost_us, dtype=np.float64)
    known = np.ones(table.shape, dtype=bool) if measured is None else np.asarray(measured)
    return LayerCost(layer="conv", groups=groups, cost_us=table, measured=known)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 7, 8, 12, 16, 24, 30, 32, 64, 128, 512, 2048])
def test_a_group_has_about_eight_candidates_at_most(width: int) -> None:
    widths = candidate_widths(channels_of(group("a", width)), ())["a"]

    assert 1 <= len(widths) <= 9
    assert widths[-1] == width and list(widths) == sorted(set(widths)) and widths[0] >= 1
    assert all(narrower % default_step(width) == 0 for narrower in widths[:-1])


def test_floors_are_rounded_up_to_a_step_and_nothing_lies_below() -> None:
    channels = channels_of(group("a", 16), group("b", 30), group("c", 16))

    widths = candidate_widths(channels, [floor("a", 16, 9), floor("b", 30, 29)])

    assert widths == {"a": (12, 16), "b": (30,), "c": (4, 8, 12, 16)}


def test_a_branch_may_be_emptied_whatever_its_floor() -> None:
    channels = channels_of(group("a", 16), group("b", 16), branches=("a",))

    assert candidate_widths(channels, [floor("a", 16, 16)]) == {"a": (0, 16), "b": (4, 8, 12, 16)}
    assert candidate_widths(channels, [floor("a", 16, 16)], empty_branches=False)["a"] == (16,)


def test_frozen_groups_have_no_candidates_and_keep_their_branch() -> None:
    branch = Branch(name="x", groups=("a", "b"), layers=(), join="add", parameters=())
    groups = (group("a", 8, frozen="softmax"), group("b", 8))

    widths = candidate_widths(ChannelMap(groups=groups, branches=(branch,)), ())

    assert widths == {"b": (4, 8)}


def test_the_step_can_be_chosen() -> None:
    assert candidate_widths(channels_of(group("a", 16)), (), step=6) == {"a": (6, 12, 16)}


def test_a_floor_of_another_network_is_refused() -> None:
    with pytest.raises(PlanError, match="floor of a is for 32 filters, the network has 16"):
        candidate_widths(channels_of(group("a", 16)), [floor("a", 32, 4)])
    with pytest.raises(PlanError, match="floor of b is for 16 filters, the network has no such"):
        candidate_widths(channels_of(group("a", 16)), [floor("b", 16, 4)])


def test_a_width_is_worth_the_share_of_saliency_that_it_keeps() -> None:
    saliency = {"a": torch.tensor([1.0, 4.0, 3.0, 2.0])}

    values = values_from_saliency(saliency, {"a": (0, 1, 2, 4)})["a"]

    assert values == pytest.approx({0: 0, 1: 0.4, 2: 0.7, 4: 1.0}, abs=1e-5)
    assert values_from_saliency(saliency, {"a": (4,)}, weights={"a": 3})["a"][4] == 3


def test_a_wider_width_is_worth_more_even_where_saliency_is_0() -> None:
    values = values_from_saliency({"a": np.zeros(4)}, {"a": (1, 2, 4)})["a"]

    assert values[1] < values[2] < values[4] < 1e-4


def test_saliency_that_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(PlanError, match=r"Saliency must be >= 0 .* group a the least is -1"):
        values_from_saliency({"a": np.array([-1.0, 2])}, {"a": (1, 2)})
    with pytest.raises(PlanError, match="Saliency of group a is not a number for 1 of 2 units"):
        values_from_saliency({"a": np.array([np.nan, 2])}, {"a": (1, 2)})


def test_values_are_minus_the_damage_and_rise_with_the_width() -> None:
    # Width 8 looks better than 12, and 12 better than 16: noise. Both lie a trace below.
    damage = {"a": {4: 0.5, 8: 0.1, 12: 0.2, 16: -0.05, 20: 0.0}}

    values = values_from_damage(damage, {"a": (4, 8, 12, 16, 20)})["a"]

    assert values == pytest.approx({4: -0.5, 8: -0.2, 12: -0.2, 16: 0, 20: 0}, abs=1e-5)
    assert list(values) == [4, 8, 12, 16, 20]
    assert all(narrow < wide for narrow, wide in zip(values.values(), list(values.values())[1:]))  # noqa: B905


def test_a_branch_may_do_less_harm_emptied_than_narrowed() -> None:
    damage = {"a": {0: 0.1, 4: 0.5, 8: 0.0}, "b": {0: -0.3, 4: 0.1, 8: 0.0}}

    values = values_from_damage(damage, {"a": (0, 4, 8), "b": (0, 4, 8)})

    assert values["a"][0] == pytest.approx(-0.1) and values["a"][4] == pytest.approx(-0.5)
    assert values["b"][0] < values["b"][8]


@pytest.mark.parametrize("line", [{8: 0.0}, {4: float("nan"), 8: 0.0}, {4: float("inf"), 8: 0.0}])
def test_damage_that_is_missing_or_not_a_number_is_refused(line: dict[int, float]) -> None:
    with pytest.raises(PlanError, match=r"damage of group a at widths \[4\]"):
        values_from_damage({"a": line}, {"a": (4, 8)})


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
    return make_plan(
        channels,
        floors,
        {name: torch.arange(16.0) for name in names},
        candidates,
        values,
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

    found = allocate(channels, candidates, values, costs, target_us=130)

    assert found.widths == {"a": 12, "b": 8}

import numpy as np
import pytest
import torch

from hardware.graph.channel_map import Branch, ChannelMap, Group
from pipeline.errors import PlanError
from pipeline.planning.widths import (
    candidate_widths,
    default_step,
    swept_widths,
    values_from_damage,
    values_from_saliency,
)
from pipeline.recipe import PlanSection
from pipeline.records import Floor


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


def test_what_is_measured_does_not_depend_on_floors() -> None:
    channels = channels_of(group("a", 16), group("b", 30), branches=("b",))
    floors = [floor("a", 16, 9), floor("b", 30, 13)]

    swept = swept_widths(channels, PlanSection(step=4))

    assert swept == {"a": (4, 8, 12, 16), "b": (0, 4, 8, 12, 16, 20, 24, 28, 30)}
    for name, widths in candidate_widths(channels, floors, step=4).items():
        assert set(widths) < set(swept[name])

from collections.abc import Mapping
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.graph.channel_map import Branch, ChannelMap, Group
from hardware.latency.predict import LayerCost
from pipeline.errors import PlanError
from pipeline.planning.program import CostModel, model_costs
from pipeline.planning.solve import allocate, give_back
from pipeline.records import Floor, PlanningInputs


def channels_of(
    candidates: Mapping[str, tuple[int, ...]], *branches: tuple[str, ...]
) -> ChannelMap:
    return ChannelMap(
        groups=tuple(Group(name=g, width=w[-1], slices=()) for g, w in candidates.items()),
        branches=tuple(
            Branch(name="+".join(groups), groups=groups, layers=(), join="add", parameters=())
            for groups in branches
        ),
    )


def inputs_of(
    channels: ChannelMap, candidates: Mapping, values: Mapping, floors: tuple[Floor, ...] = ()
) -> PlanningInputs:
    return PlanningInputs(channels=channels, candidates=candidates, values=values, floors=floors)


def cost(groups: tuple[str, ...], cost_us: object) -> LayerCost:
    table = np.asarray(cost_us, dtype=np.float64)
    return LayerCost(
        layer="conv", groups=groups, cost_us=table, measured=np.ones(table.shape, dtype=bool)
    )


def empties_fit(channels: ChannelMap, widths: Mapping[str, int]) -> bool:
    """Whether the groups at width 0 are those of some set of branches, and no others."""
    empty = {group for group, width in widths.items() if width == 0}
    emptied = [set(b.groups) for b in channels.branches if empty.issuperset(b.groups)]
    return empty == set().union(*emptied)


def brute_force(
    channels: ChannelMap,
    model: CostModel,
    values: Mapping[str, Mapping[int, float]],
    target_us: float,
) -> float | None:
    """Return the best value of all combinations, None where none meets the target."""
    best = None
    for choice in product(*(range(len(widths)) for widths in model.candidates.values())):
        index = dict(zip(model.candidates, choice, strict=True))
        widths = {group: model.candidates[group][i] for group, i in index.items()}
        if empties_fit(channels, widths) and model.total_us(index) <= target_us:
            value = sum(values[group][width] for group, width in widths.items())
            best = value if best is None else max(best, value)
    return best


@st.composite
def problems(draw: st.DrawFn) -> tuple[ChannelMap, dict, dict, list[LayerCost], float]:
    """Up to four groups of up to four widths, chained layers, branches; whole numbers only."""
    names = ["a", "b", "c", "d"][: draw(st.integers(1, 4))]
    branches = draw(
        st.lists(
            st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True).map(tuple),
            max_size=2,
        )
    )
    emptiable = {name for branch in branches for name in branch}
    candidates = {}
    for name in names:
        widths = tuple(range(1, draw(st.integers(1, 3)) + 1))
        candidates[name] = (0, *widths) if name in emptiable else widths
    whole = st.integers(0, 20)
    values = {}
    for name, widths in candidates.items():
        worth = sorted(draw(st.lists(whole, min_size=len(widths), max_size=len(widths))))
        values[name] = dict(zip(widths, worth, strict=True))
    pairs = [(one, two) for one in names for two in names if one < two]
    layers = [(), *((name,) for name in names)]
    layers += draw(st.lists(st.sampled_from(pairs), max_size=4)) if pairs else []
    costs = []
    for groups in layers:
        shape = tuple(len(candidates[group]) for group in groups)
        size = int(np.prod(shape))
        numbers = draw(st.lists(whole, min_size=size, max_size=size))
        costs.append(cost(groups, np.array(numbers).reshape(shape)))
    target_us = draw(st.integers(0, 20 * len(costs)))
    return channels_of(candidates, *branches), candidates, values, costs, float(target_us)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_no_combination_of_widths_beats_the_allocation(problem) -> None:
    channels, candidates, values, costs, target_us = problem
    model = model_costs(candidates, costs)
    best = brute_force(channels, model, values, target_us)

    if best is None:
        with pytest.raises(PlanError, match="No widths meet the target"):
            allocate(inputs_of(channels, candidates, values), costs, target_us)
        return
    found = allocate(inputs_of(channels, candidates, values), costs, target_us)

    assert found.value == pytest.approx(best, abs=1e-6)
    assert found.gap == pytest.approx(0, abs=1e-6) and found.bound >= found.value
    assert found.cost_us <= target_us + 1e-6
    assert empties_fit(channels, found.widths)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_nothing_is_removed_that_buys_no_time(problem) -> None:
    channels, candidates, values, costs, target_us = problem
    model = model_costs(candidates, costs)
    if brute_force(channels, model, values, target_us) is None:
        return

    widths = allocate(inputs_of(channels, candidates, values), costs, target_us).widths

    choice = {group: candidates[group].index(width) for group, width in widths.items()}
    for group, kept in candidates.items():
        for wider in range(choice[group] + 1, len(kept)):
            if widths[group]:
                assert model.total_us({**choice, group: wider}) > model.total_us(choice)


def test_filters_that_are_free_are_given_back() -> None:
    candidates = {"a": (4, 8, 12, 16)}
    model = model_costs(candidates, [cost(("a",), [10, 20, 20, 30])])  # 8 and 12 on one stair
    values = {"a": {4: 0.0, 8: 1.0, 12: 1.0, 16: 2.0}}

    assert give_back(model, values, {"a": 1}, target_us=25) == {"a": 2}


def test_the_wider_of_two_equal_widths_is_chosen_where_values_are_flat() -> None:
    candidates = {"a": (4, 8), "b": (4, 8)}
    values = {group: {4: 1.0, 8: 1.0} for group in candidates}
    costs = [cost(("a",), [5, 5]), cost(("b",), [5, 10])]

    found = allocate(inputs_of(channels_of(candidates), candidates, values), costs, target_us=10)

    assert found.widths == {"a": 8, "b": 4}


def test_a_branch_is_emptied_as_a_whole() -> None:
    candidates = {"one": (0, 4), "two": (0, 4), "free": (4, 8)}
    values = {"one": {0: 0.0, 4: 5.0}, "two": {0: 0.0, 4: 1.0}, "free": {4: 0.0, 8: 10.0}}
    costs = [cost(("one", "two"), [[0, 0], [0, 10]]), cost(("free",), [5, 10])]

    found = allocate(
        inputs_of(channels_of(candidates, ("one", "two")), candidates, values), costs, 10
    )

    assert found.widths == {"one": 0, "two": 0, "free": 8}
    assert found.cost_us == 10 and found.value == 10


def test_width_0_is_out_of_reach_without_a_branch() -> None:
    candidates, values = {"a": (0, 4)}, {"a": {0: 0.0, 4: 1.0}}
    costs = [cost(("a",), [0, 9])]

    with pytest.raises(PlanError, match="No widths meet"):
        allocate(inputs_of(channels_of(candidates), candidates, values), costs, 5)


def test_an_inner_branch_may_be_emptied_without_the_outer_one() -> None:
    candidates = {"inner": (0, 4), "outer": (0, 4)}
    values = {group: {0: 0.0, 4: 1.0} for group in candidates}
    values["outer"][4] = 2.0
    costs = [cost(("inner",), [0, 6]), cost(("outer",), [0, 6])]
    inputs = inputs_of(channels_of(candidates, ("inner",), ("inner", "outer")), candidates, values)

    assert allocate(inputs, costs, 6).widths == {"inner": 0, "outer": 4}
    values["inner"][4] = 9.0  # worth more, but the outer branch is not emptied without it
    assert allocate(inputs, costs, 6).widths == {"inner": 0, "outer": 4}


def test_a_target_out_of_reach_says_what_can_be_met_and_which_floors_bind() -> None:
    candidates = {"conv1": (8, 16), "conv2": (4, 16)}
    values = {"conv1": {8: 0.0, 16: 1.0}, "conv2": {4: 0.0, 16: 1.0}}
    costs = [cost((), 100), cost(("conv1",), [600, 700]), cost(("conv2",), [300, 1200])]
    floors = (Floor(group="conv1", width=16, floor=7, score=2.0),)
    inputs = inputs_of(channels_of(candidates), candidates, values, floors)

    with pytest.raises(PlanError) as caught:
        allocate(inputs, costs, 900, spend_us=0.985 * 900)

    message = str(caught.value)
    assert "target of 0.9000 ms" in message
    assert "1.0000 ms, 50.0 % of the full network's 2.0000 ms" in message
    assert "conv1 (8 of 16 filters, floor 7, 60 % of that time)" in message
    assert "target.latency_ratio" in message and "plan.redundancy: none" in message


def test_layers_of_the_same_two_groups_add_up_whatever_their_order() -> None:
    candidates = {"a": (1, 2), "b": (1, 2, 3)}
    one = np.arange(6.0).reshape(2, 3)

    model = model_costs(candidates, [cost(("a", "b"), one), cost(("b", "a"), one.T)])

    np.testing.assert_array_equal(model.pair_us["a", "b"], 2 * one)


def test_a_layer_between_a_group_and_itself_costs_its_diagonal() -> None:
    model = model_costs({"a": (1, 2)}, [cost(("a", "a"), [[1, 2], [3, 4]])])

    assert [model.total_us({"a": index}) for index in (0, 1)] == [1, 4]


@pytest.mark.parametrize("bad", [[1.0, np.nan], [1.0]])
def test_costs_that_do_not_fit_are_refused(bad: list[float]) -> None:
    with pytest.raises(PlanError, match=r"needs finite costs of shape \(2,\)"):
        model_costs({"a": (1, 2)}, [cost(("a",), bad)])


def test_values_that_are_not_numbers_are_refused() -> None:
    candidates = {"a": (1, 2)}

    inputs = inputs_of(channels_of(candidates), candidates, {"a": {1: np.nan, 2: 1}})

    with pytest.raises(PlanError, match="values that are not numbers"):
        allocate(inputs, [cost(("a",), [1, 2])], 5)


def test_a_target_just_above_the_least_possible_is_planned_at_the_least_possible() -> None:
    candidates = {"a": (4, 8), "b": (4, 8)}
    values = {"a": {4: 0.0, 8: 1.0}, "b": {4: 0.0, 8: 1.0}}
    costs = [cost((), 500), cost(("a",), [400, 800]), cost(("b",), [99, 99])]
    inputs = inputs_of(channels_of(candidates), candidates, values)

    found = allocate(inputs, costs, target_us=1000, spend_us=985)

    assert found.cost_us == 999 and found.widths == {"a": 4, "b": 8}
    with pytest.raises(PlanError, match=r"target of 0\.9980 ms.* is 0\.9990 ms"):
        allocate(inputs, costs, target_us=998, spend_us=983)


def hard_problem() -> tuple[PlanningInputs, list[LayerCost]]:
    """Values nearly proportional to costs, and a chain of random pairs: hours to prove the best."""
    draws = np.random.default_rng(0)
    candidates = {f"g{i}": tuple(range(1, 13)) for i in range(60)}
    costs, values = [], {}
    for name, widths in candidates.items():
        steps = draws.integers(900, 1100, size=12).cumsum()
        costs.append(cost((name,), steps))
        values[name] = dict(zip(widths, (steps + draws.integers(0, 9, 12)).tolist(), strict=True))
    costs += [cost(pair, draws.integers(0, 1000, (12, 12))) for pair in pairwise(candidates)]
    return inputs_of(channels_of(candidates), candidates, values), costs


def test_the_gap_is_reported_when_time_runs_out() -> None:
    found = allocate(*hard_problem(), target_us=4e5, time_limit_s=4)

    assert found.cost_us <= 4e5 + 1e-6
    assert found.gap == pytest.approx((found.bound - found.value) / found.value) and found.gap > 0


def test_no_time_at_all_is_an_error_that_says_what_to_raise() -> None:
    with pytest.raises(PlanError, match=r"No plan was found within 0.001 s .* plan.time_limit_s"):
        allocate(*hard_problem(), target_us=4e5, time_limit_s=0.001)

"""The sampling loop on a simulated machine: its clock goes on by what is "computed"."""

import math

import numpy as np
import pytest

from hardware.errors import RunError
from hardware.gate.sample import LOADS, UNITS, Loaded, Schedule, sample_units
from hardware.gate.sequential_test import Limit, SequentialTest, Verdict
from hardware.gate.session import Feeder


class Machine:
    """Noise that wanders and has heavy tails; every load draws a lucky or unlucky layout."""

    def __init__(self, seed: int, layout: float = 0.02) -> None:
        self.generator = np.random.default_rng(seed)
        self.now_s, self.wander, self.layout = 0.0, 0.0, layout

    def clock(self) -> float:
        return self.now_s

    def engine(self, milliseconds: float, load_ms: float = 20.0):
        def load() -> Loaded:
            self.now_s += load_ms / 1e3
            luck = math.exp(self.generator.normal(0, self.layout))

            def timer(calls: int) -> float:
                self.wander = 0.99 * self.wander + self.generator.normal(0, 0.005)
                spike = self.generator.exponential() if self.generator.random() < 0.05 else 0.0
                took_ms = milliseconds * luck * math.exp(self.wander) + spike
                self.now_s += took_ms * calls / 1e3
                return took_ms

            return Loaded(load_ms, timer)

        return load


def verdict(seed: int, slower: float, budget_s: float = 10.0) -> Verdict:
    machine = Machine(seed)
    engines = [machine.engine(5.0), machine.engine(5.0 * (1 + slower))]
    feeder = Feeder(SequentialTest(Limit("p50", 0.02), 0.99))
    schedule = Schedule(budget_s=budget_s)
    for base, candidate in sample_units(engines, schedule, seed=seed, clock=machine.clock):
        feeder.add(candidate, base)
        found = feeder.test.comparison().verdict
        if found is not Verdict.INCONCLUSIVE:
            return found
    return Verdict.INCONCLUSIVE


def test_equal_engines_are_never_regressions_although_layouts_differ_by_more_than_the_limit():
    # Two layouts differ by 2.8 % (standard deviation), and stay for a whole unit.
    found = [verdict(seed, 0.0) for seed in range(30)]

    assert Verdict.REGRESSION not in found


def test_a_clear_slow_down_is_found_within_the_budget():
    found = [verdict(seed, 0.10) for seed in range(20)]

    assert found.count(Verdict.REGRESSION) >= 19


def test_engines_are_loaded_anew_for_every_unit_within_the_budget():
    machine = Machine(0)
    schedule = Schedule(budget_s=10)

    units = list(sample_units([machine.engine(5.0)] * 2, schedule, seed=0, clock=machine.clock))

    assert [unit[0].load for unit in units] == list(range(len(units)))
    assert LOADS < len(units) <= UNITS
    assert machine.now_s <= 10


def test_units_share_a_load_where_loading_is_slow():
    machine = Machine(0)
    slow = machine.engine(5.0, load_ms=500.0)

    units = list(sample_units([slow] * 2, Schedule(budget_s=10), seed=0, clock=machine.clock))

    # Two engines of 0.5 s: three units of a third of a second share a load, five loads in 10 s.
    assert [unit[0].load for unit in units[:6]] == [0, 0, 0, 1, 1, 1]
    assert len({unit[0].load for unit in units}) == 5
    assert machine.now_s <= 10.5


def test_turns_have_the_same_shape_for_all_engines():
    machine = Machine(1)
    engines = [machine.engine(0.02), machine.engine(2.0)]

    for unit in sample_units(engines, Schedule(budget_s=2), seed=1, clock=machine.clock):
        assert len(unit[0].samples_ms) == len(unit[1].samples_ms) > 0


def test_an_engine_is_timed_once_the_caches_hold_its_weights():
    machine = Machine(0)
    running = {"name": "", "calls": 0}

    def engine(name: str):
        def timer(calls: int) -> float:
            if running["name"] != name:
                running.update(name=name, calls=0)
            running["calls"] += calls
            machine.now_s += 1e-3
            return 1.5 if running["calls"] <= 4 else 1.0  # four slow ones after another engine

        return lambda: Loaded(1.0, timer)

    schedule = Schedule(budget_s=1)
    units = list(sample_units([engine("a"), engine("b")], schedule, seed=0, clock=machine.clock))

    assert {ms for unit in units for one in unit for ms in one.samples_ms} == {1.0}


def test_orders_are_drawn_by_lot():
    first: list[int] = []

    def engine(name: int):
        def load() -> Loaded:
            first.append(name)
            return Loaded(1.0, lambda calls: 5.0)

        return load

    ticks = iter(range(10_000))
    schedule = Schedule(budget_s=400)
    list(sample_units([engine(0), engine(1)], schedule, seed=3, clock=lambda: float(next(ticks))))

    leading = first[::2]
    assert 0.2 < sum(leading) / len(leading) < 0.8


def test_a_timer_that_returns_no_time_is_an_error():
    broken = [lambda: Loaded(1.0, lambda calls: math.nan)]

    with pytest.raises(RunError, match="must be positive and finite"):
        next(sample_units(broken, Schedule(budget_s=1)))


@pytest.mark.parametrize("budget_s", [0.0, -1.0, math.inf, math.nan])
def test_a_budget_that_is_none_is_refused(budget_s):
    with pytest.raises(ValueError, match="A budget is a positive time"):
        Schedule(budget_s=budget_s)

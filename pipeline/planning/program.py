"""Widths as a mixed-integer program: the costs that depend on them, variables and constraints."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp

from hardware.graph.channel_map import Branch
from hardware.latency.predict import Candidates, LayerCost
from pipeline.errors import PlanError
from pipeline.records import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Layer costs, summed over all layers that depend on the same groups."""

    candidates: dict[str, tuple[int, ...]]
    fixed_us: float
    single_us: dict[str, Array]  # (widths of the group,)
    pair_us: dict[tuple[str, str], Array]  # (widths of the first, widths of the second)

    def total_us(self, choice: Mapping[str, int]) -> float:
        """Return the cost of a network; `choice` holds an index into each group's candidates."""
        single = sum(float(cost[choice[group]]) for group, cost in self.single_us.items())
        pairs = sum(
            float(cost[choice[one], choice[two]]) for (one, two), cost in self.pair_us.items()
        )
        return self.fixed_us + single + pairs

    def full(self) -> dict[str, int]:
        """Return the choice of every group's widest candidate."""
        return {group: len(widths) - 1 for group, widths in self.candidates.items()}


def model_costs(candidates: Candidates, costs: Sequence[LayerCost]) -> CostModel:
    """Return the costs of all layers, added up where layers depend on the same groups.

    Raises:
        PlanError: a cost is not a number, has another shape than the candidates, or depends on a
            group without candidates.
    """
    model = CostModel(
        candidates={group: tuple(widths) for group, widths in candidates.items()},
        fixed_us=sum(float(cost.cost_us) for cost in costs if not cost.groups),
        single_us={},
        pair_us={},
    )
    for cost in costs:
        table: Array = np.asarray(cost.cost_us, dtype=np.float64)
        name = cost.layer
        if unknown := [group for group in cost.groups if group not in candidates]:
            raise PlanError(f"Layer {name} depends on {unknown}, which have no candidate widths.")
        expected = tuple(len(candidates[group]) for group in cost.groups)
        if table.shape != expected or not np.isfinite(table).all():
            raise PlanError(
                f"Layer {name} needs finite costs of shape {expected}, one per candidate width of "
                f"{list(cost.groups)}; it has {table.tolist()}. Measure the layer again."
            )
        if len(set(cost.groups)) == 1:
            line = table if table.ndim == 1 else np.diagonal(table)
            group = cost.groups[0]
            model.single_us[group] = model.single_us.get(group, np.zeros(len(line))) + line
        elif len(cost.groups) == 2:
            one, two = cost.groups
            if (two, one) in model.pair_us:
                one, two, table = two, one, table.T
            pair = model.pair_us.get((one, two), np.zeros(table.shape))
            model.pair_us[one, two] = pair + table
    return model


class Program:
    """The constraints as sparse rows, in the variables [x per group and width, e per branch, y]."""

    def __init__(self, model: CostModel, branches: Sequence[Branch]) -> None:
        self.model = model
        self.start: dict[str, int] = {}
        count = 0
        for group, widths in model.candidates.items():
            self.start[group] = count
            count += len(widths)
        self.choices = count
        self.branches = tuple(branches)
        self.integers = count + len(self.branches)
        self.pair_start: dict[tuple[str, str], int] = {}
        count = self.integers
        for pair, cost in model.pair_us.items():
            self.pair_start[pair] = count
            count += cost.size
        self.variables = count
        self.cost_us = self._cost_row()
        self.rows = [self._one_width_each(), *self._branch_rows(), *self._product_rows()]

    def solve(
        self, objective: Array, target_us: float | None, time_limit_s: float
    ) -> OptimizeResult:
        """Return scipy's result for the least objective, with or without the target."""
        rows = list(self.rows)
        if target_us is not None:
            budget = sparse.csr_array(self.cost_us[None, :])
            rows.append(LinearConstraint(budget, -np.inf, target_us - self.model.fixed_us))
        integrality = np.zeros(self.variables, dtype=np.int64)
        integrality[: self.integers] = 1
        return milp(
            objective,
            integrality=integrality,
            bounds=Bounds(0, 1),
            constraints=rows,
            options={"time_limit": time_limit_s, "mip_rel_gap": 0.0},
        )

    def choice(self, solution: Array) -> dict[str, int]:
        """Return the index of the width that each group takes."""
        return {
            group: int(solution[self.start[group] :][: len(widths)].argmax())
            for group, widths in self.model.candidates.items()
        }

    def spread(self, per_group: Mapping[str, Array]) -> Array:
        """Return a row over all variables that holds one number per group and width."""
        row = np.zeros(self.variables)
        for group, numbers in per_group.items():
            row[self.start[group] :][: len(numbers)] = numbers
        return row

    def _cost_row(self) -> Array:
        row = self.spread(self.model.single_us)
        for pair, cost in self.model.pair_us.items():
            row[self.pair_start[pair] :][: cost.size] = cost.ravel()
        return row

    def _one_width_each(self) -> LinearConstraint:
        sizes = [len(widths) for widths in self.model.candidates.values()]
        group_of = np.repeat(np.arange(len(sizes)), sizes)
        shape = (len(sizes), self.variables)
        ones = np.ones(self.choices)
        return LinearConstraint(
            sparse.csr_array((ones, (group_of, np.arange(self.choices))), shape=shape), 1, 1
        )

    def _branch_rows(self) -> list[LinearConstraint]:
        """An emptied branch empties its groups; a group is empty only in an emptied branch."""
        rows = []
        empty = {group: self.start[group] for group in self.start if self._can_be_empty(group)}
        above: dict[str, list[int]] = {group: [] for group in empty}
        for number, branch in enumerate(self.branches):
            for group in branch.groups:
                above[group].append(self.choices + number)
                rows.append({self.choices + number: 1.0, empty[group]: -1.0})
        for group, variable in empty.items():
            rows.append({variable: 1.0, **dict.fromkeys(above[group], -1.0)})
        return [LinearConstraint(self._sparse(rows), -np.inf, 0)] if rows else []

    def _can_be_empty(self, group: str) -> bool:
        return self.model.candidates[group][0] == 0

    def _product_rows(self) -> list[LinearConstraint]:
        rows = []
        for (one, two), first in self.pair_start.items():
            shape = self.model.pair_us[one, two].shape
            number = np.arange(first, first + shape[0] * shape[1]).reshape(shape)
            for index, line in enumerate(number):
                rows.append({**dict.fromkeys(line.tolist(), 1.0), self.start[one] + index: -1.0})
            for index, line in enumerate(number.T):
                rows.append({**dict.fromkeys(line.tolist(), 1.0), self.start[two] + index: -1.0})
        return [LinearConstraint(self._sparse(rows), 0, 0)] if rows else []

    def _sparse(self, rows: Sequence[Mapping[int, float]]) -> sparse.csr_array:
        row = np.repeat(np.arange(len(rows)), [len(entries) for entries in rows])
        column = np.fromiter((index for entries in rows for index in entries), dtype=np.int64)
        data = np.fromiter((x for entries in rows for x in entries.values()), dtype=np.float64)
        return sparse.csr_array((data, (row, column)), shape=(len(rows), self.variables))

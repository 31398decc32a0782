import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.criteria.comparing import chosen, compare_criteria, compare_floors
from benchmarks.criteria.costs import measure_costs
from benchmarks.criteria.records import Comparison, Cost, Result
from benchmarks.criteria.tables import cost_report, p_value, report, summaries, verdict
from hardware.records import load_record
from pipeline.recipe import ModelSection, Recipe
from pipeline.records import GroupView
from pipeline.run import prepare, quiet


def results(name: str, *after: float) -> list[Result]:
    return [
        Result(
            name=name, seed=seed, before_pct=20, recalibrated_pct=60, after_pct=value,
            parameters=10, plan_share=0.6,
        )
        for seed, value in enumerate(after)
    ]  # fmt: skip


def view(weight: Tensor, name: str = "g") -> GroupView:
    return GroupView(
        name=name, width=len(weight), filters=(weight,), consumers=(), norm_scales=(),
        norm_shifts=(),
    )  # fmt: skip


def test_a_summary_has_the_mean_and_the_spread_over_seeds() -> None:
    first, second = summaries([*results("low", 1, 2, 3), *results("high", 5)])

    assert (second.name, second.after, second.spread, second.seeds) == ("low", 2, 1, 3)
    assert (first.name, first.after) == ("high", 5) and math.isnan(first.spread)


def test_a_difference_counts_where_welch_s_test_is_sure() -> None:
    # Spreads of 1, three seeds each: t = 4 / sqrt(2 / 3) = 4.9 on 4 degrees, p = 0.008; of 1.5
    # it is 1.8 and p = 0.14.
    near = summaries([*results("l2", 90, 91, 92), *results("random", 88.5, 89.5, 90.5)])
    far = summaries([*results("l2", 90, 91, 92), *results("random", 86, 87, 88)])

    assert verdict(near, "random").startswith("Within noise of random: l2.")
    assert verdict(far, "random") == "Better than random: l2."
    assert p_value(*far) == pytest.approx(0.008, abs=5e-4)
    assert "One seed" in verdict(summaries([*results("l2", 9), *results("random", 8)]), "random")


def test_many_comparisons_need_more_to_be_sure() -> None:
    many = [*results("l2", 90, 91, 92), *results("random", 86, 87, 88)]
    for number in range(8):  # nine comparisons: 0.008 is no longer below 0.05 / 9
        many += results(f"c{number}", 86, 87, 88)

    assert "Better" not in verdict(summaries(many), "random")


def test_the_report_names_what_cannot_be_planned() -> None:
    setting = {
        "model": {"name": "net", "arguments": {}},
        "data": {"source": "cifar10"},
        "finetune": {"epochs": 3},
    }
    found = Comparison(
        setting=setting, baseline_pct=92.5, criteria=tuple(results("random", 80, 81)),
        floors=tuple(results("none", 80, 81)), impossible={"graph": "No widths meet the target."},
    )  # fmt: skip

    text = report(found)

    assert "| random | 2 | 20.00 | 60.00 | 80.50 ± 0.71 | 0.600 |" in text
    assert "- Floors by graph: No widths meet the target." in text and "92.50 %" in text


def test_what_takes_longer_than_two_minutes_is_named() -> None:
    costs = [
        Cost(name="l2", kind="criterion", seconds=0.5),
        Cost(name="hrank", kind="criterion", seconds=130),
        Cost(name="effective", kind="measure", seconds=0, error="too few"),
    ]

    text = cost_report("Costs", costs)

    assert "Longer than 120 s: hrank." in text and "Not to be had: effective." in text
    assert "| l2 | criterion | 0.5 |" in text and "| effective | measure | too few |" in text


def test_chance_draws_by_the_seed_and_a_criterion_does_not() -> None:
    views = (view(torch.randn(32, 9, generator=torch.Generator().manual_seed(0))),)

    draws = [chosen(views, {"g": 16}, "random", seed) for seed in (0, 1, 0)]
    norms = [chosen(views, {"g": 16}, "l2", seed) for seed in (0, 1)]

    assert draws[0] == draws[2] != draws[1] and norms[0] == norms[1]
    assert chosen(views, {"g": 0}, "l2", 0) == {"g": ()}


def recipe(folder: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {
                "name": "benchmarks.networks:digits_resnet",
                "arguments": {"blocks": 1},
                "input_shape": [1, 8, 8],
            },
            "data": {"source": "digits", "batch": 128},
            "target": {"runtime": "fake", "latency_ratio": 0.6},
            "plan": {"objective": "saliency", "redundancy": "none", "calibration_images": 64},
            "finetune": {"epochs": 0, "bf16": False},
            "out": folder / "runs",
            "profiles": folder / "profiles",
        }
    )


def test_a_comparison_goes_on_where_it_stopped(tmp_path: Path) -> None:
    job, path = prepare(recipe(tmp_path), quiet), tmp_path / "found.json"

    compare_criteria(job, ("l2",), 1, path, 32, quiet)
    first = load_record(Comparison, path)
    found = compare_criteria(job, ("l2", "random"), 1, path, 32, quiet)
    floors = compare_floors(job, ("none", "graph"), 1, path, 32, quiet)

    assert [result.name for result in found.criteria] == ["l2", "random"]
    assert found.criteria[0] == first.criteria[0] and found.widths == first.widths
    assert len({result.parameters for result in found.criteria}) == 1  # the same widths
    done = {result.name for result in floors.floors} | set(floors.impossible)
    assert done == {"none", "graph"} and load_record(Comparison, path) == floors
    with pytest.raises(SystemExit, match="results of another calibration_images"):
        compare_criteria(job, ("l2",), 1, path, 16, quiet)


def test_every_criterion_and_measure_has_a_cost() -> None:
    section = ModelSection(
        name="benchmarks.networks:digits_resnet",
        arguments={"blocks": 1, "width": 4},
        input_shape=(1, 8, 8),
    )
    told: list[tuple[int, int]] = []

    found = measure_costs(section, 24, 2, lambda done, total, text: told.append((done, total)))

    assert len(found) == told[-1][0] == told[-1][1]
    assert [cost.name for cost in found if cost.error] == ["functionality_maximised"]
    assert {"gradients", "l2", "thinet", "effective", "removal loop"} <= {c.name for c in found}

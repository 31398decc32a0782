"""Diagnostics on layers whose answer is known: Gaussian ones, where every score is chance."""

import io
import math

import pytest
import torch
from rich.console import Console
from torch import Tensor

from hardware.graph.channel_map import ChannelMap
from hardware.records import load_record, save_record
from pipeline.criteria import CRITERIA
from pipeline.diagnosis.diagnose import (
    Diagnosis,
    agreements,
    applicability_warning,
    diagnose,
    inapplicable_groups,
    relative_spread,
    spread_of,
)
from pipeline.diagnosis.distribution import describe_weights
from pipeline.records import Choice, Form, GroupView, Plan
from pipeline.redundancy.effective import MaximumCompression
from pipeline.redundancy.network import NetworkRedundancy
from pipeline.report.diagnosis_figures import FULLEST, value_map
from pipeline.report.diagnosis_tables import diagnosis_tables
from pipeline.report.inspection import Inspection, write_inspection

MAGNITUDES = {name: CRITERIA[name] for name in ("l1", "l2", "fpgm", "fermat")}


def view(weight: Tensor, name: str = "conv1") -> GroupView:
    return GroupView(
        name=name,
        width=len(weight),
        filters=(weight,),
        consumers=(),
        norm_scales=(),
        norm_shifts=(),
    )


def gaussian(width: int, fan_in: int, seed: int = 0) -> Tensor:
    return torch.randn(width, fan_in, generator=torch.Generator().manual_seed(seed))


def uneven(width: int, fan_in: int) -> Tensor:
    """Return Gaussian filters of sizes from 1 to 3."""
    return gaussian(width, fan_in) * torch.linspace(1, 3, width)[:, None]


@pytest.mark.parametrize("fan_in", [27, 144, 576])
def test_l1_and_l2_of_gaussian_filters_rank_alike_by_0_930(fan_in: int) -> None:
    one = view(gaussian(4000, fan_in))

    [pair] = agreements({name: CRITERIA[name](one) for name in ("l1", "l2")})

    # (6 / pi) asin(rho / 2) with rho = 0.936; the standard error is about 0.13 / sqrt(4000).
    assert pair.spearman == pytest.approx(0.930, abs=0.01)


@pytest.mark.parametrize("fan_in", [144, 576])
@pytest.mark.parametrize(
    ("name", "factor"), [("l2", math.sqrt(0.5)), ("l1", math.sqrt(math.pi / 2 - 1))]
)
def test_the_spread_of_gaussian_filters_is_that_of_the_theory(name, factor, fan_in) -> None:
    scores = CRITERIA[name](view(gaussian(4000, fan_in)))

    assert relative_spread(scores) == pytest.approx(factor / math.sqrt(fan_in), rel=0.05)


@pytest.mark.parametrize("name", sorted(MAGNITUDES))
def test_a_criterion_of_size_cannot_tell_gaussian_filters_apart_but_uneven_ones(name) -> None:
    chance, sized = view(gaussian(128, 144)), view(uneven(128, 144))

    of_chance = spread_of(chance, name, CRITERIA[name], CRITERIA[name](chance))
    of_sized = spread_of(sized, name, CRITERIA[name], CRITERIA[name](sized))

    assert not of_chance.applicable and of_chance.spread == pytest.approx(of_chance.null, rel=0.3)
    assert of_sized.applicable


def test_a_criterion_without_a_null_needs_scores_that_differ() -> None:
    one = view(gaussian(64, 9))
    scales = (torch.ones(64), torch.linspace(1, 2, 64))

    found = [
        spread_of(one, "bn_scale_alone", CRITERIA["bn_scale_alone"], scale) for scale in scales
    ]

    assert [spread.applicable for spread in found] == [False, True]
    assert found[0].null is None


def test_the_control_tells_nothing_and_is_not_counted() -> None:
    criteria = {name: CRITERIA[name] for name in ("l2", "random")}
    diagnosis = diagnose([view(uneven(64, 144))], criteria)

    assert [spread.applicable for spread in diagnosis.groups[0].spreads] == [True, False]
    assert "every criterion tells filters apart in all 1 groups" in diagnosis.verdicts[1]


def test_rank_correlations_by_hand() -> None:
    # Ranks 1 2 3 4 and 1 2 4 3: Spearman 1 - 6 * 2 / (4 * 15), Kendall (5 - 1) / 6.
    [pair] = agreements({"a": torch.tensor([1.0, 2, 3, 4]), "b": torch.tensor([10.0, 20, 40, 30])})

    assert pair.spearman == pytest.approx(0.8) and pair.kendall == pytest.approx(2 / 3)
    [none] = agreements({"a": torch.ones(4), "b": torch.arange(4.0)})
    assert none.spearman is None and none.kendall is None


@pytest.mark.parametrize(("width", "fan_in"), [(64, 576), (256, 64), (64, 9)])
def test_gaussian_filters_look_gaussian(width: int, fan_in: int) -> None:
    found = describe_weights(0.03 * gaussian(width, fan_in, seed=1))

    assert found.is_gaussian and found.verdict == "Gaussian-like"
    assert found.variance_spread == pytest.approx(found.variance_spread_null, rel=0.35)
    assert found.correlation == pytest.approx(found.correlation_null, rel=0.15)
    assert abs(found.excess_kurtosis) < 6 * math.sqrt(24 / (width * fan_in))


@pytest.mark.parametrize(
    ("fault", "weight"),
    [
        ("mean off zero", gaussian(64, 144) + 0.3),
        ("filters of unequal variance", uneven(64, 144)),
        ("correlated weights", gaussian(64, 144) + 2 * gaussian(64, 1)),
        ("not normal", gaussian(64, 144) ** 3),
    ],
)
def test_each_departure_from_gaussian_filters_is_named(fault: str, weight: Tensor) -> None:
    found = describe_weights(weight)

    assert fault in found.verdict and not found.is_gaussian


def test_dead_filters_are_counted_and_left_out() -> None:
    weight = gaussian(64, 144)
    weight[:10] = 0

    found = describe_weights(weight)

    assert (found.filters, found.dead) == (54, 10) and found.is_gaussian
    assert describe_weights(torch.zeros(4, 9)).verdict == "too few weights to tell"


def test_normality_is_tested_at_a_controlled_rate() -> None:
    rejected = [describe_weights(gaussian(200, 100, seed)).rejected for seed in range(5)]

    # Without control 10 of 200 would be rejected each time.
    assert sum(rejected) <= 5


def test_a_diagnosis_says_what_agrees_and_what_is_chance(tmp_path) -> None:
    views = [view(gaussian(128, 144), "chance"), view(uneven(128, 144), "sized")]

    found = diagnose(views, MAGNITUDES, images=7)

    similarity, applicability, weights = found.verdicts
    assert "l1 and l2" in similarity
    assert "of 2 groups" in applicability and "l2 in 1" in applicability
    assert weights.startswith("Weights: 1 of 2 layers look Gaussian")
    assert found.groups[0].verdict.startswith("no criterion tells filters apart")
    assert found.groups[1].verdict.startswith("every criterion tells filters apart")
    save_record(found, tmp_path / "diagnosis.json")
    assert load_record(Diagnosis, tmp_path / "diagnosis.json") == found


def test_the_network_is_ranked_over_all_groups() -> None:
    views = [view(uneven(20, 30), "a"), view(uneven(30, 20), "b")]

    [pair] = diagnose(views, {name: CRITERIA[name] for name in ("l1", "l2")}).network

    scores = [torch.cat([CRITERIA[name](one) for one in views]) for name in ("l1", "l2")]
    [expected] = agreements(dict(zip(("l1", "l2"), scores, strict=True)))
    assert pair == expected


def plan(**widths: tuple[int, int]) -> Plan:
    """Return a plan by (full width, width) per group."""
    return Plan(
        target_ms=1,
        predicted_ms=1,
        baseline_ms=2,
        gap=0,
        objective="saliency",
        value=0,
        solver_s=0,
        measured=True,
        choices=tuple(
            Choice(group=name, full=full, floor=1, width=width, reason="saliency")
            for name, (full, width) in widths.items()
        ),
        keep={},
    )


def test_a_warning_is_due_from_a_tenth_of_the_pruned_channels_on() -> None:
    chance = frozenset({"a"})

    assert applicability_warning(plan(a=(16, 15), b=(16, 7)), chance, "l2") is None  # 1 of 10
    said = applicability_warning(plan(a=(16, 14), b=(16, 8)), chance, "l2")
    assert said is not None
    assert "l2 cannot tell filters apart in 1 of 2 narrowed groups (a), which lose 2 of 10" in said


def test_emptied_and_whole_groups_do_not_count() -> None:
    chance = frozenset({"a", "b"})

    assert applicability_warning(plan(a=(16, 0), b=(16, 16)), chance, "l2") is None


def test_groups_of_chance_are_found() -> None:
    views = [view(gaussian(128, 144), "chance"), view(uneven(128, 144), "sized")]
    saliency = {one.name: CRITERIA["l2"](one) for one in views}

    assert inapplicable_groups(views, "l2", CRITERIA["l2"], saliency) == {"chance"}


def test_the_page_shows_maps_and_what_was_found_in_words(tmp_path) -> None:
    views = [view(gaussian(40, 72), "a<b>.weight"), view(uneven(40, 72), "even.weight")]
    found = diagnose(views, MAGNITUDES, images=7)
    network = NetworkRedundancy(
        compression=(MaximumCompression(count="energy", share=0.25, low=0.2, high=0.3125),),
        groups=("a<b>.weight", "even.weight"),
        similarity=((1.0, 0.5), (0.5, 1.0)),
    )

    inspection = Inspection(
        title="net",
        channels=ChannelMap(groups=()),
        layers=(),
        floors=(),
        form=Form(taken="graph", reason="as asked", graph_share=1.0),
        diagnosis=found,
        network=network,
    )

    write_inspection(inspection, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()

    # Of two groups and four criteria, those of size are chance on the Gaussian group.
    assert f"{4 - sum(s.applicable for s in found.groups[0].spreads)} of 8 cells are empty" in page
    assert "a&lt;b&gt;" in page and "a<b>" not in page
    assert all(text.replace("'", "&#39;") in page for text in found.verdicts)
    assert "25.0 %" in page.replace("\xa0", " ") and "31.2 %" in page.replace("\xa0", " ")
    assert page.count('role="img"') == 8  # four figures, each for wide and for narrow screens


def test_a_map_fills_cells_by_their_values_and_outlines_what_is_not_known() -> None:
    figure = value_map(["r"], ["a", "b", "c"], [[0.5, -1.0, None]], 960)
    [axes] = figure.axes
    cells = axes.patches

    assert [cell.get_alpha() for cell in cells] == [0.5 * FULLEST, FULLEST, None]
    assert not cells[2].get_fill() or cells[2].get_facecolor()[3] == 0
    assert [text.get_text() for text in axes.texts] == ["0.50", "-1.00"]


def test_the_terminal_tells_of_the_whole_network() -> None:
    found = diagnose([view(uneven(24, 72), "a"), view(uneven(24, 72), "b")], MAGNITUDES)
    network = NetworkRedundancy(
        compression=(MaximumCompression(count="energy", share=0.5, low=0.4, high=0.6),),
        groups=("a", "b"),
        similarity=((1.0, 0.75), (0.75, 1.0)),
    )
    console = Console(width=160, file=io.StringIO())

    console.print(diagnosis_tables(found, network))

    text = console.file.getvalue().replace("\xa0", " ")
    assert "50.0 % by energy (40.0 % to 60.0 %)" in text
    assert "a and b respond most alike (linear CKA 0.750)" in text

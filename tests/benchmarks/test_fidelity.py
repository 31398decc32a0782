import json
import sys

import pytest
from rich.console import Console

from benchmarks.fidelity import __main__ as fidelity
from benchmarks.fidelity.isolated import IsolatedTable, layer_model
from benchmarks.fidelity.measuring import PASSES, Pass, Swept, at_table_pace, coverage_of
from benchmarks.fidelity.records import PlanTimes, Result, errors_of, repeated_of
from benchmarks.fidelity.subjects import NETWORKS, held_out
from hardware.latency.layers import LayerKey, macs_of
from hardware.latency.table import LatencyTable
from hardware.latency.template_layers import layers_of
from hardware.records import load_record
from hardware.runtimes.base import EngineSettings
from hardware.runtimes.fake import FakeRuntime
from pipeline.recipe import ModelSection
from tests.hardware import templates
from tests.hardware.latency.test_predict import add_variant
from tests.hardware.latency.test_table import KEY

TINY = ModelSection(
    name="benchmarks.networks:digits_resnet",
    arguments={"width": 8, "blocks": 1},
    input_shape=(1, 16, 16),
)
TINY_DEEPER = TINY.model_copy(update={"arguments": {"width": 8, "blocks": 2}})
EVERY_GROUP = {"stream": (4, 16, 32), "inner0": (0, 4, 32), "inner1": (0, 4, 32), "wide": (8, 64)}


def test_errors_are_percent_of_what_was_measured_and_the_bias_keeps_its_sign() -> None:
    found = errors_of([0.9, 1.0, 2.2, 4.4], [1.0, 1.0, 2.0, 4.0])

    assert (found.median_error_pct, found.worst_error_pct) == (10.0, 10.0)
    assert found.bias_pct == 5.0
    assert found.p95_error_pct == pytest.approx(10.0)


def test_held_out_plans_draw_every_width_and_end_with_uniform_ones() -> None:
    _, channels = templates.residual()

    plans = held_out(EVERY_GROUP, channels, count=60, seed=0)

    random = [widths for name, widths in plans if name == "random"]
    assert len(random) == 60
    for group, widths in EVERY_GROUP.items():
        assert {plan[group] for plan in random} == set(widths)
    assert [name for name, _ in plans[60:]] == ["25% of all", "50% of all", "75% of all"]
    assert plans[61][1] == {"stream": 16, "inner0": 4, "inner1": 4, "wide": 8}


@pytest.mark.parametrize(
    "key",
    [
        LayerKey(operator="Conv", in_channels=3, out_channels=8, kernel=(7, 7), strides=(2, 2),
                 in_size=(32, 32), out_size=(16, 16)),
        LayerKey(operator="Conv", in_channels=6, out_channels=6, kernel=(3, 3), conv_groups=6,
                 in_size=(8, 8), out_size=(8, 8)),
        LayerKey(operator="Conv", in_channels=4, out_channels=5, kernel=(3, 3), dilations=(2, 2),
                 in_size=(9, 9), out_size=(9, 9)),
        LayerKey(operator="Gemm", in_channels=12, out_channels=10),
    ],
)  # fmt: skip
def test_a_layer_alone_has_the_sizes_of_its_key(key) -> None:
    engine = FakeRuntime().build(layer_model(key), EngineSettings())

    (output,) = engine.run(engine.random_feeds()).values()

    assert output.shape == (1, key.out_channels, *key.out_size)


def test_layers_that_no_network_of_one_layer_can_show_are_refused() -> None:
    key = LayerKey(operator="Conv", in_channels=3, out_channels=8, kernel=(3, 3), in_size=(8, 8),
                   out_size=(99, 99))  # fmt: skip

    with pytest.raises(ValueError, match="not a MaxPool"):
        layer_model(LayerKey(operator="MaxPool", in_channels=3, out_channels=3))
    with pytest.raises(ValueError, match="No symmetric padding"):
        layer_model(key.model_copy(update={"kernel": (4, 4), "out_size": (8, 8)}))


def test_isolated_layers_are_measured_once_and_added() -> None:
    template, channels = templates.residual()
    layers = layers_of(template, channels)
    # Each layer alone costs 2 us as a node, 5 us around it, and its padded multiply-adds.
    alone = IsolatedTable(FakeRuntime(us_per_mac=0.0), EngineSettings())

    whole_ms = alone.sum_ms(layers, {}, drift=1.0)
    emptied_ms = alone.sum_ms(layers, {"inner0": 0, "inner1": 0}, drift=1.0)

    assert whole_ms == pytest.approx(7 * 0.007)  # stem, two of each block, strided one, linear
    assert emptied_ms == pytest.approx(3 * 0.007)
    assert len(alone.known_ms) == 4  # the blocks' four convolutions are one key
    assert macs_of(layers, {}) > macs_of(layers, {"inner0": 0})


def test_what_is_measured_at_half_the_pace_counts_half() -> None:
    template, channels = templates.residual()
    layers = layers_of(template, channels)
    usual, slowed = (IsolatedTable(FakeRuntime(), EngineSettings()) for _ in range(2))

    ratio = slowed.sum_ms(layers, {}, drift=2.0) / usual.sum_ms(layers, {}, drift=1.0)

    assert ratio == pytest.approx(0.5)


def test_a_second_sweep_at_another_pace_is_covered_and_a_slower_network_is_not() -> None:
    layers = layers_of(*templates.residual())
    tables = []
    for pace, slower in ((1.0, 1.0), (1.4, 1.0), (1.0, 1.3)):
        table = LatencyTable(key=KEY)
        for width in (8, 16, 32):
            table = add_variant(table, layers, {"inner0": width}, pace=pace, slower=slower)
        tables.append(table)

    same, other = (
        coverage_of(tables[0], Swept(table=table, builds=3, seconds=1.0), "t")
        for table in tables[1:]
    )

    assert (same.entries_covered_pct, same.variants_covered_pct) == (100.0, 100.0)
    assert same.variants == 3 and same.variant_change_pct == pytest.approx(0.0, abs=0.01)
    assert other.variants_covered_pct == 0.0


def test_a_run_writes_everything_and_a_related_network_needs_few_builds(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(NETWORKS, "tiny", TINY)
    monkeypatch.setitem(NETWORKS, "deeper", TINY_DEEPER)
    path = tmp_path / "found.json"
    words = ["fidelity", "--network", "deeper", "--runtime", "fake", "--after", "tiny", "--plans"]
    monkeypatch.setattr(sys, "argv", [*words, "2", "--neighbour", "--json", str(path)])

    fidelity.main()

    found = load_record(Result, path)
    assert found.builds <= found.after["tiny"] / 3
    assert found.second_run.builds == 0
    assert found.plans_at_pace == len(found.plans) and found.at_pace is not None
    assert len(found.plans) == 2 + 3
    assert found.worst_error_pct < 1.0 < found.macs.worst_error_pct
    for plan in found.plans:
        assert plan.predicted_ms == pytest.approx(plan.measured_ms, rel=0.01)
    # The second sweep has no other network before it; the imagined device has no neighbours.
    assert found.coverage is not None and found.coverage.entries_covered_pct > 99
    assert (found.coverage.beside_variants, found.coverage.noticed_variants) == (6, 0)
    body = json.loads(path.read_text())
    assert {"table_seconds", "median_error_pct", "isolated", "macs", "repeated"} <= body.keys()
    assert all(len(plan["passes_ms"]) == PASSES for plan in body["plans"])
    assert "multiply-adds" in capsys.readouterr().out


def test_a_disturbed_run_says_so() -> None:
    console = Console(record=True, width=200)
    errors = errors_of([1.0], [1.0])
    found = Result.model_construct(
        **errors.model_dump(), network="n", runtime="fake", threads=1, builds=3, isolated=errors,
        isolated_scaled=errors, isolated_builds=1, macs=errors, repeated=errors, coverage=None,
        table_seconds=1.0, second_run=fidelity.SecondRun(builds=0, seconds=0.1), after={},
        crowded_variants=2,
        disturbance=fidelity.between(
            fidelity.get_runtime("fake").counters(), fidelity.get_runtime("fake").counters()
        ),
    )  # fmt: skip

    fidelity.show(found, console)

    assert "The machine was not quiet" in console.export_text()


@pytest.mark.parametrize(
    ("paces", "expected"),
    [
        ((1.0, 1.01, 0.99), 2.0),
        ((1.4, 1.0, 1.4), 2.0),
        ((1.4, 1.3, 1.5), 2.0),
        ((1.0, 1.0, 2.0), 1.5),
        ((0.9, 1.0, 1.01), 4.0),
    ],
)
def test_passes_in_which_the_machine_was_at_another_pace_count_only_where_there_are_no_others(
    paces, expected
):
    passes = [Pass(ms=ms, pace=pace) for ms, pace in zip((1.0, 2.0, 6.0), paces, strict=True)]

    assert at_table_pace(passes) == expected


def test_passes_beside_which_others_used_the_memory_count_only_where_there_are_no_others():
    disturbed = [Pass(ms=ms, pace=1.0, is_quiet=False) for ms in (1.0, 3.0)]

    assert at_table_pace([*disturbed, Pass(ms=5.0, pace=1.0)]) == 5.0
    assert at_table_pace(disturbed) == 2.0
    assert not disturbed[0].is_at_pace


def test_plans_repeat_as_far_as_the_machine_was_equally_fast():
    def plan(passes_ms, paces):
        return PlanTimes(
            name="random", widths={}, predicted_ms=1.0, measured_ms=1.0, isolated_ms=1.0,
            macs_ms=1.0, macs=1, passes_ms=passes_ms, paces=paces,
        )  # fmt: skip

    steady = plan((1.02, 1.0, 1.0), (1.0, 1.05, 1.0))
    slowed = plan((9.0, 1.0, 1.0), (1.5, 1.0, 1.0))

    assert repeated_of([steady, slowed]).worst_error_pct == pytest.approx(2.0)
    assert repeated_of([slowed]).worst_error_pct == pytest.approx(800.0)

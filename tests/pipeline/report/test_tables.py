import io

import pytest
from rich.console import Console

from hardware.graph.channel_map import ChannelMap, Group
from hardware.latency.layers import LayerKey
from hardware.latency.table import Entry, LatencyTable, TableKey
from hardware.latency.trust import trust_of
from pipeline.records import Choice
from pipeline.report import tables as showing


def shown(renderable, width=80):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(renderable)
    text = console.file.getvalue().replace("\xa0", " ")
    assert max(map(len, text.splitlines())) <= width
    return text


def squeezed(renderable, width=80):
    return " ".join(shown(renderable, width).split())


def test_a_verdict_shows_before_after_limits_and_files(verdict):
    text = squeezed(showing.verdict_table(verdict))

    assert "Verdict: passed" in text
    assert "latency 0.4120 ms 0.2410 ms target 0.2472 ms, predicted 0.2431 ms" in text
    assert "accuracy 91.73 % 91.40 % −0.33 points on 10,000 test images" in text
    assert "limit held latency 0.2410 ms, target 0.2472 ms" in text
    assert verdict.engine in text and verdict.report in text
    assert text.count("OpenVINO, fp32, batch 1, 1 thread") == 1


def test_a_missed_limit_is_marked(verdict):
    missed = verdict.model_copy(
        update={"passed": False, "reasons": ("MISSED: parity 1.0e-01, allowed 1.0e-03",)}
    )

    text = squeezed(showing.verdict_table(missed))

    assert "Verdict: missed" in text
    assert "limit missed parity 1.0e-01, allowed 1.0e-03" in text


@pytest.mark.parametrize("width", [80, 120])
def test_the_comparison_has_one_row_per_runtime_and_uncut_paths(verdict, width):
    other = verdict.model_copy(update={"runtime": "ort", "passed": False, "measured_ms": 0.3})

    text = squeezed(showing.comparison_table([verdict, other]), width)

    assert "OpenVINO passed 0.4120 0.2410 1.71× 91.73 → 91.40" in text
    assert "ONNX Runtime missed 0.4120 0.3000" in text
    assert text.count(verdict.engine) == 2 and "…" not in text


@pytest.mark.parametrize("width", [80, 120])
def test_a_plan_gives_every_group_its_width_and_reason(plan, floors, width):
    text = squeezed(showing.plan_table(plan, floors), width)

    for choice in plan.choices:
        assert choice.group.removesuffix(".weight") in text
    assert "layer1.0.conv1 16 → 8 4 saliency: the next" in text
    assert "gap 0.042 %" in text and "every latency measured" in text


def test_a_plan_on_estimates_says_so(plan):
    text = squeezed(showing.plan_table(plan.model_copy(update={"measured": False})))

    assert "some latencies ESTIMATED" in text


def test_groups_show_coupled_layers_floors_and_frozen_ones(channels, floors):
    text = squeezed(showing.groups_table(channels, floors), 160)

    assert "10 pruning groups, 9 may be pruned" in text
    assert "conv1 16 4 layers 0 layers frozen: Pad at node_pad_1" in text
    assert "layer3.0.conv1 64 48 0.25 1 layer 1 layer 48 of 64 filters" in text


def test_groups_without_floors_have_no_floor_column(channels):
    assert "floor" not in shown(showing.groups_table(channels))


def test_frozen_channels_are_listed_with_reasons_and_unknown_operators(channels):
    text = squeezed(showing.frozen_table(channels), 120)

    assert "fc 10 network output" in text
    assert "com.vendor::FancyPool (2×)" in text


def test_brackets_in_names_are_not_taken_for_markup(plan):
    name = "blocks[red].conv.weight"
    choice = Choice(group=name, full=8, floor=2, width=4, reason="saliency", detail="[bold]x")
    group = Group(name=name, width=8, slices=(), frozen="[why]")

    assert "blocks[red].conv" in shown(
        showing.plan_table(plan.model_copy(update={"choices": (choice,)}))
    )
    assert "[bold]x" in shown(showing.plan_table(plan.model_copy(update={"choices": (choice,)})))
    assert "[why]" in shown(showing.groups_table(ChannelMap(groups=(group,))))
    assert "[why]" in shown(showing.frozen_table(ChannelMap(groups=(group,))))


def test_a_latency_table_shows_its_slowest_layers_and_its_audit(tmp_path):
    key = TableKey(
        device="bench",
        fingerprint="f",
        folder="bench",
        runtime="ov",
        version="1",
        precision="fp32",
        batch=1,
        threads=2,
    )
    layers = [
        LayerKey(operator="Conv", in_channels=3, out_channels=n, kernel=(3, 3)) for n in (8, 9, 7)
    ]
    entries = [
        Entry(key=layer, median_us=time, mad_us=0.5, builds=4)
        for layer, time in zip(layers, (2.0, 30.0, 10.0), strict=True)
    ]

    table = LatencyTable(key=key, entries=tuple(entries))

    text = squeezed(showing.latency_table(tmp_path, table, trust_of(table), 2))

    assert "OpenVINO 1 on bench" in text
    assert "Conv 3×3 3 9 30.0 0.5 4 Conv 3×3 3 7 10.0 0.5 4 and 1 faster layers" in text
    assert "3 layers from 0 variants, fp32, batch 1, 2 threads" in text
    assert "0 networks were predicted before they were measured: too few" in text

import io

import pytest
from rich.console import Console

from hardware.channels import ChannelMap, Group
from pipeline import showing
from pipeline.records import Choice


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
    text = squeezed(showing.plan_table(plan, floors, {"layer1.0.conv1.weight": 5.25}), width)

    for choice in plan.choices:
        assert choice.group.removesuffix(".weight") in text
    assert "layer1.0.conv1 16 → 8 4 5.2 saliency: the next" in text
    assert "gap 0.042 %" in text and "every latency measured" in text


def test_a_plan_on_estimates_says_so(plan):
    text = squeezed(showing.plan_table(plan.model_copy(update={"measured": False})))

    assert "some latencies ESTIMATED" in text


def test_groups_show_coupled_layers_floors_and_frozen_ones(channels, floors):
    text = squeezed(showing.groups_table(channels, floors), 160)

    assert "10 pruning groups, 9 may be pruned" in text
    assert "conv1 16 4 layers 0 layers frozen: Pad at node_pad_1" in text
    assert "layer3.0.conv1 64 48 1 layer 1 layer 48 of 64 filters" in text


def test_groups_without_floors_have_no_floor_column(channels):
    assert "floor" not in shown(showing.groups_table(channels))


def test_frozen_channels_are_listed_with_reasons_and_unknown_operators(channels):
    text = squeezed(showing.frozen_table(channels), 120)

    assert "fc 10 network output" in text
    assert "com.vendor::FancyPool (2×)" in text


def test_devices_say_what_to_install():
    rows = [("ort", "1.31.1", "CPU", None), ("trt", "", "", "pip install 'espalier-cnn[tensorrt]'")]

    text = squeezed(showing.devices_table(rows), 120)

    assert "ort 1.31.1 CPU ready" in text
    assert "espalier-cnn[tensorrt]" in text


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


def log_console():
    return Console(file=io.StringIO(), width=80, force_terminal=False)


def test_without_a_terminal_every_stage_is_one_line():
    console = log_console()

    with showing.StageProgress(console) as stages:
        for name in ("sweep", "fine-tuning"):
            with stages.stage(name) as told:
                for step in range(50):
                    told(step + 1, 50, f"step {step + 1}")

    first, second = console.file.getvalue().splitlines()
    assert first.startswith("sweep: done in ") and first.endswith("step 50")
    assert second.startswith("fine-tuning: done in ")


def test_a_stage_that_fails_says_so_and_the_error_goes_on():
    console = log_console()

    with (
        pytest.raises(ValueError, match="boom"),
        showing.StageProgress(console) as stages,
        stages.stage("sweep"),
    ):
        raise ValueError("boom")

    assert console.file.getvalue().startswith("sweep: stopped after ")


def test_a_long_stage_lets_a_log_know_that_it_lives(monkeypatch):
    monkeypatch.setattr(showing, "_HEARTBEAT_S", 0.0)
    console = log_console()

    with showing.StageProgress(console) as stages, stages.stage("sweep") as told:
        told(1, 4, "a")
        told(2, 0, "b")

    lines = console.file.getvalue().splitlines()
    assert lines[0].startswith("sweep: 1 of 4, about ") and lines[0].endswith(" left, a")
    assert lines[1] == "sweep: 2 of ?, b"


def test_on_a_terminal_a_stage_has_a_bar_that_fills():
    console = Console(file=io.StringIO(), width=120, force_terminal=True)

    with showing.StageProgress(console, bars=True) as stages, stages.stage("[sweep]") as told:
        told(1, 4, "first")
        told(2, 4, "second")

    text = console.file.getvalue()
    assert "[sweep]" in text and "100 %" in text and "second" in text


def test_a_file_that_claims_to_be_a_terminal_gets_lines():
    console = Console(file=io.StringIO(), force_terminal=True)

    with showing.StageProgress(console) as stages, stages.stage("sweep"):
        pass

    assert console.file.getvalue().startswith("sweep: done in ")


def test_ci_gets_lines_even_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("CI", "true")
    console = Console(file=Terminal(), force_terminal=True)

    with showing.StageProgress(console) as stages, stages.stage("sweep"):
        pass

    assert console.file.getvalue().startswith("sweep: done in ")

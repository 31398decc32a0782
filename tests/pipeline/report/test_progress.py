import io

import pytest
from rich.console import Console

from pipeline.report import progress


def log_console():
    return Console(file=io.StringIO(), width=80, force_terminal=False)


def test_without_a_terminal_every_stage_is_one_line():
    console = log_console()

    with progress.StageProgress(console) as stages:
        for name in ("sweep", "fine-tuning"):
            with stages.stage(name) as report:
                for step in range(50):
                    report(step + 1, 50, f"step {step + 1}")

    first, second = console.file.getvalue().splitlines()
    assert first.startswith("sweep: done in ") and first.endswith("step 50")
    assert second.startswith("fine-tuning: done in ")


def test_a_stage_that_fails_says_so_and_the_error_goes_on():
    console = log_console()

    with (
        pytest.raises(ValueError, match="boom"),
        progress.StageProgress(console) as stages,
        stages.stage("sweep"),
    ):
        raise ValueError("boom")

    assert console.file.getvalue().startswith("sweep: stopped after ")


def test_a_long_stage_lets_a_log_know_that_it_lives(monkeypatch):
    monkeypatch.setattr(progress, "_HEARTBEAT_S", 0.0)
    console = log_console()

    with progress.StageProgress(console) as stages, stages.stage("sweep") as report:
        report(1, 4, "a")
        report(2, 0, "b")

    lines = console.file.getvalue().splitlines()
    assert lines[0].startswith("sweep: 1 of 4, about ") and lines[0].endswith(" left, a")
    assert lines[1] == "sweep: 2 of ?, b"


def test_on_a_terminal_a_stage_has_a_bar_that_fills():
    console = Console(file=io.StringIO(), width=120, force_terminal=True)

    with (
        progress.StageProgress(console, draws_bars=True) as stages,
        stages.stage("[sweep]") as report,
    ):
        report(1, 4, "first")
        report(2, 4, "second")

    text = console.file.getvalue()
    assert "[sweep]" in text and "100 %" in text and "second" in text


def test_a_file_that_claims_to_be_a_terminal_gets_lines():
    console = Console(file=io.StringIO(), force_terminal=True)

    with progress.StageProgress(console) as stages, stages.stage("sweep"):
        pass

    assert console.file.getvalue().startswith("sweep: done in ")


def test_ci_gets_lines_even_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("CI", "true")
    console = Console(file=Terminal(), force_terminal=True)

    with progress.StageProgress(console) as stages, stages.stage("sweep"):
        pass

    assert console.file.getvalue().startswith("sweep: done in ")

"""The latency gate's benchmark: what it runs, that it continues, and how it counts."""

import json
from collections import Counter
from contextlib import nullcontext
from functools import partial
from itertools import count

import pytest

from benchmarks.gate import __main__ as program
from benchmarks.gate import cases
from benchmarks.gate.cases import Case, Found, SlowDown, plan
from benchmarks.gate.engines import Build
from benchmarks.gate.judging import OTHERS, OURS, Run, report, shortfalls
from hardware.gate import bench as benching
from hardware.gate.sample import sample_units
from hardware.gate.sequential_test import Verdict

PAIR = SlowDown(
    baseline=Build(), candidate=Build(widened=1, more=8), slower_pct=5.5, low_pct=5, high_pct=6
)
FOUND = Found(by_channels=dict.fromkeys((3, 5, 10), PAIR), by_threads={3: None, 5: PAIR, 10: None})


def run(kind: str, verdict: Verdict, *, beside: bool = False, wall_s: float = 4.0) -> Run:
    said = {OURS: verdict, **dict.fromkeys(OTHERS, Verdict.REGRESSION)}
    return Run(
        kind=kind, beside=beside, runtime="ort", seconds=3, wall_s=wall_s, slower_pct=5, said=said
    )


def test_every_kind_is_planned_as_often_as_asked_and_evenly():
    planned = plan(8, 4, {"ort": FOUND, "ov": FOUND})

    kinds = Counter((case.kind, case.beside) for case in planned)
    assert kinds == {
        **dict.fromkeys([("aa", False), ("aa", True)], 8),
        **{(kind, beside): 4 for kind in ("3", "5", "10") for beside in (False, True)},
        ("threads 5", False): 4,
    }
    assert Counter(case.runtime for case in planned) == {"ort": 22, "ov": 22}
    # Half of the plan holds half of every kind.
    assert Counter((c.kind, c.beside) for c in planned[: len(planned) // 2]) == {
        key: number // 2 for key, number in kinds.items()
    }
    assert all(case.baseline == case.candidate for case in planned if case.kind == "aa")


def test_what_was_run_is_not_run_again():
    planned = plan(2, 1, {"ort": FOUND})
    done = [run(case.kind, Verdict.PASS, beside=case.beside) for case in planned]

    assert program.missing(planned, done) == []
    assert program.missing(planned, done[:-1]) == [planned[-1]]
    assert len(program.missing(plan(3, 1, {"ort": FOUND}), done)) == 2


def test_the_time_left_is_that_of_runs_of_the_same_kind():
    case = Case("aa", False, "ort", Build(), Build())
    unknown = Case("5", True, "ort", Build(), Build())
    done = [run("aa", Verdict.PASS, wall_s=2.0), run("aa", Verdict.PASS, wall_s=4.0)]

    assert program.seconds_left([case, case, unknown], done, 10.0) == 3 + 3 + 10


def test_rates_are_counted_by_kind_and_neighbour():
    runs = [run("aa", Verdict.PASS)] * 97 + [run("aa", Verdict.INCONCLUSIVE)]
    runs += [run("aa", Verdict.REGRESSION)] * 2 + [run("aa", Verdict.PASS, beside=True)]
    runs += [run("5", Verdict.REGRESSION)] * 3 + [run("5", Verdict.INCONCLUSIVE)]

    found = report(runs)

    assert (found["aa_runs"], found["false_alarm_pct"], found["inconclusive_pct"]) == (100, 2, 1)
    # Two of a hundred: the bound at which 2 or fewer would come out once in twenty.
    assert found["false_alarm_upper_pct"] == pytest.approx(6.16, abs=0.005)
    assert found["detection_pct"] == {"3": None, "5": 75.0, "10": None}
    assert found["with_neighbour"]["false_alarm_pct"] == 0
    assert {other["false_alarm_pct"] for other in found["others"].values()} == {100.0}
    assert shortfalls(found) == [
        "alone: 2.0 % false alarms, not 1 % at most",
        "alone: 75.0 % of the slow-downs of 5 % found, not 99 %",
    ]


@pytest.mark.filterwarnings("ignore:Precision loss")  # the t-test's, of samples without noise
def test_a_benchmark_that_was_interrupted_continues(tmp_path, monkeypatch, capsys):
    """On the imagined device, whose times are exact: slow-downs are found, equal engines pass."""
    monkeypatch.setattr(program, "FOLDER", tmp_path / "gate")
    monkeypatch.setattr(program, "neighbour", nullcontext)
    monkeypatch.setattr(cases, "FINDING", 0.5)
    monkeypatch.setattr(cases, "WIDER", [Build(widened=n, more=16) for n in (2, 3, 5, 8)])
    monkeypatch.setattr(cases, "SIZES_PX", (8,))
    ticks = count()  # the clock goes on by 10 ms whenever somebody looks at it
    simulated = partial(sample_units, clock=lambda: next(ticks) / 100)
    monkeypatch.setattr(benching, "sample_units", simulated)
    benched, calls = program.bench, count(1)

    def interrupted(*words):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return benched(*words)

    monkeypatch.setattr(program, "bench", interrupted)
    words = ["--runtime", "fake", "--aa-runs", "1", "--runs", "1", "--budget", "2s"]
    words += ["--json", str(tmp_path / "gate.json")]

    assert program.main(words) == 1
    cut = json.loads((tmp_path / "gate.json").read_text())
    assert program.main(words) == 0
    whole = json.loads((tmp_path / "gate.json").read_text())

    assert cut["missing_runs"] > whole["missing_runs"] == 0
    assert "min left" in capsys.readouterr().err
    assert whole["false_alarm_pct"] == 0 and whole["aa_runs"] == 1
    assert whole["detection_pct"] == {"3": 100.0, "5": 100.0, "10": 100.0}
    slow_downs = whole["slow_downs"]["fake"]["by_channels"]
    assert all(found["low_pct"] >= float(percent) for percent, found in slow_downs.items())

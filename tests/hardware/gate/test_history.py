"""A device's history: what survives a kill, and what it tells of the difference of sessions."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import t as students_t

from hardware.errors import StorageError
from hardware.gate.engines import REFERENCE
from hardware.gate.history import (
    History,
    Measured,
    Past,
    Times,
    read_history,
    session_allowance,
)
from hardware.gate.sample import UnitSamples
from hardware.gate.sequential_test import ASSUMED_ALLOWANCE
from hardware.gate.session import Subject

NET = Subject(
    path="net.onnx", sha256="a", runtime="ort", version="1", precision="fp32", threads=1, inputs=()
)


def unit(load: int) -> UnitSamples:
    return UnitSamples(load=load, load_ms=5.0, first_ms=3.0, samples_ms=(1.0, 2.0, 6.0))


def begun(path, session: str = "one", units: int = 2) -> History:
    history = History(path, session)
    history.begin([NET])
    for load in range(units):
        history.add([NET], [unit(load)])
    return history


def test_what_was_measured_is_read_back(tmp_path):
    begun(tmp_path / "sub" / "h.jsonl")
    begun(tmp_path / "sub" / "h.jsonl", "two", units=1)

    first, second = read_history(tmp_path / "sub" / "h.jsonl")

    assert (first.session, second.session) == ("one", "two")
    assert [(u.p50_ms, u.samples) for u in first.units] == [(2.0, 3)] * 2
    assert first.subjects == (NET,) and first.outcome is None
    assert len(second.units) == 1


def test_a_torn_last_line_is_ignored_and_cut_off_by_the_next_bench(tmp_path):
    path = tmp_path / "h.jsonl"
    history = begun(path)
    whole = path.read_bytes()
    line = json.dumps({"kind": "unit", "padding": "x" * 10_000}).encode()  # longer than one block
    for cut in (1, 100, len(line)):
        path.write_bytes(whole + line[:cut])
        assert len(read_history(path)[0].units) == 2

        history.add([NET], [unit(9)])
        assert len(read_history(path)[0].units) == 3
        assert path.read_bytes().startswith(whole)


def test_a_file_that_is_nothing_but_a_torn_line_starts_anew(tmp_path):
    path = tmp_path / "h.jsonl"
    path.write_bytes(b'{"kind": "beg')

    begun(path, units=1)

    assert len(read_history(path)) == 1


def test_a_history_that_is_not_there_is_empty(tmp_path):
    assert read_history(tmp_path / "none.jsonl") == ()


@pytest.mark.parametrize("line", ["not JSON", "[1]", '{"kind": "other"}', '{"kind": "unit"}'])
def test_a_damaged_whole_line_is_named(tmp_path, line):
    path = tmp_path / "h.jsonl"
    begun(path)
    path.write_text(path.read_text() + line + "\n")

    with pytest.raises(StorageError, match=r"(?s)h\.jsonl, line 4 is damaged .* Delete the line"):
        read_history(path)


def test_a_history_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(StorageError, match="choose another folder with --history"):
        begun(tmp_path / "file" / "h.jsonl")


KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
from hardware.gate.history import History, read_history
from tests.hardware.gate.test_history import NET, unit

path, found = Path(sys.argv[1]), []
for kill in range(12):
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        history = History(path, f"session {kill}")
        history.begin([NET])
        while True:  # the parent is told of every unit that was appended, and then kills
            history.add([NET], [unit(0)])
            os.write(writing, b".")
    os.close(writing)
    told = len(os.read(reading, 1))
    time.sleep(random.Random(kill).uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := len(os.read(reading, 65536)):
        told += more
    os.close(reading)
    [session] = [past for past in read_history(path) if past.session == f"session {kill}"]
    found.append((told, len(session.units)))
print(json.dumps(found))
"""


def test_a_process_that_is_killed_while_it_appends_loses_nothing(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "h.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)

    found = json.loads(done.stdout)
    # The last unit may have been appended before the parent could be told.
    assert all(told <= kept <= told + 1 for told, kept in found)
    assert sum(told for told, _ in found) > len(found)
    # Nor did a later session damage an earlier one.
    assert [len(past.units) for past in read_history(tmp_path / "h.jsonl")] == [k for _, k in found]


def session(
    log_ratio: float, *, engine: str = "a", reference: str = REFERENCE, units: int = 9
) -> Past:
    """An engine that takes exp(log_ratio) times as long as the reference, in every unit."""
    times = {"samples": 8, "p90_ms": 3.0, "p99_ms": 3.0, "load_ms": 9.0, "first_ms": 3.0}
    subject = Subject(
        path=f"{engine}.onnx", sha256=engine, runtime="ort", version="1", precision="fp32",
        threads=1, inputs=(),
    )  # fmt: skip
    unit = Measured(
        session="s",
        sha256=engine,
        reference=Times(p50_ms=2.0, **times),
        p50_ms=2.0 * math.exp(log_ratio),
        **times,
    )
    return Past("s", (subject,), reference, (unit,) * units, None)


def test_the_allowance_is_the_prediction_bound_for_the_difference_of_two_sessions():
    # Two engines: squares (1 + 1) and (1 + 0 + 1), in units of 1e-4; 1 + 2 repeats; then one more.
    past = [session(x) for x in (0.50, 0.52)]
    past += [session(x, engine="b") for x in (-0.01, 0.0, 0.01)]
    past += [session(x, engine="c") for x in (0.30, 0.30)]

    found = session_allowance(past, "p50", 0.01)

    scatter = math.sqrt((2e-4 + 2e-4 + 0) / 4)
    assert found.share == pytest.approx(math.expm1(students_t.isf(0.01, 4) * scatter * 2**0.5))
    assert found.sessions == 7
    # The other metrics did not move at all.
    assert session_allowance(past, "load", 0.01).share == pytest.approx(0.0)


def test_the_bound_is_exceeded_as_often_as_it_says():
    generator = np.random.default_rng(0)
    exceeded = 0
    for _ in range(400):
        *known, then, now = generator.normal(0, 0.01, 8)
        bound = session_allowance([session(x) for x in known], "p50", 0.05).share
        exceeded += math.exp(now - then) > 1 + bound

    # Binomial(400, 0.05) lies in 8 to 35 but for 1 in 1000.
    assert 8 <= exceeded <= 35


@pytest.mark.parametrize(
    "past",
    [
        [],
        [session(0.1)] * 4,  # three repeats
        [session(0.1, engine=name) for name in "abcdefgh"],  # nothing repeats
        [session(0.1, reference="another engine")] * 9,  # paired sessions differ less
        [session(0.1, units=4)] * 9,  # interrupted early
    ],
)
def test_too_little_history_leaves_what_is_assumed(past):
    assert session_allowance(past, "p50", 0.01) is ASSUMED_ALLOWANCE


def test_sessions_of_an_older_version_are_read_and_not_compared(tmp_path):
    """Before version 2 engines were timed after a single untimed inference."""
    path = tmp_path / "h.jsonl"
    times = {"samples": 8, "p50_ms": 2, "p90_ms": 3, "p99_ms": 3, "load_ms": 9, "first_ms": 3}
    for session_id in "abcdefgh":
        begun = {"kind": "begun", "session": session_id, "reference": "anchor 1"}
        begun["subjects"] = [NET.model_dump(mode="json")]
        unit = {"kind": "unit", "session": session_id, "sha256": "a", "reference": times, **times}
        with path.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in [begun, *[unit] * 9]))

    past = read_history(path)

    assert [len(one.units) for one in past] == [9] * 8
    assert session_allowance(past, "p50", 0.01) is ASSUMED_ALLOWANCE

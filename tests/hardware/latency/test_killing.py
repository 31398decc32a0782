"""A sweep that is killed at any moment loses nothing that it had measured."""

import json
import subprocess
import sys
from pathlib import Path

KILLS = 10
SCRIPT = Path(__file__).with_name("killed_sweep.py")


def test_a_sweep_killed_ten_times_loses_nothing_and_its_file_is_never_damaged(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path / "table.json"), str(KILLS)],
        capture_output=True,
        text=True,
        timeout=240,
    )

    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    kills, last = told[:-1], told[-1]
    assert [kill["signal"] for kill in kills] == [9] * KILLS
    for before, after in zip([{"held": []}, *kills], kills, strict=False):
        # What the sweep said it had saved is there, and what was there before has not changed.
        assert after["announced"] <= len(after["held"])
        assert after["held"][: len(before["held"])] == before["held"]
    assert last["held"][: len(kills[-1]["held"])] == kills[-1]["held"]
    assert len(last["held"]) == last["builds"]

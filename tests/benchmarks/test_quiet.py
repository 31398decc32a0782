import re
import sys

from benchmarks import quiet


def test_the_readings_and_their_spread_are_printed(monkeypatch, capsys):
    monkeypatch.setattr(quiet, "PAUSE_S", 0.0)
    monkeypatch.setattr(sys, "argv", ["quiet", "--seconds", "0.05"])

    quiet.main()

    *readings, last = capsys.readouterr().out.splitlines()
    assert all(float(line.split()[2]) > 0 for line in readings)
    best, usual, worst = map(float, re.findall(r" (\d+\.\d)", last))
    assert 0 < best <= usual <= worst

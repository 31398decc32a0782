import sys

import pytest

from benchmarks import quiet
from benchmarks.quiet import SharedMemory


class Told(SharedMemory):
    """Memory whose readings are given."""

    def __init__(self, limit_ps, readings):
        super().__init__(limit_ps)
        self.readings = list(readings)

    def ps_per_byte(self):
        return self.readings.pop(0)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(quiet, "PAUSE_S", 0.0)


def test_memory_is_read_in_a_time_above_zero():
    assert SharedMemory().ps_per_byte() > 0


def test_without_a_limit_it_is_always_quiet():
    memory = Told(None, [])

    memory.wait(60.0)

    assert memory.is_quiet()


def test_waiting_ends_after_quiet_readings_in_a_row():
    memory = Told(50.0, [60, 40, 60, 40, 45, 50, 99])

    memory.wait(60.0, readings=3)

    assert memory.readings == [99]
    assert memory.waited_s > 0


def test_waiting_ends_where_it_never_is_quiet():
    memory = SharedMemory(0.0)

    memory.wait(0.1)

    assert memory.waited_s >= 0.1
    assert not memory.is_quiet()


def test_the_command_says_what_is_usual(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quiet", "--seconds", "0.05"])

    quiet.main()

    assert "ps/byte" in capsys.readouterr().out.splitlines()[-1]

import subprocess
import sys

import psutil
import pytest

from hardware.disturbance import LEAST_S, Counters, between, read_counters


def test_what_others_did_is_the_difference_of_two_readings() -> None:
    before = Counters(wall_s=10.0, foreign_s=5.0, stolen_s=1.0, interruptions=7)
    after = Counters(wall_s=12.0, foreign_s=6.0, stolen_s=1.5, interruptions=9)

    found = between(before, after)

    assert (found.seconds, found.foreign_cores, found.stolen_cores) == (2.0, 0.5, 0.25)
    assert found.interruptions == 2
    assert found.is_disturbed


@pytest.mark.parametrize(
    ("seconds", "foreign_s", "disturbed"),
    [(2.0, 0.2, False), (2.0, 2.0, True), (LEAST_S / 2, 1.0, False), (2.0, -1.0, False)],
)
def test_a_stretch_is_disturbed_when_others_used_much_and_it_was_long_enough(
    seconds, foreign_s, disturbed
) -> None:
    found = between(Counters(), Counters(wall_s=seconds, foreign_s=foreign_s))

    assert found.is_disturbed == disturbed


def test_a_process_that_spins_elsewhere_is_counted() -> None:
    before = read_counters()
    spinning = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        while psutil.Process(spinning.pid).cpu_times().user < 0.5:
            pass
        after = read_counters()
    finally:
        spinning.kill()
        spinning.wait()

    assert after.foreign_s - before.foreign_s > 0.4  # ticks of the system are 10 ms
    assert after.wall_s > before.wall_s

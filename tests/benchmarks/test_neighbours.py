import signal
import subprocess
import sys
import time

import psutil

from benchmarks.neighbours import neighbour

HOLDING = """
import time
from benchmarks.neighbours import neighbour
with neighbour() as process:
    print(process.pid, flush=True)
    time.sleep(60)
"""


def test_a_neighbour_keeps_a_core_busy_and_ends_with_the_block():
    with neighbour() as process:
        spinning = psutil.Process(process.pid)
        deadline = time.monotonic() + 20
        while spinning.cpu_times().user < 0.2 and time.monotonic() < deadline:
            time.sleep(0.05)

        assert spinning.cpu_times().user >= 0.2
    assert process.returncode == -signal.SIGKILL


def test_a_neighbour_ends_when_its_benchmark_is_killed():
    with subprocess.Popen([sys.executable, "-c", HOLDING], stdout=subprocess.PIPE) as benchmark:
        spinning = psutil.Process(int(benchmark.stdout.readline()))
        benchmark.kill()

    psutil.wait_procs([spinning], timeout=20)
    assert not spinning.is_running() or spinning.status() == psutil.STATUS_ZOMBIE

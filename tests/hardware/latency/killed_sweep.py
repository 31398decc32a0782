"""Sweep a small network on the imagined device, killed at random moments; one JSON line per kill.

A program of its own, which forks: the sweeps begin at once, and no test's threads are copied.

    python killed_sweep.py TABLE KILLS
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

from hardware.latency.sweep import Goal, Place, sweep
from hardware.latency.table import LatencyTable, key_of, load_table
from hardware.latency.template_layers import layers_of
from hardware.latency.variant import Template
from hardware.runtimes.base import EngineSettings
from hardware.runtimes.fake import FakeRuntime
from tests.hardware import templates

BUILDS = 40
SETTINGS = EngineSettings()


def work(path: Path, announce: int) -> None:
    """Continue the sweep; write a byte for every variant that is in the table."""
    model, channels = templates.residual(blocks=1)
    template = Template(model=model, channels=channels, layers=layers_of(model, channels))
    candidates = {g.name: tuple(range(4, g.width + 1, 4)) for g in channels.groups}
    runtime = FakeRuntime(noise=0.02)
    empty = LatencyTable(key=key_of(runtime, SETTINGS, 1))
    sweep(
        Place(template=template, runtime=runtime, settings=SETTINGS, path=path),
        Goal(candidates=candidates, builds=BUILDS),
        load_table(path) if path.exists() else empty,
        lambda done, total, text: os.write(announce, b".") and None,
    )


def start(path: Path) -> tuple[int, int]:
    """Return the process that sweeps, and the pipe it announces on."""
    reading, announce = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reading)
        work(path, announce)
        os._exit(0)
    os.close(announce)
    return child, reading


def held(path: Path) -> list[object]:
    """Return what identifies every variant in the table: nothing may change about it."""
    variants = load_table(path).variants if path.exists() else ()
    return [[dict(v.widths), v.end_to_end.median_ms, list(v.times_us)] for v in variants]


def main() -> None:
    path, kills = Path(sys.argv[1]), int(sys.argv[2])
    generator = random.Random(0)
    for _ in range(kills):
        child, reading = start(path)
        # One more variant at the most, so that every kill finds a sweep at work; then any moment.
        announced = sum(
            len(os.read(reading, 1)) for _ in range(len(held(path)) + generator.randrange(2))
        )
        time.sleep(generator.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        while os.read(reading, 1):
            announced += 1
        os.close(reading)
        found = {"signal": os.WTERMSIG(status), "announced": announced, "held": held(path)}
        sys.stdout.write(json.dumps(found) + "\n")
    child, reading = start(path)
    os.waitpid(child, 0)
    sys.stdout.write(json.dumps({"held": held(path), "builds": BUILDS}) + "\n")


if __name__ == "__main__":
    main()

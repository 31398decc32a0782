"""What an engine needs and gives beyond one inference at a time: throughput, and memory."""

import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import numpy as np

from hardware.contenders import Contender
from hardware.errors import RunError
from hardware.intervals import median
from hardware.runtimes.base import Timer

WINDOW_S = 0.5  # of one engine under load
WINDOWS = 6  # of each engine, in turns
FOOTPRINT_S = 300  # longest time that loading an engine may take


def measure_throughput(
    engines: Sequence[Contender],
    concurrency: int,
    *,
    seed: int | None = None,
    window_s: float = WINDOW_S,
) -> tuple[float, ...]:
    """Return the images per second of each engine, with that many inferences at a time.

    Every thread has an engine of its own. The engines take turns under load, in an order drawn by
    lot; the median window counts.

    Raises:
        HardwareError: an engine does not load, or failed while it ran.
    """
    generator = np.random.default_rng(seed)
    crews: list[list[Timer]] = []
    batches: list[int] = []
    for engine in engines:
        loaded = [engine.load() for _ in range(concurrency)]
        crews.append([one.timer(one.random_feeds(i)) for i, one in enumerate(loaded)])
        batches.append(next(iter(loaded[0].inputs.values()))[0])
        for timer in crews[-1]:
            timer(1)
    rates: list[list[float]] = [[] for _ in engines]
    for _ in range(WINDOWS):
        for index in generator.permutation(len(engines)):
            rates[index].append(_inferences_per_s(crews[index], window_s) * batches[index])
    return tuple(median(found) for found in rates)


def _inferences_per_s(crew: Sequence[Timer], window_s: float) -> float:
    """Run all timers at once; every thread counts the inferences it finished, and its own time."""
    rates = [0.0] * len(crew)
    failures: list[Exception] = []
    start = threading.Barrier(len(crew))

    def work(index: int) -> None:
        try:
            start.wait()
            begun, count = time.perf_counter(), 0
            while time.perf_counter() - begun < window_s:
                crew[index](1)
                count += 1
            rates[index] = count / (time.perf_counter() - begun)
        except RunError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(crew))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return sum(rates)


def measure_peak_bytes(engine: Contender) -> int:
    """Return the resident memory that loading and running the engine adds to a fresh process.

    Raises:
        RunError: the process failed.
    """
    settings = engine.settings
    words = [engine.runtime, settings.precision, str(settings.threads), str(engine.path)]
    command = [sys.executable, "-m", "hardware.footprint", *words]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=FOOTPRINT_S
        )
        return int(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", "") or ""
        raise RunError(
            f"The memory of {engine.path} cannot be measured: {error}. {told}"
        ) from error

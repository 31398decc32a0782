"""What an engine needs and gives beyond one inference at a time: throughput, and memory."""

import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import log
from pathlib import Path

import numpy as np

from hardware.errors import HardwareError, RunError
from hardware.gate.engines import EngineFile
from hardware.gate.sample import UNITS, WARM_UP_S
from hardware.gate.sequential_test import Comparison, SequentialTest, Verdict
from hardware.intervals import median
from hardware.runtimes import get_runtime
from hardware.runtimes.base import EngineSettings
from hardware.timing import Timer, warm_up

Values = tuple[float, ...]
"""One per engine."""

WINDOW_S = 0.5  # of one engine under load, at most
WINDOWS = 6  # units of throughput where nothing is compared
LEAST = 1e-9  # what has no logarithm counts as this
FOOTPRINT_S = 300  # longest time that loading an engine may take
FOOTPRINT_RUNS = 3
# What a process runs in which an engine's memory is measured. `-I` keeps the working folder off its
# search path, where a folder named `hardware` may lie; it gets the path of its parent instead.
FOOTPRINT = """
import os, sys
sys.path[:] = sys.argv.pop(1).split(os.pathsep)
from hardware.gate.capacity import print_peak_bytes
print_peak_bytes()
"""
ROOT = Path(__file__).resolve().parents[2]  # the folder that holds this package


def sample_rates(
    engines: Sequence[EngineFile], concurrency: int, budget_s: float, *, seed: int | None = None
) -> Iterator[Values]:
    """Yield the images per second of each engine, with that many inferences at a time.

    Every thread has an engine of its own. All are loaded anew for every unit, and then take turns
    under load; both orders are drawn by lot.

    Raises:
        HardwareError: an engine does not load, or failed while it ran.
    """
    generator = np.random.default_rng(seed)
    window_s = min(WINDOW_S, budget_s / (UNITS * len(engines)))
    end_s = time.monotonic() + budget_s
    while True:
        loaded = {i: _loaded(engines[i], concurrency) for i in generator.permutation(len(engines))}
        rates = {}
        for index in generator.permutation(len(engines)):
            timers, batch = loaded[index]
            rates[index] = inferences_per_s(timers, window_s) * batch
        yield tuple(rates[index] for index in range(len(engines)))
        del loaded, timers
        if time.monotonic() > end_s:
            return


def sample_peaks(
    engines: Sequence[EngineFile], budget_s: float, *, seed: int | None = None
) -> Iterator[Values]:
    """Yield the bytes that loading and running each engine adds to a process, a new one each time.

    Raises:
        RunError: a process failed.
    """
    generator = np.random.default_rng(seed)
    end_s = time.monotonic() + budget_s
    while True:
        peaks = {i: measure_peak_bytes(engines[i]) for i in generator.permutation(len(engines))}
        yield tuple(float(peaks[index]) for index in range(len(engines)))
        if time.monotonic() > end_s:
            return


def compare_until_sure(
    units: Iterable[Values],
    tests: Sequence[SequentialTest],
    enough: int,
    show: Callable[[Sequence[Comparison]], None] = lambda found: None,
) -> tuple[Values, tuple[Comparison, ...]]:
    """Return the median of each engine, and what the tests of the candidates come to.

    Args:
        units: one value per engine; the first engine is the baseline where there are tests.
        tests: one per candidate; none where nothing is to be compared.
        enough: units to take where there are no tests; with tests, until all are sure.
        show: gets what is known after every unit.
    """
    taken: list[Values] = []
    for unit in units:
        taken.append(unit)
        for test, value in zip(tests, unit[1:], strict=bool(tests)):
            # Of throughput more is better: the time per image is compared.
            shares = (unit[0], value) if test.limit.metric == "throughput" else (value, unit[0])
            test.add(log(max(shares[0], LEAST) / max(shares[1], LEAST)), len(taken))
        found = tuple(test.comparison() for test in tests)
        show(found)
        sure = {comparison.verdict for comparison in found}
        if Verdict.INCONCLUSIVE not in sure and (tests or len(taken) >= enough):
            break
    medians = tuple(median([unit[index] for unit in taken]) for index in range(len(taken[0])))
    return medians, tuple(test.comparison() for test in tests)


def _loaded(engine: EngineFile, count: int) -> tuple[list[Timer], int]:
    """Return warm timers of an engine that is loaded so many times, and its batch size."""
    loaded = [engine.load() for _ in range(count)]
    timers = [one.timer(one.random_feeds(index)) for index, one in enumerate(loaded)]
    for timer in timers:
        warm_up(timer, WARM_UP_S)
    return timers, next(iter(loaded[0].inputs.values()))[0]


def inferences_per_s(timers: Sequence[Timer], window_s: float) -> float:
    """Run all timers at once; every thread counts the inferences it finished, and its own time.

    Raises:
        HardwareError: an inference failed. A thread that died is no slow one: there is no rate.
    """
    rates = [0.0] * len(timers)
    failures: list[BaseException] = []
    start = threading.Barrier(len(timers))

    def work(index: int) -> None:
        try:
            start.wait()
            begun, count = time.perf_counter(), 0
            while time.perf_counter() - begun < window_s:
                timers[index](1)
                count += 1
            rates[index] = count / (time.perf_counter() - begun)
        except BaseException as error:  # whatever it is, the main thread must hear of it
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(timers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in failures:
        if isinstance(error, HardwareError):
            raise error
        raise RunError(
            f"Throughput cannot be measured: one of {len(timers)} threads died of "
            f"{type(error).__name__}: {error}. Try a lower --concurrency."
        ) from error
    return sum(rates)


def measure_peak_bytes(engine: EngineFile) -> int:
    """Return the resident memory that loading and running the engine adds to a fresh process.

    Raises:
        RunError: the process failed.
    """
    settings = engine.settings
    search = os.pathsep.join([str(ROOT), *sys.path])
    words = [engine.runtime, settings.precision, str(settings.threads), str(engine.path)]
    command = [sys.executable, "-I", "-c", FOOTPRINT, search, *words]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=FOOTPRINT_S
        )
        return int(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", None) or error).strip().splitlines()
        raise RunError(
            f"The memory of {engine.path} cannot be measured: {said[-1] if said else error}"
        ) from error


def print_peak_bytes() -> None:
    """Read runtime, precision, threads and path from the command line; write bytes to stdout."""
    name, precision, threads, path = sys.argv[1:]
    runtime = get_runtime(name)
    runtime.version()  # imports the vendor's package, which every process pays once
    before = _peak_bytes()
    engine = runtime.load(Path(path), EngineSettings(precision=precision, threads=int(threads)))
    feeds = engine.random_feeds()
    for _ in range(FOOTPRINT_RUNS):
        engine.run(feeds)
    sys.stdout.write(f"{_peak_bytes() - before}\n")


def _peak_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss would start at the memory of the process that started this one.
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

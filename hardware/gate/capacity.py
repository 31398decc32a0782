"""What an engine needs and gives beyond one inference at a time: throughput, and memory."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import log

import numpy as np

from hardware.errors import RunError
from hardware.gate.engines import Contender
from hardware.gate.sample import UNITS
from hardware.gate.sequential_test import Comparison, SequentialTest, Verdict
from hardware.intervals import median
from hardware.timing import Timer

Values = tuple[float, ...]
"""One per engine."""

WINDOW_S = 0.5  # of one engine under load, at most
WINDOWS = 6  # units of throughput where nothing is compared
LEAST = 1e-9  # what has no logarithm counts as this
FOOTPRINT_S = 300  # longest time that loading an engine may take


def sample_rates(
    engines: Sequence[Contender], concurrency: int, budget_s: float, *, seed: int | None = None
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
        crews = {i: _crew(engines[i], concurrency) for i in generator.permutation(len(engines))}
        rates = {}
        for index in generator.permutation(len(engines)):
            timers, batch = crews[index]
            rates[index] = _inferences_per_s(timers, window_s) * batch
        yield tuple(rates[index] for index in range(len(engines)))
        del crews
        if time.monotonic() > end_s:
            return


def sample_peaks(
    engines: Sequence[Contender], budget_s: float, *, seed: int | None = None
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


def settle(
    units: Iterable[Values],
    tests: Sequence[SequentialTest],
    enough: int,
    tell: Callable[[Sequence[Comparison]], None] = lambda found: None,
) -> tuple[Values, tuple[Comparison, ...]]:
    """Return the median of each engine, and what the tests of the candidates come to.

    Args:
        units: one value per engine; the first engine is the baseline where there are tests.
        tests: one per candidate; none where nothing is to be compared.
        enough: units to take where there are no tests; with tests, until all are sure.
        tell: is told what is known after every unit.
    """
    taken: list[Values] = []
    for unit in units:
        taken.append(unit)
        for test, value in zip(tests, unit[1:], strict=bool(tests)):
            # Of throughput more is better: the time per image is compared.
            shares = (unit[0], value) if test.limit.metric == "throughput" else (value, unit[0])
            test.add(log(max(shares[0], LEAST) / max(shares[1], LEAST)), len(taken))
        found = tuple(test.comparison() for test in tests)
        tell(found)
        sure = {comparison.verdict for comparison in found}
        if Verdict.INCONCLUSIVE not in sure and (tests or len(taken) >= enough):
            break
    medians = tuple(median([unit[index] for unit in taken]) for index in range(len(taken[0])))
    return medians, tuple(test.comparison() for test in tests)


def _crew(engine: Contender, size: int) -> tuple[list[Timer], int]:
    """Return warm timers of so many engines, and their batch size."""
    loaded = [engine.load() for _ in range(size)]
    timers = [one.timer(one.random_feeds(index)) for index, one in enumerate(loaded)]
    for timer in timers:
        timer(1)
    return timers, next(iter(loaded[0].inputs.values()))[0]


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
    command = [sys.executable, "-m", "hardware.gate.footprint", *words]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=FOOTPRINT_S
        )
        return int(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        told = str(getattr(error, "stderr", None) or error).strip().splitlines()
        raise RunError(
            f"The memory of {engine.path} cannot be measured: {told[-1] if told else error}"
        ) from error

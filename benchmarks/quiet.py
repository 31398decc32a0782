"""Say whether others leave this machine's memory alone.

    python -m benchmarks.quiet --seconds 120

Virtual machines share caches and memory with neighbours that no counter shows. Where those are
busy, a full network may take 2 % longer and a narrowed one 9 %, for minutes. How long it takes to
read a block that is larger than a core's own caches tells: on two virtual cores of an AMD EPYC 43
to 45 picoseconds per byte when quiet, 50 to 60 when not. This command says what is usual on a
machine; a benchmark that is given a limit between the quiet value and the usual one measures in
quiet moments only.
"""

import argparse
import time

import numpy as np

BLOCK_BYTES = 24 * 2**20
READS = 9
READINGS_IN_A_ROW = 5  # that must be quiet before something long begins
PAUSE_S = 0.5


class SharedMemory:
    """The speed of the memory that several virtual machines share, read again and again."""

    def __init__(self, limit_ps: float | None = None) -> None:
        """Start to watch.

        Args:
            limit_ps: quiet is where a byte takes at most so many picoseconds; None: always.
        """
        self.limit_ps = limit_ps
        self.waited_s = 0.0
        self._block = np.ones(BLOCK_BYTES // 4, dtype=np.float32)

    def ps_per_byte(self) -> float:
        """Return how long reading a byte takes now: the median of reads of about 10 ms in all."""
        times = []
        for _ in range(READS):
            start = time.perf_counter()
            self._block.sum()
            times.append(time.perf_counter() - start)
        return float(np.median(times)) / self._block.nbytes * 1e12

    def is_quiet(self) -> bool:
        """Tell whether others leave the memory alone now."""
        return self.limit_ps is None or self.ps_per_byte() <= self.limit_ps

    def wait(self, at_most_s: float, readings: int = 1) -> None:
        """Wait until it is quiet for so many readings in a row, or the time is over."""
        start, quiet = time.monotonic(), 0
        while self.limit_ps is not None and time.monotonic() - start < at_most_s:
            quiet = quiet + 1 if self.is_quiet() else 0
            if quiet >= readings:
                break
            time.sleep(PAUSE_S)
        self.waited_s += time.monotonic() - start


def main() -> None:
    """Say what is usual on this machine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    seconds = parser.parse_args().seconds
    memory, readings, start = SharedMemory(), [], time.monotonic()
    while (passed := time.monotonic() - start) < seconds:
        readings.append(memory.ps_per_byte())
        print(f"{passed:6.1f} s  {readings[-1]:6.1f} ps/byte", flush=True)
        time.sleep(PAUSE_S)
    best, usual, worst = np.quantile(readings, (0.1, 0.5, 0.9))
    print(f"best tenth {best:.1f}, median {usual:.1f}, worst tenth {worst:.1f} ps/byte")


if __name__ == "__main__":
    main()

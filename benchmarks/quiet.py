"""Say whether others leave this machine's memory alone.

    python -m benchmarks.quiet --seconds 120

Virtual machines share caches and memory with neighbours that no counter shows. Where those are
busy, a full network may take 2 % longer and a narrowed one 9 %, for minutes. How long it takes to
read a block that is larger than a core's own caches tells: on two virtual cores of an AMD EPYC 43
to 45 picoseconds per byte when quiet, 50 to 60 when not. Look before anything that measures time.
"""

import argparse
import time

import numpy as np
import numpy.typing as npt

BLOCK_BYTES = 24 * 2**20
READS = 9
PAUSE_S = 0.5


def ps_per_byte(block: npt.NDArray[np.float32]) -> float:
    """Return how long reading a byte of the block takes now, ps: the median of some reads."""
    times = []
    for _ in range(READS):
        start = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - start)
    return float(np.median(times)) / block.nbytes * 1e12


def main() -> None:
    """Say what is usual on this machine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    seconds = parser.parse_args().seconds
    block = np.ones(BLOCK_BYTES // 4, dtype=np.float32)
    readings, start = [], time.monotonic()
    while (passed := time.monotonic() - start) < seconds:
        readings.append(ps_per_byte(block))
        print(f"{passed:6.1f} s  {readings[-1]:6.1f} ps/byte", flush=True)
        time.sleep(PAUSE_S)
    best, usual, worst = np.quantile(readings, (0.1, 0.5, 0.9))
    print(f"best tenth {best:.1f}, median {usual:.1f}, worst tenth {worst:.1f} ps/byte")


if __name__ == "__main__":
    main()

"""Run as a process of its own: load an engine, run it, and tell the memory that this added."""

import resource
import sys
from pathlib import Path

from hardware.runtimes import get_runtime
from hardware.runtimes.base import EngineSettings

RUNS = 3


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss would start at the memory of the process that started this one.
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    """Read runtime, precision, threads and path from the command line; write bytes to stdout."""
    name, precision, threads, path = sys.argv[1:]
    runtime = get_runtime(name)
    runtime.version()  # imports the vendor's package, which every process pays once
    before = peak_bytes()
    engine = runtime.load(Path(path), EngineSettings(precision=precision, threads=int(threads)))
    feeds = engine.random_feeds()
    for _ in range(RUNS):
        engine.run(feeds)
    sys.stdout.write(f"{peak_bytes() - before}\n")


if __name__ == "__main__":
    main()

"""A busy neighbour: a process that keeps one core busy beside what is measured."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# The process ends by itself when the one that started it is gone, however that was killed.
SPIN = """
import os, sys
while os.getppid() == int(sys.argv[1]):
    for _ in range(100_000):
        pass
"""


@contextmanager
def neighbour() -> Iterator[subprocess.Popen[bytes]]:
    """Keep one core busy for as long as the block runs; yield the process that does so."""
    process = subprocess.Popen([sys.executable, "-c", SPIN, str(os.getpid())])
    try:
        yield process
    finally:
        process.kill()
        process.wait()

"""Another process that holds a lock."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

HOLDER = """
import os, sys
from pathlib import Path
from hardware.lock import file_lock, machine_lock
what, depth = sys.argv[1], int(sys.argv[2])
def hold(left):
    if not left:
        print("held", flush=True)
        sys.stdin.readline()
        return
    with machine_lock("holding it") if what == "machine" else file_lock(Path(what), "holding it"):
        hold(left - 1)
hold(depth)
print("free", flush=True)
sys.stdin.readline()
"""


@contextmanager
def holder(what: str, depth: int = 1) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a lock until it is told to go on."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, what, str(depth)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()

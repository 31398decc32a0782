"""Run one piece of work in a process of its own, within limits of time and memory."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

POLL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a process ended."""

    status: str  # "ok" | "failed" | "timeout" | "memory"
    last_line: str  # of what it printed: its result, or of its errors
    seconds: float  # of processor time


def run_module(
    module: str, arguments: Sequence[str], *, timeout_s: float, memory_gib: float
) -> Outcome:
    """Run `python -m module`; a process that exceeds a limit is killed, with its children.

    Its time is processor time and time asleep, so that other work on the machine, or a pause of
    everything by SIGSTOP, is not held against it.
    """
    asleep_s = busy_s = 0.0
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], stdout=printed, stderr=errors
        )
        status = "ok"
        try:
            while process.poll() is None:
                family = _family(process.pid)
                busy_s = max(busy_s, _busy_s(family))
                asleep_s += POLL_S * _is_asleep(process.pid)
                if busy_s + asleep_s > timeout_s:
                    status = "timeout"
                    break
                if _resident_bytes(family) > memory_gib * 2**30:
                    status = "memory"
                    break
                time.sleep(POLL_S)
        finally:
            _end(process)
        if status == "ok" and process.returncode != 0:
            status = "failed"
        stream = printed if status == "ok" else errors
        stream.seek(0)
        lines = [line for line in stream.read().splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if status == "failed" and not last:
        last = f"ended with code {process.returncode}"  # a signal, as a rule: no message
    return Outcome(status=status, last_line=last, seconds=busy_s)


def _family(pid: int) -> list[psutil.Process]:
    """Return a process and its children; nothing where it is gone."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return []


def _busy_s(family: Sequence[psutil.Process]) -> float:
    """Return the processor time that processes have used; 0 where one is gone."""
    try:
        times = [process.cpu_times() for process in family]
    except psutil.Error:
        return 0.0
    return sum(t.user + t.system for t in times)


def _is_asleep(pid: int) -> bool:
    """Return whether a process waits for something other than a processor."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_SLEEPING
    except psutil.Error:
        return False


def _resident_bytes(family: Sequence[psutil.Process]) -> int:
    """Return the memory of processes; 0 where one is gone."""
    try:
        return sum(process.memory_info().rss for process in family)
    except psutil.Error:
        return 0


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its children, and wait for it."""
    for child in _family(process.pid)[1:]:
        child.kill()
    process.kill()
    process.wait()

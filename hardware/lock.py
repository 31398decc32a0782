"""Locks between processes: one that measures per machine, and one that writes per file or folder.

The system frees a lock when its holder ends, however it ends. Within one process a lock that is
held may be taken again. Whoever takes several takes those of files first and the machine's last, so
that no two processes wait for one another.
"""

import fcntl
import hashlib
import logging
import os
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from hardware.errors import BusyError, StorageError

log = logging.getLogger(__name__)

POLL_S = 0.2  # between two looks at a lock that another process holds


@dataclass(slots=True)
class _Held:
    """A lock of this process, and how many times it has been taken and not given back."""

    handle: int
    times: int = 1


_held: dict[Path, _Held] = {}
_guard = threading.Lock()


@contextmanager
def machine_lock(purpose: str, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the right to measure on this machine: two that measure at once measure each other.

    Args:
        purpose: what is measured, for people: "measuring the table profiles/cpu/ov.json".
        wait_s: how long to wait for another process to end; `inf`: as long as it takes.

    Raises:
        BusyError: another process measures; the message says which one, what, and since when.
        StorageError: the lock's file cannot be opened.
    """
    busy = (
        "Another process measures on this machine: {holder}. Two at once would measure each other: "
        "wait until it has ended."
    )
    with _hold(machine_lock_path(), purpose, wait_s, busy):
        yield


@contextmanager
def file_lock(path: Path, purpose: str, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the right to change a file or a folder, whether it is there yet or not.

    Args:
        path: of the file or folder; the same one by whatever name counts as the same.
        purpose: what is done with it, for people: "compressing into it".
        wait_s: how long to wait for another process to give it back; `inf`: as long as it takes.

    Raises:
        BusyError: another process holds it; the message says which one, why, and since when.
        StorageError: the lock's file cannot be opened.
    """
    busy = (
        f"Another process uses {path}: {{holder}}. What both write would get lost: wait until it "
        "has ended, or choose another place."
    )
    with _hold(file_lock_path(path), purpose, wait_s, busy):
        yield


def machine_lock_path() -> Path:
    """Return where the machine's lock lies: one place for all users."""
    return Path(tempfile.gettempdir()) / "espalier-measuring.lock"


def file_lock_path(path: Path) -> Path:
    """Return where the lock of a file or folder lies.

    It does not lie beside what it locks: folders of results and of tables stay free of locks, and
    the folder around an output folder need not be writable.
    """
    digest = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"espalier-file-{digest}.lock"


@contextmanager
def _hold(place: Path, purpose: str, wait_s: float, busy: str) -> Iterator[None]:
    """Hold the lock that lies at a place; `busy` is the error's text, with `{holder}` in it."""
    end_s, has_told = time.monotonic() + wait_s, False
    while (holder := _take(place, purpose)) is not None:
        if time.monotonic() >= end_s:
            raise BusyError(busy.format(holder=holder))
        if not has_told:
            log.warning("waiting for another process: %s", holder)
            has_told = True
        time.sleep(POLL_S)
    try:
        yield
    finally:
        _give_back(place)


def _take(place: Path, purpose: str) -> str | None:
    """Take a lock and return None, or say which other process holds it."""
    with _guard:
        if (held := _held.get(place)) is not None:
            held.times += 1
            return None
        handle = _open(place)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 4096, 0).decode(errors="replace").strip()
            os.close(handle)
            return holder or "a process that did not say what it does"
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{_described(purpose)}\n".encode(), 0)
        _held[place] = _Held(handle)
        return None


def _give_back(place: Path) -> None:
    """Give a lock back as often as it was taken; the last time frees it."""
    with _guard:
        held = _held.get(place)
        if held is None:  # a fork of the holder, which never had the lock
            return
        held.times -= 1
        if held.times == 0:
            del _held[place]
            os.ftruncate(held.handle, 0)
            os.close(held.handle)


def _described(purpose: str) -> str:
    """Return who this process is and what it does since when, in one line."""
    since = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    said = f"process {os.getpid()}, {purpose}, since {since} ({shlex.join(sys.argv)})"
    return " ".join(said.split())[:2000]


def _forget() -> None:
    """Let go of the holder's files in a fork, so that the lock ends with the holder alone."""
    global _guard
    _guard = threading.Lock()  # another thread may have held it at the moment of the fork
    for held in _held.values():
        os.close(held.handle)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def _open(path: Path) -> int:
    """Open the lock's file, making it writable for every user where it is new."""
    try:
        # Without O_CREAT first: in a sticky folder systems refuse it for another user's file.
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StorageError(f"Cannot open the lock {path}: {error.strerror}.") from error
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise StorageError(f"Cannot create the lock {path}: {error.strerror}.") from error
    if os.fstat(handle).st_uid == os.getuid():
        os.fchmod(handle, 0o666)
    return handle

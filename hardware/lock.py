"""One bench at a time: two on one machine would measure each other."""

import fcntl
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hardware.errors import BusyError, StorageError


def default_lock() -> Path:
    """Return where the machine's lock lies: one place for all users."""
    return Path(tempfile.gettempdir()) / "espalier-bench.lock"


@contextmanager
def machine_lock(path: Path) -> Iterator[None]:
    """Hold the machine's lock; the system releases it when the process ends, however it ends.

    Raises:
        BusyError: another process holds it; the message says which, and what it runs.
        StorageError: the file cannot be opened.
    """
    handle = _open(path)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(handle, 4096, 0).decode(errors="replace").strip()
            raise BusyError(
                f"Another bench runs on this machine: {holder or 'a process that did not say'}. "
                "Two at once would measure each other: wait until it has ended."
            ) from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"pid {os.getpid()}: {shlex.join(sys.argv)}\n".encode(), 0)
        yield
        os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def _open(path: Path) -> int:
    """Open the lock file, making it writable for every user where it is new."""
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

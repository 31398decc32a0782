"""The locks, between real processes: who is refused, who waits, and what a death frees."""

import os
import signal
import subprocess
import sys

import pytest

from hardware.errors import BusyError, StorageError
from hardware.lock import file_lock, file_lock_path, machine_lock, machine_lock_path
from tests.hardware.holder import holder


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "free\n"


def test_a_second_process_that_measures_is_refused_and_told_who_holds_the_machine():
    with (
        holder("machine") as other,
        pytest.raises(
            BusyError,
            match=rf"process {other.pid}, holding it, since 20\d\d-.* UTC .*wait until it has end",
        ),
        machine_lock("measuring as well"),
    ):
        pass


def test_a_second_process_that_changes_a_file_is_refused_and_told_who_holds_it(tmp_path):
    table = tmp_path / "table.json"

    with (
        holder(str(table)) as other,
        pytest.raises(BusyError, match=rf"uses .*table\.json: process {other.pid}, holding it, "),
        file_lock(table, "writing it"),
    ):
        pass


def test_files_are_locked_one_by_one_and_not_with_the_machine(tmp_path):
    with (
        holder(str(tmp_path / "one")),
        file_lock(tmp_path / "another", "writing it"),
        machine_lock("measuring"),
    ):
        pass


def test_a_file_is_the_same_by_whatever_name(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")

    with (
        holder(str(tmp_path / "folder" / "out")),
        pytest.raises(BusyError),
        file_lock(tmp_path / "link" / ".." / "folder" / "out", "writing it"),
    ):
        pass


def test_a_process_takes_a_lock_again_and_frees_it_with_the_last_one(tmp_path):
    with holder("machine", depth=3) as other:
        with pytest.raises(BusyError), machine_lock("measuring"):
            pass
        go_on(other)
        with machine_lock("measuring"), machine_lock("one stage of it"):
            pass


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_death_of_the_holder_frees_the_lock(how):
    with holder("machine") as other:
        other.send_signal(how)
        other.wait()
        with machine_lock("measuring"):
            pass


def test_whoever_waits_gets_the_lock_when_it_is_free():
    code = "from hardware.lock import machine_lock\nwith machine_lock('waiting', wait_s=60): pass"
    with holder("machine") as other:
        waiter = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        try:
            assert waiter.stderr is not None
            # Nothing configures logging there: warnings go to stderr.
            assert f"process {other.pid}, holding it" in waiter.stderr.readline()
            assert waiter.poll() is None
            go_on(other)
            _, told = waiter.communicate(timeout=60)
        finally:
            waiter.kill()

    assert waiter.returncode == 0, told


def test_whoever_waits_in_vain_is_told():
    with (
        holder("machine"),
        pytest.raises(BusyError, match="holding it"),
        machine_lock("measuring", wait_s=0.01),
    ):
        pass


FORKING = """
import os, signal, sys
from hardware.lock import machine_lock
with machine_lock("forking"):
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.close(1)
        os.read(reading, 1)  # outlives the holder
        os._exit(0)
    print(child, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_fork_of_the_holder_does_not_hold_the_lock_beyond_its_death():
    done = subprocess.run([sys.executable, "-c", FORKING], stdout=subprocess.PIPE, check=False)
    child = int(done.stdout)
    try:
        with machine_lock("measuring"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_lock_that_is_given_back_names_nobody(tmp_path):
    with machine_lock("measuring"):
        assert f"process {os.getpid()}, measuring, since" in machine_lock_path().read_text()
    with file_lock(tmp_path / "out", "writing"):
        assert "writing" in file_lock_path(tmp_path / "out").read_text()

    assert machine_lock_path().read_text() == file_lock_path(tmp_path / "out").read_text() == ""
    assert not list(tmp_path.iterdir())  # what is locked stays free of locks


def test_a_lock_that_cannot_be_created_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("hardware.lock.machine_lock_path", lambda: tmp_path / "none" / "lock")

    with pytest.raises(StorageError, match="Cannot create the lock"), machine_lock("measuring"):
        pass


def test_an_error_inside_frees_the_lock():
    with pytest.raises(KeyError), machine_lock("measuring"):
        raise KeyError
    assert machine_lock_path().read_text() == ""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from hardware import device
from hardware.device import Device, conditions, differences, foreign_cpu_s, this_device
from hardware.records import load_record, save_record

HERE = Device(
    name="Bench",
    processor="Fast CPU (model 1)",
    architecture="x86_64",
    cores=4,
    threads=8,
    memory_bytes=8 << 30,
    system="Linux 6.1",
    features=("avx2", "fma"),
)


def test_the_device_tells_what_the_system_tells():
    found = this_device()

    assert found.architecture == platform.machine()
    assert found.threads == os.cpu_count()
    assert 1 <= found.cores <= found.threads
    assert found.memory_bytes == psutil.virtual_memory().total
    assert found.name and found.processor


def test_the_fingerprint_is_the_same_in_another_process():
    code = "from hardware.device import this_device; print(this_device().fingerprint)"
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert other.stdout.strip() == this_device().fingerprint


@pytest.mark.parametrize(
    "change", [{"name": "Renamed"}, {"system": "Linux 6.9"}, {"memory_bytes": 4 << 30}]
)
def test_what_does_not_decide_speed_leaves_the_fingerprint(change):
    other = HERE.model_copy(update=change)

    assert other.fingerprint == HERE.fingerprint
    assert differences(HERE, other) == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"processor": "Slow CPU"}, "processor: Fast CPU (model 1) against Slow CPU"),
        ({"cores": 2}, "cores: 4 against 2"),
        ({"threads": 4}, "threads: 8 against 4"),
        ({"architecture": "aarch64"}, "architecture: x86_64 against aarch64"),
        ({"features": ("fma",)}, "only the first has avx2"),
        ({"features": ("amx_bf16", "avx2", "fma")}, "only the second has amx_bf16"),
    ],
)
def test_what_decides_speed_changes_the_fingerprint_and_is_named(change, words):
    other = HERE.model_copy(update=change)

    assert other.fingerprint != HERE.fingerprint
    assert differences(HERE, other) == (words,)


def test_devices_of_one_name_keep_folders_apart():
    other = HERE.model_copy(update={"cores": 2})

    assert HERE.slug.startswith("bench-") and other.slug.startswith("bench-")
    assert HERE.slug != other.slug


def test_a_device_survives_save_and_load(tmp_path):
    save_record(this_device(), tmp_path / "device.json")

    assert load_record(Device, tmp_path / "device.json") == this_device()


def test_conditions_are_words_and_name_the_load():
    found = conditions()

    assert all(isinstance(value, str) and value for value in found.values())
    assert float(found["load"]) >= 0


def test_conditions_that_the_system_hides_are_absent(monkeypatch):
    def hidden(*_: object, **__: object) -> None:
        raise PermissionError("sandboxed")

    for name in ("cpu_freq", "sensors_temperatures", "cpu_times"):
        monkeypatch.setattr(device.psutil, name, hidden)
    monkeypatch.setattr(device.os, "getloadavg", hidden)
    monkeypatch.setattr(device.Path, "read_text", hidden)

    assert set(conditions()) <= {"usable threads"}
    assert foreign_cpu_s() == 0.0


def test_the_processor_time_of_others_leaves_out_our_own_and_idling(monkeypatch):
    times = SimpleNamespace(user=10.0, nice=1.0, system=4.0, idle=90.0, iowait=5.0, steal=2.0)
    monkeypatch.setattr(device.psutil, "cpu_times", lambda: times)
    monkeypatch.setattr(device.time, "process_time", lambda: 3.0)

    assert foreign_cpu_s() == 10 + 1 + 4 + 2 - 3


def test_a_busy_neighbour_shows_in_the_processor_time_of_others():
    spin = "import time\nwhile time.process_time() < 0.4: pass"
    before = foreign_cpu_s()

    subprocess.run([sys.executable, "-c", spin], check=True)

    assert foreign_cpu_s() - before > 0.3  # read in ticks of 10 ms per processor

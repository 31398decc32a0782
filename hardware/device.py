"""The device that is measured: what decides its speed, and the state it is in at the moment."""

import hashlib
import json
import os
import platform
import re
import time
from pathlib import Path

import psutil

from hardware.records import Record

# Instruction sets that the runtimes choose their kernels by (x86, then Arm).
FEATURES = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl"),
    *("avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "amx_fp16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
)


class Device(Record):
    """A machine, described by what decides how fast it runs a network."""

    name: str  # for people and for folder names; not part of the fingerprint
    processor: str  # model, with family and stepping where the system tells
    architecture: str  # "x86_64", "aarch64"
    cores: int  # physical
    threads: int  # hardware threads, all cores
    memory_bytes: int
    system: str  # operating system and its release
    features: tuple[str, ...]  # instruction sets, sorted

    @property
    def fingerprint(self) -> str:
        """Hash of what decides speed: processor, cores, threads and instruction sets.

        Load, free memory, host name and the system's release do not enter: they change while the
        device stays the same.
        """
        decides = [self.processor, self.architecture, self.cores, self.threads, self.features]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:12]

    @property
    def slug(self) -> str:
        """The name as a folder name, with enough of the fingerprint to tell two devices apart."""
        words = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return f"{words or 'device'}-{self.fingerprint[:6]}"


def this_device() -> Device:
    """Return the device that this process runs on."""
    described = _cpuinfo()
    threads = psutil.cpu_count(logical=True) or 1
    processor = _processor(described)
    flags = (described.get("flags") or described.get("Features") or "").split()
    return Device(
        name=_board() or described.get("model name") or processor,
        processor=processor,
        architecture=platform.machine(),
        cores=psutil.cpu_count(logical=False) or threads,
        threads=threads,
        memory_bytes=psutil.virtual_memory().total,
        system=f"{platform.system()} {platform.release()}",
        features=tuple(sorted(set(flags) & set(FEATURES))),
    )


def differences(a: Device, b: Device) -> tuple[str, ...]:
    """Return in words how two devices differ in what decides speed; () where measurements mix."""
    found = []
    for field in ("processor", "architecture", "cores", "threads"):
        ours, theirs = getattr(a, field), getattr(b, field)
        if ours != theirs:
            found.append(f"{field}: {ours} against {theirs}")
    for first, second, side in ((a, b, "first"), (b, a, "second")):
        if extra := sorted(set(first.features) - set(second.features)):
            found.append(f"only the {side} has {', '.join(extra)}")
    return tuple(found)


def conditions() -> dict[str, str]:
    """Return the state of the device that can move a measurement; what is not told is absent.

    Keys: "governor", "frequency", "turbo", "load", "temperature", "usable threads". Containers and
    virtual machines often tell only the load.
    """
    cpu = Path("/sys/devices/system/cpu")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {
        "governor": _read(cpu / "cpu0/cpufreq/scaling_governor"),
        "frequency": _frequency(),
        "turbo": {"0": "on", "1": "off"}.get(_read(cpu / "intel_pstate/no_turbo") or "")
        or {"1": "on", "0": "off"}.get(_read(cpu / "cpufreq/boost") or ""),
        "load": _load(),
        "temperature": _temperature(),
        "usable threads": str(usable) if usable else None,
    }
    return {key: value for key, value in found.items() if value}


def foreign_cpu_s() -> float:
    """Return the processor seconds used since boot by everything but this process.

    Differences of two readings say how busy the neighbours were in between, including what the
    hypervisor took away ("steal"). The kernel counts in ticks of about 10 ms: windows shorter than
    a quarter of a second say little.  0.0 where the system does not tell.
    """
    try:
        times = psutil.cpu_times()
    except (OSError, RuntimeError, psutil.Error):  # /proc hidden by a sandbox
        return 0.0
    fields = ("user", "nice", "system", "irq", "softirq", "steal")
    busy = float(sum(getattr(times, field, 0.0) for field in fields))
    return busy - time.process_time()


def _cpuinfo() -> dict[str, str]:
    """Return the first processor's entry of /proc/cpuinfo, {} where there is none."""
    entry = (_read(Path("/proc/cpuinfo")) or "").split("\n\n")[0]
    pairs = (line.partition(":") for line in entry.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _processor(described: dict[str, str]) -> str:
    """Return the processor's model; virtual machines often hide it but for family and model."""
    name = described.get("model name") or platform.processor() or platform.machine()
    keys = ("cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU revision")
    details = [f"{key.lower()} {described[key]}" for key in keys if key in described]
    return f"{name} ({', '.join(details)})" if details else name


def _board() -> str | None:
    """Return the board's name as single-board computers tell it (Jetson, Raspberry Pi)."""
    name = _read(Path("/proc/device-tree/model"))
    return name.rstrip("\0").strip() if name else None


def _frequency() -> str | None:
    try:
        frequency = psutil.cpu_freq()
    except (OSError, RuntimeError, NotImplementedError, psutil.Error):
        return None
    return f"{frequency.current:.0f} MHz" if frequency and frequency.current else None


def _load() -> str | None:
    try:
        return f"{os.getloadavg()[0]:.2f}"
    except (OSError, AttributeError):
        return None


def _temperature() -> str | None:
    """Return the hottest sensor, °C."""
    try:
        sensors = psutil.sensors_temperatures()
    except (OSError, RuntimeError, AttributeError, psutil.Error):
        return None
    hottest = max((s.current for group in sensors.values() for s in group if s.current), default=0)
    return f"{hottest:.0f} °C" if hottest > 0 else None


def _read(path: Path) -> str | None:
    """Return a small system file's text, None where it is absent or may not be read."""
    try:
        return path.read_text(errors="replace").strip() or None
    except OSError:
        return None

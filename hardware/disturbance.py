"""What others did to the processor while something was measured: the system's counters."""

import time
from dataclasses import dataclass

import psutil

from hardware.device import foreign_cpu_s
from hardware.records import Record

# More processor than this used by others, in cores, disturbs what is measured. Shorter stretches
# say nothing: the system counts in ticks of about 10 ms.
DISTURBING_CORES = 0.25
LEAST_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """What has been counted so far, from whatever origin; only differences mean something."""

    wall_s: float = 0.0
    foreign_s: float = 0.0  # processor seconds used by others, what a hypervisor took included
    stolen_s: float = 0.0  # of these, what a hypervisor took
    interruptions: int = 0  # times that this process lost the processor against its will


class Disturbance(Record):
    """What others did while something was measured."""

    seconds: float
    foreign_cores: float  # cores that others kept busy on average, what was stolen included
    stolen_cores: float  # of these, what a hypervisor took
    interruptions: int  # times that this process lost the processor against its will

    @property
    def is_disturbed(self) -> bool:
        """Whether others were so busy that what was measured is not to be trusted."""
        return self.seconds >= LEAST_S and self.foreign_cores > DISTURBING_CORES


def read_counters() -> Counters:
    """Return the counters of this system; what it does not tell stays 0."""
    return Counters(
        wall_s=time.monotonic(),
        foreign_s=foreign_cpu_s(),
        stolen_s=_stolen_s(),
        interruptions=_interruptions(),
    )


def between(before: Counters, after: Counters) -> Disturbance:
    """Return what others did between two readings."""
    seconds = after.wall_s - before.wall_s
    return Disturbance(
        seconds=round(seconds, 3),
        foreign_cores=_per_second(after.foreign_s - before.foreign_s, seconds),
        stolen_cores=_per_second(after.stolen_s - before.stolen_s, seconds),
        interruptions=after.interruptions - before.interruptions,
    )


def _per_second(spent_s: float, seconds: float) -> float:
    return round(max(spent_s, 0.0) / seconds, 3) if seconds > 0 else 0.0


def _stolen_s() -> float:
    try:
        return float(getattr(psutil.cpu_times(), "steal", 0.0))
    except (OSError, RuntimeError, psutil.Error):  # /proc hidden by a sandbox
        return 0.0


def _interruptions() -> int:
    """Return the involuntary context switches of all threads of this process."""
    try:
        import resource
    except ImportError:  # Windows has none
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw

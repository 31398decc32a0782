"""From profiles to entries: what each layer adds to the end-to-end time of a network."""

from collections.abc import Iterable, Sequence
from statistics import median

from hardware.latency.layers import LayerKey
from hardware.records import Record

LEAST_US = 0.05  # below this a time is the clock's, not the layer's: the layer was fused away


class Entry(Record):
    """What one layer adds to the end-to-end time of a network, over all builds that executed it."""

    key: LayerKey
    median_us: float
    mad_us: float  # median absolute deviation over the builds
    builds: int  # layers of variants that executed it


def shares_us(end_to_end_us: float, times_us: Sequence[float]) -> list[float]:
    """Return what each layer adds to a network's end-to-end time; all of it is shared out.

    The profiler tells in which proportion. Its own times are no parts of the whole: it slows what
    it measures, and it measured at another moment.

    Args:
        end_to_end_us: with the profiler off.
        times_us: of each layer, profiled; 0 where a layer was fused away.
    """
    scale = end_to_end_us / sum(times_us)
    return [scale * time_us for time_us in times_us]


def entries_of(measured: Iterable[tuple[LayerKey, float]]) -> tuple[Entry, ...]:
    """Return the summary of each layer, in the order in which they first appear.

    Args:
        measured: layers and what each added to the time of a network, microseconds.
    """
    seen: dict[LayerKey, list[float]] = {}
    for key, time_us in measured:
        seen.setdefault(key, []).append(time_us)
    found = []
    for key, times_us in seen.items():
        middle = median(times_us)
        found.append(
            Entry(
                key=key,
                median_us=round(middle, 2),
                mad_us=round(median(abs(time_us - middle) for time_us in times_us), 2),
                builds=len(times_us),
            )
        )
    return tuple(found)

"""The two networks that are timed in turns with every variant: the full one, and a narrow one.

What others do to a shared device hits large networks otherwise than small ones (memory and caches
the one, the start of threads the other), so that no single ratio tells how slow the device is. How
much slower a network of any size runs is read between the two, by its time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log

from hardware.graph.channel_map import ChannelMap

NARROW = 3 / 16  # of every group's width; no share at which predictions are judged
LEAST_APART = 1.25  # times as long the full network takes, for something to lie between


@dataclass(frozen=True, slots=True, kw_only=True)
class References:
    """What both took at one moment, ms."""

    full_ms: float
    narrow_ms: float = 0.0  # 0: not timed

    @property
    def tells_sizes(self) -> bool:
        """Whether networks between the two can be told apart."""
        return self.narrow_ms > 0 and self.full_ms >= LEAST_APART * self.narrow_ms

    def slowdown(self, usual: "References", time_ms: float) -> float:
        """Return how many times as long as usual a network took at this moment.

        Between the logs of both slowdowns, linear in the log of the time; outside of the two
        networks it is that of the nearer one. The full network's alone where the narrow one was
        not timed.

        Args:
            usual: what both take usually.
            time_ms: what the network took beside these.
        """
        full = self.full_ms / usual.full_ms
        if not (self.tells_sizes and usual.tells_sizes):
            return full
        narrow = self.narrow_ms / usual.narrow_ms
        share = log(self.full_ms / time_ms) / log(self.full_ms / self.narrow_ms)
        return float(full * (narrow / full) ** min(max(share, 0.0), 1.0))


def narrow_widths(channels: ChannelMap) -> Mapping[str, int]:
    """Return the widths of the narrow network."""
    return {group.name: max(1, int(NARROW * group.width)) for group in channels.prunable}

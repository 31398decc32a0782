"""Two models, timed end to end beside each other on the same machine in the same seconds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from hardware.intervals import Interval
from hardware.runtimes.base import Engine
from hardware.timing import Latency, Protocol, Series, time_together

Progress = Callable[[int, int, str], None]

# Of both models and all their loads; the interval is usually tight long before the time is up.
LOADS = 3
PROTOCOL = Protocol(
    warmup_s=0.5, min_samples=50, max_samples=5000, max_seconds=12.0, relative_width=0.004
)
# Of a plan: enough to tell whether training for it is worth it; what is delivered is timed longer.
PLAN_PROTOCOL = replace(PROTOCOL, min_samples=15, max_seconds=4.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Both engines, timed in turn on the same machine in the same seconds."""

    baseline: Latency
    delivered: Latency

    @property
    def speedup(self) -> Interval:
        """Baseline over delivered: of the medians, and of the far ends of their intervals."""
        before, after = self.baseline, self.delivered
        return Interval(
            estimate=before.median_ms / after.median_ms,
            low=before.low_ms / after.high_ms,
            high=before.high_ms / after.low_ms,
        )


def time_engines(
    baselines: Sequence[Engine],
    delivered: Sequence[Engine],
    progress: Progress | None = None,
    protocol: Protocol = PROTOCOL,
) -> Timing:
    """Return the latency of two engines, interleaved so that what slows the device hits both alike.

    Args:
        baselines: one model, loaded once or several times: two loads of one model were seen to
            differ by some 2 % for as long as they live (OpenVINO), so several are sampled.
        delivered: likewise, as many.
        progress: told how far the sampling is.
        protocol: when to stop.

    Returns:
        The latencies over all loads of each.
    """

    def told(share: float, text: str) -> None:
        if progress is not None:
            progress(round(100 * share), 100, text)

    series = time_together(
        [engine.timer(engine.random_feeds()) for engine in (*baselines, *delivered)],
        protocol,
        progress=told,
    )
    before = _together(series[: len(baselines)])
    after = _together(series[len(baselines) :])
    return Timing(baseline=before.latency, delivered=after.latency)


def _together(series: Sequence[Series]) -> Series:
    """Return the samples of several loads of one model as one series."""
    return Series(
        samples_ms=tuple(chain.from_iterable(one.samples_ms for one in series)),
        interrupted=tuple(chain.from_iterable(one.interrupted for one in series)),
        shared=tuple(chain.from_iterable(one.shared for one in series)),
        calls=series[0].calls,
        confidence=series[0].confidence,
    )

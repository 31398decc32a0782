"""Typical times out of counters that only hold a rounded mean over everything since the start.

OpenVINO's CPU plugin cuts every duration to whole microseconds, adds it up, and gives the sum
divided by the number of inferences, cut again. Taken at its word a node reads about 1 us too short
(twice half a microsecond), the cold first inferences never leave the mean, and neither does a
single interruption by another process.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

INTERRUPTED = 1.25  # a step this many times the usual one was interrupted, ...
INTERRUPTED_US = 5.0  # ... provided that it is also longer by this


def time_per_run_us(counts: Sequence[int], averages_us: Sequence[Sequence[int]]) -> Floats:
    """Return each counter's uninterrupted time per inference, `(counters,)`.

    After `k` inferences the sum behind an average `a` lies in `[k a, k (a + 1))`. Two readings at
    `j < k` therefore bound the time per inference in between to
    `[(k a_k - j (a_j + 1)) / (k - j), (k (a_k + 1) - j a_j) / (k - j)]`. A cold start makes the
    averages sink through whole numbers at known `k`, so the bounds of many pairs differ and
    together say more than any one of them: the time is where most of them agree. Pairs with an
    interruption between them do not vote. Half a microsecond is added for the cut of every single
    duration.

    Args:
        counts: inferences since the counters started, ascending, one per reading.
        averages_us: what the counters said, `(readings, counters)`.

    Returns:
        Microseconds, at least the half.

    Raises:
        ValueError: fewer than three readings.

    Reference:
        Marzullo, "Maintaining the Time in a Distributed System", PhD thesis, Stanford, 1984, for
        the point where most intervals agree; its use on counters is ours.
    """
    k = np.asarray(counts, dtype=np.float64)
    averages = np.asarray(averages_us, dtype=np.float64)
    if k.size < 3:
        raise ValueError(f"Needs at least 3 readings of the counters; got {k.size}.")
    quiet = _quiet_stretches(k, averages)
    later, earlier = np.nonzero(k[:, None] > k[None, :])
    apart = (k[later] - k[earlier])[:, None]
    least, most = k[:, None] * averages, k[:, None] * (averages + 1)
    low = (least[later] - most[earlier]) / apart
    high = (most[later] - least[earlier]) / apart
    votes = quiet[later] == quiet[earlier]
    times = [_agreed(low[votes[:, i], i], high[votes[:, i], i]) for i in range(averages.shape[1])]
    # A counter that stays below one says only that durations are cut to nothing, mostly.
    counted = averages.max(axis=0) > 0
    return np.where(counted, np.maximum(times, 0.0), 0.0) + 0.5


def _quiet_stretches(k: Floats, averages: Floats) -> npt.NDArray[np.int64]:
    """Return the number of the quiet stretch each reading lies in, `(readings, counters)`.

    A step that took longer than usual beyond doubt, rounding considered, ends a stretch.
    """
    length = np.diff(k)[:, None]
    middle = k[:, None] * (averages + 0.5)
    usual = np.median(np.diff(middle, axis=0) / length, axis=0)
    at_least = k[1:, None] * averages[1:] - k[:-1, None] * (averages[:-1] + 1)
    interrupted = at_least > (INTERRUPTED * usual + INTERRUPTED_US) * length
    stretches: npt.NDArray[np.int64] = np.zeros(averages.shape, dtype=np.int64)
    stretches[1:] = np.cumsum(interrupted, axis=0)
    return stretches


def _agreed(low: Floats, high: Floats) -> float:
    """Return the middle of where most intervals overlap."""
    ends = np.concatenate([low, high])
    steps = np.concatenate([np.ones_like(low), -np.ones_like(high)])
    order = np.lexsort((-steps, ends))  # an interval that begins where another ends meets it
    overlap = np.cumsum(steps[order])
    best = np.flatnonzero(overlap == overlap.max())
    start = best[len(best) // 2]
    return float(ends[order[start]] + ends[order[start + 1]]) / 2

"""Typical times out of counters that only tell a rounded mean over everything since the start.

OpenVINO's CPU plugin cuts every duration to whole microseconds, adds it up, and tells the sum
divided by the number of inferences, cut again. Taken at its word a node reads about 1 us too short
(twice half a microsecond), and the cold first inferences never leave the mean.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def quiet_stretches(walls_ms: Sequence[float]) -> Integers:
    """Return the number of the quiet stretch that each inference belongs to.

    An inference that took far longer than the others (something else ran) ends a stretch: sums are
    compared within a stretch only, so that it counts for none of them.

    Args:
        walls_ms: end-to-end time of every inference, in run order.
    """
    walls = np.asarray(walls_ms, dtype=np.float64)
    usual = np.median(walls)
    spread = np.median(np.abs(walls - usual))
    return np.cumsum(walls > usual + max(5 * spread, 0.05 * usual))


def time_per_run_us(
    counts: Sequence[int], averages_us: Sequence[Sequence[int]], stretches: Integers
) -> Floats:
    """Return each counter's time per inference while things were quiet, `(counters,)`.

    After `k` inferences the sum behind an average `a` lies in `[k a, k (a + 1))`. Any two readings
    of one stretch, at `j < k`, therefore bound the time per inference in between by
    `(k a_k - j (a_j + 1)) / (k - j)` and `(k (a_k + 1) - j a_j) / (k - j)`. The tightest bounds
    over all pairs pin it down to a fraction of a microsecond, because a cold start makes the
    average sink through whole numbers at known `k`. Half a microsecond is added for the cut of
    every single duration.

    Args:
        counts: inferences since the counters started, ascending, one per reading.
        averages_us: what the counters said, `(readings, counters)`.
        stretches: the quiet stretch each reading was taken in.

    Returns:
        Microseconds, 0 where a counter never counted. Where noise makes the bounds cross, their
        middle.

    Raises:
        ValueError: no two readings lie in one stretch.
    """
    k = np.asarray(counts, dtype=np.float64)
    averages = np.asarray(averages_us, dtype=np.float64)
    later, earlier = np.nonzero(
        (k[:, None] > k[None, :]) & (stretches[:, None] == stretches[None, :])
    )
    if later.size == 0:
        raise ValueError(f"No two of {k.size} readings lie in one quiet stretch.")
    apart = (k[later] - k[earlier])[:, None]
    kl, kj = k[later][:, None], k[earlier][:, None]
    low = ((kl * averages[later] - kj * (averages[earlier] + 1)) / apart).max(axis=0)
    high = ((kl * (averages[later] + 1) - kj * averages[earlier]) / apart).min(axis=0)
    times = np.maximum((low + high) / 2, 0.0) + 0.5
    return np.where(averages.max(axis=0) > 0, times, 0.0)

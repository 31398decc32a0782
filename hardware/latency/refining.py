"""Where to look closer: widths between which the time jumps while nothing in between is measured.

A staircase is flat and then jumps, so two measured neighbours of equal time say all about what lies
between them, and two of different time say only that a stair is somewhere between. The middle of
the widest such gap halves what is not known of the stair's place.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from hardware.latency.layers import Layer
from hardware.latency.predict import costs, layer_times
from hardware.latency.table import LatencyTable

Candidates = Mapping[str, tuple[int, ...]]

# A gap is looked into where crossing it costs this share of the whole network's time.
STAIR_SHARE = 0.005


def widths_at_stairs(
    table: LatencyTable,
    layers: Sequence[Layer],
    candidates: Candidates,
    measured: Sequence[Mapping[str, int]],
) -> dict[str, int]:
    """Return per group the width to measure next; groups without an open stair are left out.

    Args:
        table: measured so far.
        layers: of the template.
        candidates: widths per group, ascending.
        measured: widths of the variants measured so far.
    """
    known = costs(table, layers, candidates)
    whole = {name: max(widths) for name, widths in candidates.items()}
    total_us = sum(layer_times(known, candidates, whole)[0].values())
    found = {}
    for name, widths in candidates.items():
        alive = [width for width in widths if width]
        touching = [cost for cost in known if name in cost.groups]
        curve = {
            width: sum(layer_times(touching, candidates, {**whole, name: width})[0].values())
            for width in alive
        }
        seen = {variant[name] for variant in measured}
        middle = _middle_of_stair(curve, seen, STAIR_SHARE * total_us)
        if middle is not None:
            found[name] = middle
    return found


def _middle_of_stair(curve: Mapping[int, float], seen: set[int], least_us: float) -> int | None:
    """Return the middle of the gap over which the time jumps most; None: nowhere by that much.

    Args:
        curve: time against width, ascending.
        seen: widths that were measured.
        least_us: what a jump must cost.
    """
    widths = list(curve)
    ends = [i for i, width in enumerate(widths) if width in seen or i in (0, len(widths) - 1)]
    best: tuple[float, int | None] = (least_us, None)
    for low, high in pairwise(ends):
        jump = curve[widths[high]] - curve[widths[low]]
        if high - low > 1 and jump > best[0]:
            best = (jump, widths[(low + high) // 2])
    return best[1]

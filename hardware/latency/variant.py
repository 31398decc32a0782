"""Build one narrowed network, time it beside two others, and harvest where its time went."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import ceil
from statistics import median

import onnx

from hardware.device import conditions
from hardware.disturbance import Disturbance, between
from hardware.graph.carve import carve, keep_first
from hardware.graph.channel_map import ChannelMap
from hardware.latency.layers import Layer, LayerKey, attribute, owners_of
from hardware.latency.references import References, narrow_widths
from hardware.latency.samples import samples_of
from hardware.latency.table import STEADY_PACE, LatencyTable, Variant, usual_pace_ms
from hardware.runtimes.base import Engine, EngineSettings, Feeds, NodeTime, Runtime
from hardware.timing import Protocol, Series, Timer, checked_ms, ratio, time_together

log = logging.getLogger(__name__)

# Of one variant: the table's precision comes from many variants, not from many samples of one.
# A sample is of several inferences where those are short: settling takes longer than they do.
PROTOCOL = Protocol(
    warmup_s=0.3,
    min_samples=10,
    max_samples=100,
    max_seconds=0.5,
    relative_width=0.03,
    min_sample_us=5000.0,
)
PROFILE_S = 0.2  # of profiling per variant
PROFILE_RUNS = (8, 50)  # fewest and most inferences profiled
# A variant whose ratio to the full network is known worse than this (relative width of its
# interval), whose nodes add up otherwise than those of the variants before it, or beside which the
# full network took longer than usual by more than `STEADY_PACE`, was disturbed and is measured
# again at once.
STEADY_WIDTH = 0.1
STEADY_ADDITIVITY = 0.05
MOST_PASSES = 2  # a neighbour that stays is waited for elsewhere
PACE_WARMUP = 2
PACE_RUNS = 3  # of the full network after a profile, to tell at what pace that was taken
LEAST_TO_EXPECT = 6  # variants before additivity is held against that of those before
# Two engines of one model differ by up to 3 % for as long as they live (where their memory lies):
# what everything is compared to is timed on several of them in turns, one of which is loaded anew
# for every variant. So many of the full network, and of the narrow one.
ANCHORS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Take:
    """One pass over a variant: its time, those of the networks beside it, and its nodes' times."""

    anchor: Series  # the full network
    narrow: Series
    series: Series
    times: tuple[NodeTime, ...]
    after_ms: float  # what the full network took right after the profile
    disturbance: Disturbance

    @property
    def relative_width(self) -> float:
        """Width of the interval of the variant's ratio to the full network, relative."""
        return ratio(self.series, self.anchor).relative_width


class Stand:
    """The full network and a narrow one, built once and kept to time every variant beside them."""

    def __init__(
        self,
        template: onnx.ModelProto,
        channels: ChannelMap,
        layers: Sequence[Layer],
        runtime: Runtime,
        settings: EngineSettings,
        protocol: Protocol = PROTOCOL,
    ) -> None:
        self.template, self.channels, self.layers = template, channels, layers
        self.runtime, self.settings, self.protocol = runtime, settings, protocol
        self.digest = digest_of(template)
        self.narrow = carve(template, channels, keep_first(channels, narrow_widths(channels)))
        self.anchors = [runtime.build(template, settings) for _ in range(ANCHORS)]
        self.narrows = [runtime.build(self.narrow, settings) for _ in range(ANCHORS)]

    def measure(
        self, widths: Mapping[str, int], table: LatencyTable, engines: int = 1, purpose: str = ""
    ) -> tuple[Variant, tuple[LayerKey, ...]]:
        """Return what was measured of a variant, and the keys that its entries refer to.

        Args:
            widths: of the variant.
            table: what was measured before, to tell what is usual.
            engines: so many are built of the variant and timed in turns.
            purpose: why it is built.

        Raises:
            BuildError, RunError: the runtime failed.
            CarveError: the template cannot be cut like this.
        """
        widths = complete_widths(self.channels, widths)
        model = carve(self.template, self.channels, keep_first(self.channels, widths))
        plain = [self.runtime.build(model, self.settings) for _ in range(engines)]
        self._renew_anchors()
        profiled = self.runtime.build(model, self.settings, profile=True)
        usual = Usual(table, self.digest)
        takes = [self._take(plain, profiled, self.protocol, seed=len(table.variants))]
        warm = replace(self.protocol, warmup_s=0.0)
        while len(takes) < MOST_PASSES and _is_disturbed(takes, usual):
            takes.append(self._take(plain, profiled, warm, seed=len(takes)))
        best, calm = min(takes, key=_disorder), _calmest(takes)
        latency, times = best.series.latency, _median_times(calm)
        beside = beside_of(best.series, best.anchor, best.narrow)
        found = attribute(times, owners_of(model, self.layers), self.layers, widths)
        variant = Variant(
            template=self.digest,
            widths=widths,
            end_to_end=latency,
            anchor_ms=beside.full_ms,
            narrow_ms=beside.narrow_ms,
            sum_us=round(sum(time.time_us for time in times), 2),
            samples=_profile_runs(latency.median_ms) * len(calm),
            entries=tuple(range(len(found))),
            times_us=tuple(round(time_us, 2) for _, time_us in found),
            purpose=purpose,
            disturbance=best.disturbance,
            conditions=conditions(),
            raw=samples_of(best.series, best.anchor, engines, len(self.anchors), best.narrow),
        )
        log.debug("%s: %.3f ms, additivity %.3f", widths, latency.median_ms, variant.additivity)
        return variant, tuple(key for key, _ in found)

    def _renew_anchors(self) -> None:
        """Load the oldest of the full network's engines anew, and of the narrow one's."""
        # Built before the old one goes, so that it does not get the same memory.
        self.anchors = [*self.anchors[1:], self.runtime.build(self.template, self.settings)]
        self.narrows = [*self.narrows[1:], self.runtime.build(self.narrow, self.settings)]

    def _take(
        self, plain: Sequence[Engine], profiled: Engine, protocol: Protocol, seed: int
    ) -> Take:
        """Time a variant once, in turns with the full network and the narrow one, then by node."""
        feeds = plain[0].random_feeds()
        before = self.runtime.counters()
        anchors = _timers(self.anchors, feeds)
        anchor, narrow, series = time_together(
            [anchors, _timers(self.narrows, feeds), _timers(plain, feeds)],
            protocol,
            seed=seed,
            foreign_s=lambda: self.runtime.counters().foreign_s,
        )
        times = profiled.node_times(feeds, _profile_runs(series.latency.median_ms))
        return Take(
            anchor=anchor,
            narrow=narrow,
            series=series,
            times=times,
            after_ms=_pace_ms(anchors[-1]),
            disturbance=between(before, self.runtime.counters()),
        )


class Usual:
    """What is usual for one template, by the variants so far; additivity not while too few."""

    def __init__(self, table: LatencyTable, digest: str) -> None:
        known = [variant for variant in table.variants if variant.template == digest]
        is_known = len(known) >= LEAST_TO_EXPECT
        self.additivity = _usual_additivity(known) if is_known else None
        self.anchor_ms = usual_pace_ms([v.anchor_ms for v in known]) if known else None

    def is_off(self, take: Take, profiles: Sequence[Take]) -> bool:
        """Tell whether times add up otherwise than usual, or the device was slower.

        Args:
            take: whose end-to-end times count.
            profiles: the takes whose profiles do.
        """
        pace_ms = max(take.anchor.latency.median_ms, min(one.after_ms for one in profiles))
        if self.anchor_ms is not None and pace_ms > (1 + STEADY_PACE) * self.anchor_ms:
            return True
        if self.additivity is None:
            return False
        sum_us = sum(time.time_us for time in _median_times(profiles))
        additivity = 1000 * take.series.latency.median_ms / sum_us
        return abs(additivity / self.additivity(sum_us) - 1) > STEADY_ADDITIVITY


def _usual_additivity(known: Sequence[Variant]) -> Callable[[float], float]:
    """Return what end-to-end time over sum is to be expected, by the sum of node times, us.

    Time outside of the nodes and the profiler's own cost per node weigh more in small variants:
    the end-to-end time is taken as linear in the sum, through the medians of the faster and the
    slower half of the variants.
    """
    pairs = sorted((v.sum_us, 1000 * v.end_to_end.median_ms) for v in known)
    halves = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
    (low_sum, low), (high_sum, high) = (
        (median(pair[0] for pair in half), median(pair[1] for pair in half)) for half in halves
    )
    if high_sum <= low_sum:
        return lambda sum_us: high / high_sum
    slope = (high - low) / (high_sum - low_sum)
    return lambda sum_us: (low + slope * (sum_us - low_sum)) / sum_us


def _is_disturbed(takes: Sequence[Take], usual: Usual) -> bool:
    """Tell whether something else ran during the best take so far, so that another is due."""
    best = min(takes, key=_disorder)
    is_steady = best.relative_width <= STEADY_WIDTH and not usual.is_off(best, _calmest(takes))
    return best.disturbance.is_crowded or not is_steady


def _disorder(take: Take) -> tuple[bool, float]:
    """Return what is least in the take to be believed: at the device's best pace."""
    return take.disturbance.is_crowded, take.anchor.latency.median_ms


def _calmest(takes: Sequence[Take]) -> Sequence[Take]:
    """Return the takes whose profiles count: beside nothing else, or all, at the best pace."""
    calm = [take for take in takes if not take.disturbance.is_crowded] or takes
    least_ms = (1 + STEADY_PACE) * min(take.after_ms for take in calm)
    return [take for take in calm if take.after_ms <= least_ms]


def beside_of(series: Series, full: Series, narrow: Series) -> References:
    """Return what the full and the narrow network took that were timed in turns with a run.

    Such that the quotients are medians over rounds, which drift hits least.
    """
    median_ms = series.latency.median_ms
    return References(
        full_ms=median_ms / ratio(series, full).estimate,
        narrow_ms=median_ms / ratio(series, narrow).estimate,
    )


def _pace_ms(timer: Timer) -> float:
    """Return what the full network takes now, alone and with warm caches."""
    timer(PACE_WARMUP)
    return median(checked_ms(timer(1)) for _ in range(PACE_RUNS))


def _median_times(takes: Sequence[Take]) -> tuple[NodeTime, ...]:
    """Return each executed node with the median of its times over several profiles."""
    by_name: dict[str, list[NodeTime]] = {}
    for time in chain.from_iterable(take.times for take in takes):
        by_name.setdefault(time.name, []).append(time)
    return tuple(
        replace(same[0], time_us=median(time.time_us for time in same)) for same in by_name.values()
    )


def _timers(engines: Sequence[Engine], feeds: Feeds) -> list[Callable[[int], float]]:
    return [engine.timer(feeds) for engine in engines]


def _profile_runs(median_ms: float) -> int:
    fewest, most = PROFILE_RUNS
    return min(max(ceil(1000 * PROFILE_S / median_ms), fewest), most)


def complete_widths(channels: ChannelMap, widths: Mapping[str, int]) -> dict[str, int]:
    """Return the width of every prunable group; those that are not named are whole."""
    return {group.name: widths.get(group.name, group.width) for group in channels.prunable}


def digest_of(template: onnx.ModelProto) -> str:
    """Return a hash of the template's structure: nodes, names and shapes, not weights."""
    state = hashlib.sha256()
    for node in template.graph.node:
        state.update(node.SerializeToString(deterministic=True))
    for tensor in template.graph.initializer:
        state.update(f"{tensor.name}:{tensor.data_type}:{list(tensor.dims)};".encode())
    for value in template.graph.input:
        state.update(value.SerializeToString(deterministic=True))
    return state.hexdigest()[:16]

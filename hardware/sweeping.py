"""Fill a latency table: carve variants, build them, time them, ask the runtime where time went.

The full network, the *anchor*, is timed in turns with every variant, so that the device's drift
can be told from the variant's speed.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, cycle
from math import ceil
from pathlib import Path
from statistics import median

import onnx

from hardware.attributing import attribute, owners_of
from hardware.carving import carve, keep_first
from hardware.channels import ChannelMap
from hardware.designing import design
from hardware.keys import Layer, LayerKey
from hardware.predicting import predict_plan_ms
from hardware.runtimes.base import Engine, EngineSettings, Feeds, NodeTime, Runtime, Timer
from hardware.tables import LatencyTable, Variant
from hardware.timing import Protocol, Series, ratio, time_together

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
Candidates = Mapping[str, tuple[int, ...]]

# Of one variant: the table's precision comes from many variants, not from many samples of one.
PROTOCOL = Protocol(
    warmup_s=0.3, min_samples=10, max_samples=100, max_seconds=0.8, relative_width=0.01
)
PROFILE_S = 0.3  # of profiling per variant
PROFILE_RUNS = (8, 50)  # fewest and most inferences profiled
# A variant whose median is known worse than this (relative width of its interval), or whose nodes
# add up otherwise than those of the variants before it, was disturbed and is measured again.
STEADY_WIDTH = 0.05
STEADY_ADDITIVITY = 0.05
MOST_PASSES = 3
LEAST_TO_EXPECT = 6  # variants before additivity is held against those before
# Two engines of one model differ by up to 3 % for as long as they live (where their memory lies):
# what everything is compared to is timed on several of them in turns, and a plan likewise.
ANCHORS, PLAN_ENGINES = 3, 2
LEAST_BUILDS, MOST_BUILDS = 14, 40
RELATED_BUILDS = 4  # where other networks have measured every kind of layer
# A sweep ends when this many last variants are predicted this well from those before them.
SETTLED, SETTLED_ERROR = 5, 0.02


def measure(
    template: onnx.ModelProto,
    channels: ChannelMap,
    layers: Sequence[Layer],
    widths: Mapping[str, int],
    runtime: Runtime,
    settings: EngineSettings,
    table: LatencyTable,
    *,
    protocol: Protocol = PROTOCOL,
) -> tuple[LatencyTable, Variant]:
    """Build one variant, time it beside the full network and layer by layer.

    Args:
        template: the full network, batch norms folded.
        channels: its channel map.
        layers: its layers.
        widths: per group; groups that are not named stay whole.
        runtime: what builds and runs.
        settings: how.
        table: where the variant is added.
        protocol: of the end-to-end timing.

    Returns:
        The table with the variant, and the variant.

    Raises:
        BuildError, RunError: the runtime failed.
        CarveError: the template cannot be cut like this.
    """
    stand = Stand(template, channels, layers, runtime, settings, protocol)
    return stand.measure(widths, table, engines=PLAN_ENGINES)


def sweep(
    template: onnx.ModelProto,
    channels: ChannelMap,
    layers: Sequence[Layer],
    candidates: Candidates,
    runtime: Runtime,
    settings: EngineSettings,
    table: LatencyTable,
    path: Path,
    builds: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure designed variants until the table predicts new ones, saving after each.

    Variants that the table holds are not built again, and keys that other networks measured are
    not sought again: a second sweep builds nothing, a related network needs few builds.

    Args:
        template: the full network, batch norms folded.
        channels: its channel map.
        layers: its layers.
        candidates: widths per group that a planner may choose.
        runtime: what builds and runs.
        settings: how.
        table: measured so far.
        path: where the table is saved after every variant.
        builds: variants to hold in the end; None: until predictions are good, at most 40.
        seed: of the design.
        progress: told (variants measured, expected, text) after each.

    Returns:
        The table.
    """
    most = builds if builds is not None else MOST_BUILDS
    digest = digest_of(template)
    stand: Stand | None = None
    shares: dict[str, float] = {}
    elsewhere = _seen_elsewhere(table, digest)
    is_related = {layer.key.kind for layer in layers} <= {key.kind for key in elsewhere}
    least = RELATED_BUILDS if is_related else LEAST_BUILDS
    plans = design(layers, candidates, channels.branches, elsewhere, shares, seed)
    for number in range(1, most + 1):
        widths = complete_widths(channels, next(plans))
        if not table.holds(digest, widths):
            if builds is None and number > least and _is_settled(table, layers, digest):
                break
            stand = stand or Stand(template, channels, layers, runtime, settings)
            table, _ = stand.measure(widths, table)
            table.save(path)
        if number == 1:
            shares.update(_shares(layers, table, digest, widths))
        if progress:
            progress(number, most, "one narrowed network built and timed")
    if progress:
        progress(most, most, f"{len(table.entries)} latencies")
    return table


class Stand:
    """The full network, built once and kept to time every variant beside it."""

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
        self.anchors = [runtime.build(template, settings) for _ in range(ANCHORS)]

    def measure(
        self, widths: Mapping[str, int], table: LatencyTable, engines: int = 1
    ) -> tuple[LatencyTable, Variant]:
        """Return the table with one more variant, and the variant; see `sweeping.measure`.

        Args:
            widths: of the variant.
            table: where it is added.
            engines: so many are built of the variant and timed in turns.
        """
        widths = complete_widths(self.channels, widths)
        model = carve(self.template, self.channels, keep_first(self.channels, widths))
        plain = [self.runtime.build(model, self.settings) for _ in range(engines)]
        profiled = self.runtime.build(model, self.settings, profile=True)
        feeds = plain[0].random_feeds()
        timers = [_in_turns(self.anchors, feeds), _in_turns(plain, feeds)]
        anchor, series = time_together(timers, self.protocol, seed=len(table.variants))
        runs = _profile_runs(series.latency.median_ms)
        passes = [profiled.node_times(feeds, runs)]
        usual = _usual_additivity(table, self.digest)
        while len(passes) < MOST_PASSES and _is_disturbed(series, passes, usual):
            # Something else ran meanwhile: keep the steadier timing, and the median of profiles.
            again = time_together(timers, self.protocol, seed=len(passes))
            if again[1].interval.relative_width < series.interval.relative_width:
                anchor, series = again
            passes.append(profiled.node_times(feeds, runs))
        latency, times = series.latency, _median_times(passes)
        found = attribute(times, owners_of(model, self.layers), self.layers, widths)
        keys = [key for key, _ in found]
        variant = Variant(
            template=self.digest,
            widths=widths,
            end_to_end=latency,
            # Such that the quotient is the median over rounds, which drift hits least.
            anchor_ms=latency.median_ms / ratio(series, anchor).estimate,
            sum_us=round(sum(time.time_us for time in times), 2),
            samples=runs * len(passes),
            entries=tuple(range(len(keys))),
            times_us=tuple(round(time_us, 2) for _, time_us in found),
        )
        log.debug("%s: %.3f ms, additivity %.3f", widths, latency.median_ms, variant.additivity)
        table = table.adding(variant, keys)
        return table, table.variants[-1]


def _profile_runs(median_ms: float) -> int:
    fewest, most = PROFILE_RUNS
    return min(max(ceil(1000 * PROFILE_S / median_ms), fewest), most)


def _in_turns(engines: Sequence[Engine], feeds: Feeds) -> Timer:
    """Return a timer that asks each engine in turn."""
    timers = cycle([engine.timer(feeds) for engine in engines])
    return lambda calls: next(timers)(calls)


def _usual_additivity(table: LatencyTable, digest: str) -> Callable[[float], float]:
    """Return what end-to-end time over sum is to be expected, by the sum of node times, us.

    Time outside of the nodes and the profiler's own cost per node weigh more in small variants:
    the end-to-end time is taken as linear in the sum, through the medians of the faster and the
    slower half of the variants. 0 while there are too few variants to expect anything.
    """
    pairs = sorted(
        (v.sum_us, 1000 * v.end_to_end.median_ms) for v in table.variants if v.template == digest
    )
    if len(pairs) < LEAST_TO_EXPECT:
        return lambda sum_us: 0.0
    halves = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
    (low_sum, low), (high_sum, high) = (
        (median(pair[0] for pair in half), median(pair[1] for pair in half)) for half in halves
    )
    if high_sum <= low_sum:
        return lambda sum_us: high / high_sum
    slope = (high - low) / (high_sum - low_sum)
    return lambda sum_us: (low + slope * (sum_us - low_sum)) / sum_us


def _is_disturbed(
    series: Series, passes: Sequence[Sequence[NodeTime]], usual: Callable[[float], float]
) -> bool:
    total_us = sum(time.time_us for time in _median_times(passes))
    expected = usual(total_us)
    off = abs(1000 * series.latency.median_ms / total_us / expected - 1) if expected else 0.0
    return series.interval.relative_width > STEADY_WIDTH or off > STEADY_ADDITIVITY


def _median_times(passes: Sequence[Sequence[NodeTime]]) -> tuple[NodeTime, ...]:
    """Return each executed node with the median of its times over several profiles."""
    by_name: dict[str, list[NodeTime]] = {}
    for time in chain.from_iterable(passes):
        by_name.setdefault(time.name, []).append(time)
    return tuple(
        replace(same[0], time_us=median(time.time_us for time in same)) for same in by_name.values()
    )


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


def _seen_elsewhere(table: LatencyTable, digest: str) -> list[LayerKey]:
    """Return what other templates executed: known before this sweep, however often resumed."""
    places = {i for v in table.variants if v.template != digest for i in v.entries}
    return [table.entries[i].key for i in sorted(places)]


def _shares(
    layers: Sequence[Layer], table: LatencyTable, digest: str, widths: Mapping[str, int]
) -> dict[str, float]:
    """Return each layer's share of a variant's time in which no layer is emptied."""
    variant = next(v for v in table.variants if v.template == digest and v.widths == widths)
    times = zip(layers, variant.times_us, strict=True)
    return {layer.name: max(time_us / variant.sum_us, 1e-4) for layer, time_us in times}


def _is_settled(table: LatencyTable, layers: Sequence[Layer], digest: str) -> bool:
    """Tell whether the last variants were predictable from those before them."""
    # The first variant is the anchor itself: what ties this template's times to the table's.
    held = [v for v in table.variants if v.template == digest][1:][-SETTLED:]
    rest = table.without(held)
    errors = [
        abs(predict_plan_ms(rest, layers, v.widths) / table.corrected_ms(v) - 1) for v in held
    ]
    return max(errors) <= SETTLED_ERROR

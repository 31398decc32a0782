"""Fill a latency table: carve variants, build them, time them, ask the runtime where time went.

The full network, the *anchor*, is timed in turns with every variant, so that the device's drift
can be told from the variant's speed.

Attribution. A runtime reports executed nodes, each with the ONNX nodes that it covers. Its time
belongs to the layer of the first convolution, Gemm or MatMul among them, else to the layer of the
first node that is known. An executed node that covers none (a layout reorder) prepares the input
of what runs next, and belongs to that layer; after the last layer, to the last.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from math import ceil
from pathlib import Path
from statistics import median

import onnx

from hardware.carving import carve, keep_first
from hardware.channels import ChannelMap
from hardware.designing import design
from hardware.errors import RunError
from hardware.keys import Layer, LayerKey
from hardware.layers import PRODUCTS
from hardware.predicting import predict_plan_ms
from hardware.runtimes.base import EngineSettings, NodeTime, Runtime
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
# add up to something else than its end-to-end time, was disturbed and is measured again.
STEADY_WIDTH = 0.05
PLAUSIBLE_ADDITIVITY = (0.93, 1.10)
MOST_PASSES = 3
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
    return stand.measure(widths, table)


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
        self.anchor = runtime.build(template, settings)

    def measure(
        self, widths: Mapping[str, int], table: LatencyTable
    ) -> tuple[LatencyTable, Variant]:
        """Return the table with one more variant, and the variant; see `sweeping.measure`."""
        widths = complete_widths(self.channels, widths)
        model = carve(self.template, self.channels, keep_first(self.channels, widths))
        engine = self.runtime.build(model, self.settings)
        profiled = self.runtime.build(model, self.settings, profile=True)
        feeds = engine.random_feeds()
        timers = [self.anchor.timer(feeds), engine.timer(feeds)]
        anchor, series = time_together(timers, self.protocol, seed=len(table.variants))
        runs = _profile_runs(series.latency.median_ms)
        passes = [profiled.node_times(feeds, runs)]
        while len(passes) < MOST_PASSES and _is_disturbed(series, passes):
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


def attribute(
    times: Sequence[NodeTime],
    owners: Mapping[str, tuple[Layer, bool]],
    layers: Sequence[Layer],
    widths: Mapping[str, int],
) -> list[tuple[LayerKey, float]]:
    """Return what was executed and how long it took, in the order of the layers.

    A layer that is emptied appears where some of its tail may still run. What runs of a layer of
    which nothing should be left counts for the layer before it.

    Args:
        times: executed nodes in run order.
        owners: per name of a node or value its layer, and whether it is the layer's anchor.
        layers: of the template.
        widths: of the variant.

    Raises:
        RunError: the runtime named no node of the model.
    """
    homes = [_home(time, owners) for time in times]
    if not any(homes):
        names = ", ".join(time.name for time in times[:5])
        raise RunError(
            f"None of the {len(times)} executed nodes ({names}, ...) could be traced to the model. "
            "The runtime renamed them all: report this with the runtime's version."
        )
    spent: dict[str, float] = {}
    following: str | None = None
    last = next(home for home in reversed(homes) if home)
    for time, home in zip(reversed(times), reversed(homes), strict=True):
        following = home or following or last
        spent[following] = spent.get(following, 0.0) + time.time_us
    found: list[tuple[LayerKey, float]] = []
    for layer in layers:
        key = layer.rest_key_at(widths) if layer.is_emptied(widths) else layer.key_at(widths)
        if key is not None:
            found.append((key, spent.get(layer.name, 0.0)))
        elif layer.name in spent and found:
            before, time_us = found.pop()
            found.append((before, time_us + spent[layer.name]))
    return found


def owners_of(model: onnx.ModelProto, layers: Sequence[Layer]) -> dict[str, tuple[Layer, bool]]:
    """Return, per name of a node or value of a model, its layer and whether it is its anchor."""
    by_node = {name: layer for layer in layers for name in layer.nodes}
    owners: dict[str, tuple[Layer, bool]] = {}
    for node in model.graph.node:
        name = node.name if node.name in by_node else node.output[0]
        if name in by_node:
            layer = by_node[name]
            anchors = name == layer.nodes[0] and layer.key.operator in PRODUCTS
            for label in (node.name, *node.output):
                owners.setdefault(label, (layer, anchors))
    return owners


def _profile_runs(median_ms: float) -> int:
    fewest, most = PROFILE_RUNS
    return min(max(ceil(1000 * PROFILE_S / median_ms), fewest), most)


def _is_disturbed(series: Series, passes: Sequence[Sequence[NodeTime]]) -> bool:
    total_us = sum(time.time_us for time in _median_times(passes))
    low, high = PLAUSIBLE_ADDITIVITY
    adds_up = low <= 1000 * series.latency.median_ms / total_us <= high
    return series.interval.relative_width > STEADY_WIDTH or not adds_up


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


def _home(time: NodeTime, owners: Mapping[str, tuple[Layer, bool]]) -> str | None:
    known = [owners[name] for name in time.nodes if name in owners]
    anchors = [layer.name for layer, is_anchor in known if is_anchor]
    return next(iter([*anchors, *(layer.name for layer, _ in known)]), None)


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

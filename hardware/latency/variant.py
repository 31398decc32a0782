"""Build one narrowed network, time it beside the full one, and ask where its time went."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil

import onnx

from hardware.disturbance import between
from hardware.errors import RunError
from hardware.graph.carve import carve, keep_first
from hardware.graph.channel_map import ChannelMap
from hardware.latency.layers import Layer, LayerKey, attribute, owners_of
from hardware.latency.table import Variant
from hardware.runtimes.base import Engine, EngineSettings, Feeds, Runtime
from hardware.timing import Protocol, ratio, time_together

log = logging.getLogger(__name__)

# Of one variant: the table's precision comes from many variants, not from many samples of one.
# A sample is of several inferences where those are short: warming the caches takes longer.
PROTOCOL = Protocol(
    warmup_s=0.2,
    min_samples=10,
    max_samples=60,
    max_seconds=0.4,
    relative_width=0.02,
    min_sample_us=5000.0,
)
PROFILE_S = 0.2  # of profiling per variant
PROFILE_RUNS = (8, 50)  # fewest and most inferences profiled
# Two engines of one model differ by up to 3 % for as long as they live (where their memory lies):
# what everything is compared with is timed on several of them in turns.
FULL_ENGINES = 3


@dataclass(frozen=True, kw_only=True)
class Template:
    """The network whose variants are measured: batch norms folded, with its channels and layers."""

    model: onnx.ModelProto
    channels: ChannelMap
    layers: Sequence[Layer]

    @cached_property
    def digest(self) -> str:
        """A hash of the template's structure; tables know networks by it."""
        return digest_of(self.model)

    def complete(self, widths: Mapping[str, int]) -> dict[str, int]:
        """Return the width of every prunable group; those that are not named are whole."""
        return {group.name: widths.get(group.name, group.width) for group in self.channels.prunable}

    def carved(self, widths: Mapping[str, int]) -> onnx.ModelProto:
        """Return the variant of these widths; raises CarveError where it cannot be cut so."""
        return carve(self.model, self.channels, keep_first(self.channels, widths))


class Rig:
    """Engines of the full network, built once and kept to time every variant beside them."""

    def __init__(
        self,
        template: Template,
        runtime: Runtime,
        settings: EngineSettings,
        protocol: Protocol = PROTOCOL,
    ) -> None:
        self.template, self.runtime, self.settings = template, runtime, settings
        self.protocol = protocol
        self.full = [runtime.build(template.model, settings) for _ in range(FULL_ENGINES)]

    def measure(
        self, widths: Mapping[str, int], *, engines: int = 1, purpose: str = "", seed: int = 0
    ) -> tuple[Variant, tuple[LayerKey, ...]]:
        """Return what was measured of a variant, and the keys that its entries refer to.

        Args:
            widths: of the variant; groups that are not named are whole.
            engines: so many are built of the variant and timed in turns.
            purpose: why it is built.
            seed: of the order in which engines take turns.

        Raises:
            BuildError, RunError: the runtime failed.
            CarveError: the template cannot be cut like this.
        """
        widths = self.template.complete(widths)
        model = self.template.carved(widths)
        plain = [self.runtime.build(model, self.settings) for _ in range(engines)]
        profiled = self.runtime.build(model, self.settings, profile=True)
        feeds = profiled.random_feeds()
        before = self.runtime.counters()
        full, series = time_together(
            [_timers(self.full, feeds), _timers(plain, feeds)],
            self.protocol,
            seed=seed,
            foreign_s=lambda: self.runtime.counters().foreign_s,
        )
        latency = series.latency
        runs = _profile_runs(latency.median_ms)
        times = profiled.node_times(feeds, runs)
        layers = self.template.layers
        found = attribute(times, owners_of(model, layers), layers, widths)
        if not any(time_us > 0 for _, time_us in found):
            raise RunError(
                f"The profiler of {self.runtime.name} says that none of {len(found)} layers took "
                "any time. Measure with another version of the runtime, or report this one."
            )
        variant = Variant(
            template=self.template.digest,
            widths=widths,
            end_to_end=latency,
            # By the median of the ratios of rounds, which what slows both alike hits least.
            full_ms=latency.median_ms / ratio(series, full).estimate,
            samples=runs,
            entries=tuple(range(len(found))),
            times_us=tuple(round(time_us, 2) for _, time_us in found),
            purpose=purpose,
            disturbance=between(before, self.runtime.counters()),
        )
        log.debug("%s: %.3f ms, additivity %.3f", widths, latency.median_ms, variant.additivity)
        return variant, tuple(key for key, _ in found)


def digest_of(template: onnx.ModelProto) -> str:
    """Return a hash of a template's structure: nodes, names and shapes, not weights."""
    state = hashlib.sha256()
    for node in template.graph.node:
        state.update(node.SerializeToString(deterministic=True))
    for tensor in template.graph.initializer:
        state.update(f"{tensor.name}:{tensor.data_type}:{list(tensor.dims)};".encode())
    for value in template.graph.input:
        state.update(value.SerializeToString(deterministic=True))
    return state.hexdigest()[:16]


def _timers(engines: Sequence[Engine], feeds: Feeds) -> list[Callable[[int], float]]:
    return [engine.timer(feeds) for engine in engines]


def _profile_runs(median_ms: float) -> int:
    fewest, most = PROFILE_RUNS
    return min(max(ceil(1000 * PROFILE_S / median_ms), fewest), most)

"""Fill a latency table: carve variants, build them, time them, ask the runtime where time went.

The full network, the *anchor*, and a narrow one are timed in turns with every variant, so that the
device's drift can be told from the variant's speed.
"""

import hashlib
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import floor
from pathlib import Path

import onnx

from hardware.graph.channel_map import ChannelMap
from hardware.latency.design import design
from hardware.latency.layers import Layer, LayerKey
from hardware.latency.refining import widths_at_stairs
from hardware.latency.table import LatencyTable, Variant
from hardware.latency.variant import PROTOCOL, Stand, complete_widths, digest_of
from hardware.runtimes.base import EngineSettings, Runtime
from hardware.timing import Protocol

__all__ = ["complete_widths", "digest_of", "measure", "sweep"]

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
Candidates = Mapping[str, tuple[int, ...]]

# Two engines of one model differ by up to 3 % for as long as they live (where their memory lies):
# a plan is timed on several of them in turns.
PLAN_ENGINES = 2
LEAST_BUILDS, MOST_BUILDS = 14, 40
# Where other networks have measured every kind of layer: at least so many, at most a share of what
# the best measured of them took.
RELATED_BUILDS, RELATED_SHARE = 4, 1 / 3
STAIR_BUILDS = 4  # more per minute, at most, where stairs lie between measured widths
# Of one minute (of several in proportion): designed variants until the first of these times, then
# those at stairs, then what was measured while the device was slower is measured again. What was
# slowed by a tenth and more, for at most as long again, with longer and longer pauses while the
# device stays slow: that slows networks unequally (variants of a MobileNetV2 of middle size by 40 %
# while the full network took 10 % longer), so that a table made meanwhile predicts 10 % wrong. Less
# can be corrected.
DESIGN_S, STAIRS_S, SLOWED_S = 46.0, 52.0, 57.0
MUCH_SLOWED, MUCH_SLOWED_S = 1.1, 60.0
PAUSES_S = (2.0, 4.0, 8.0)


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
    """Build one variant, time it beside the full and the narrow network, and layer by layer.

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
    table = table.adding(*stand.measure(widths, table, PLAN_ENGINES, purpose="plan"))
    return table, table.variants[-1]


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
    minutes: float = 1.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure designed variants for about so many minutes, saving after each.

    Then some more, at widths between which the time jumps, and once more what was measured beside
    a busy neighbour or while the device was slower than usual; for up to as long again what it was
    much slower for.
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
        builds: variants of the design to hold in the end, and no others; None: as many as the time
            allows, at least 14, at most 40 per minute; at most a third of another network's where
            it shares all kinds of layers.
        minutes: how long, above 0; the more, the better the table predicts. Earlier sweeps count:
            three minutes after one are two more.
        seed: of the design.
        progress: told (variants measured, expected, text) after each.

    Returns:
        The table.
    """
    sweeping = _Sweep(template, channels, layers, runtime, settings, table, path)
    tell = progress or _silent
    goal = sweeping.goal(candidates)
    if builds is None:
        sweeping.begin(goal, minutes)
    if builds is not None or sweeping.minutes_swept(goal) < minutes:
        sweeping.fill(candidates, builds, seed, tell)
        sweeping.measure_slowed_again(tell)
    sweeping.measure_crowded_again()
    if builds is None:
        sweeping.finish(goal)
    tell(1, 1, f"{len(sweeping.table.entries)} latencies")
    return sweeping.table


class _Sweep:
    """A table that grows, saved after every variant; the engines are built when first needed."""

    def __init__(
        self,
        template: onnx.ModelProto,
        channels: ChannelMap,
        layers: Sequence[Layer],
        runtime: Runtime,
        settings: EngineSettings,
        table: LatencyTable,
        path: Path,
    ) -> None:
        self.subject = (template, channels, layers, runtime, settings)
        self.channels, self.layers = channels, layers
        self.digest = digest_of(template)
        self.table, self.path = table, path
        self.start_s, self.minutes = time.monotonic(), 1.0
        self._stand: Stand | None = None

    @property
    def stand(self) -> Stand:
        """What measures."""
        self._stand = self._stand or Stand(*self.subject)
        return self._stand

    @property
    def measured(self) -> list[Variant]:
        """What was measured of this template."""
        return [v for v in self.table.variants if v.template == self.digest]

    @property
    def variants(self) -> list[Variant]:
        """Likewise, and not because a plan needed it."""
        return [v for v in self.measured if v.purpose != "plan"]

    def goal(self, candidates: Candidates) -> str:
        """Return what stands for a sweep of this template over these widths."""
        widths = json.dumps({name: list(candidates[name]) for name in sorted(candidates)})
        return f"{self.digest}:{hashlib.sha256(widths.encode()).hexdigest()[:8]}"

    def minutes_swept(self, goal: str) -> float:
        """Return how long sweeps of that goal were that came to their end; 0 where none did."""
        named = re.compile(re.escape(goal) + r"(?::(\d+(?:\.\d+)?))?")
        found = [match for name in self.table.swept if (match := named.fullmatch(name))]
        return max((float(match[1] or 1) for match in found), default=0.0)

    def begin(self, goal: str, minutes: float) -> None:
        """Take so many minutes, of which earlier sweeps of that goal have taken theirs."""
        self.minutes = minutes
        self.start_s -= 60 * self.minutes_swept(goal)

    def finish(self, goal: str) -> None:
        """Note in the table that the sweep came to its end, so that the next one builds nothing."""
        if self.minutes_swept(goal) < self.minutes:
            done = goal if self.minutes == 1 else f"{goal}:{self.minutes}"
            self.table = self.table.model_copy(update={"swept": (*self.table.swept, done)})
            self.table.save(self.path)

    def fill(self, candidates: Candidates, builds: int | None, seed: int, tell: Progress) -> None:
        """Measure designed variants that are not there yet, and those at stairs; see `sweep`."""
        elsewhere, others = self.seen_elsewhere(), self.builds_elsewhere()
        kinds = {key.kind for key in elsewhere}
        is_related = others >= LEAST_BUILDS and kinds >= {layer.key.kind for layer in self.layers}
        least, most = LEAST_BUILDS, max(LEAST_BUILDS, round(self.minutes * MOST_BUILDS))
        if is_related:
            least, most = RELATED_BUILDS, max(RELATED_BUILDS, floor(RELATED_SHARE * others))
        most = builds if builds is not None else most
        shares: dict[str, float] = {}
        plans = design(self.layers, candidates, self.channels.branches, elsewhere, shares, seed)
        for number in range(1, most + 1):
            widths = complete_widths(self.channels, next(plans))
            if not self.table.holds(self.digest, widths):
                if builds is None and number > least and self.seconds > DESIGN_S:
                    break
                self.add(widths)
            if number == 1:
                shares.update(self.shares(widths))
            expected = most if builds is not None else self.expected(number, least, most)
            tell(number, expected, "one narrowed network built and timed")
        if builds is None and not is_related:
            self.refine(candidates, plans)

    def add(self, widths: Mapping[str, int], purpose: str = "") -> None:
        """Measure a variant and save the table."""
        self.table = self.table.adding(*self.stand.measure(widths, self.table, purpose=purpose))
        self.table.save(self.path)

    def refine(self, candidates: Candidates, plans: Iterator[dict[str, int]]) -> None:
        """Measure widths at which stairs may lie, in networks that are otherwise designed."""
        most = round(self.minutes * STAIR_BUILDS)
        while self.seconds < STAIRS_S and self.stairs < most:
            measured = [v.widths for v in self.variants]
            at_stairs = widths_at_stairs(self.table, self.layers, candidates, measured)
            if not at_stairs:
                return
            widths = next(plans)
            alive = {name: width for name, width in at_stairs.items() if widths[name]}
            self.add(complete_widths(self.channels, {**widths, **alive}), "stair")

    def measure_crowded_again(self) -> None:
        """Measure again what was measured beside a busy neighbour, unless it is still there."""
        for variant in self.measured:
            if variant.is_crowded and self.replace(variant).is_crowded:
                log.warning(
                    "Others keep this device busy: some of the table's latencies were measured "
                    "beside them. Profile again when it is quiet; only those are measured anew."
                )
                return

    def measure_slowed_again(self, tell: Progress) -> None:
        """Measure again what was measured while the device was slower, the most slowed first."""
        slowed = sorted((v for v in self.measured if self.table.is_slowed(v)), key=self.table.drift)
        failures, until_s = 0, self.seconds + MUCH_SLOWED_S
        while slowed:
            is_much = self.table.drift(slowed[-1]) > MUCH_SLOWED
            if self.seconds > SLOWED_S and not is_much:
                return
            if failures > len(PAUSES_S) or self.seconds > until_s:
                log.warning(
                    "This device was slower than usual while some of the table's latencies were "
                    "measured, and was again; they count less. To measure all anew when it is "
                    "quiet, delete the table and profile again."
                )
                return
            if failures:
                time.sleep(PAUSES_S[failures - 1])
            again = self.replace(slowed.pop())
            failures = failures + 1 if self.table.is_slowed(again) else 0
            done = len(self.measured)
            tell(done, done + len(slowed), "measured again: the device was slower than usual")

    def replace(self, variant: Variant) -> Variant:
        """Measure a variant again; where that went better it takes the place of the old one."""
        engines = variant.raw.engines if variant.raw else 1
        again, keys = self.stand.measure(
            variant.widths, self.table, engines, purpose=variant.purpose
        )
        is_calmer = variant.is_crowded or self.table.drift(again) < self.table.drift(variant)
        if again.is_crowded or not is_calmer:
            return again
        old = next(v for v in self.table.variants if _is_same(v, variant))
        self.table = self.table.replacing(old, again, keys)
        self.table.save(self.path)
        return again

    @property
    def seconds(self) -> float:
        """How long the sweep has taken, as if it had one minute."""
        return (time.monotonic() - self.start_s) / self.minutes

    @property
    def stairs(self) -> int:
        """How many variants were measured because of stairs."""
        return sum(variant.purpose == "stair" for variant in self.variants)

    def expected(self, number: int, least: int, most: int) -> int:
        """Return how many variants the time will allow, after so many."""
        allowed = int(number * DESIGN_S / max(self.seconds, 1e-3)) + 1
        return max(number, min(max(allowed, least), most))

    def seen_elsewhere(self) -> list[LayerKey]:
        """Return what other templates executed: known before this sweep, however often resumed."""
        places = {i for v in self.table.variants if v.template != self.digest for i in v.entries}
        return [self.table.entries[i].key for i in sorted(places)]

    def builds_elsewhere(self) -> int:
        """Return how many variants were designed of the best measured other template."""
        found = Counter(v.template for v in self.table.variants if v.purpose != "plan")
        del found[self.digest]
        return max(found.values(), default=0)

    def shares(self, widths: Mapping[str, int]) -> dict[str, float]:
        """Return each layer's share of a variant's time in which no layer is emptied."""
        variant = next(v for v in self.variants if v.widths == widths)
        times = zip(self.layers, variant.times_us, strict=True)
        return {layer.name: max(time_us / variant.sum_us, 1e-4) for layer, time_us in times}


def _is_same(a: Variant, b: Variant) -> bool:
    """Tell whether two variants are one measurement, whatever table they stand in."""
    return a.model_copy(update={"entries": ()}) == b.model_copy(update={"entries": ()})


def _silent(done: int, total: int, text: str) -> None:
    """Tell nobody."""

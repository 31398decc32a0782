"""Latency tables: what was measured on one device, and nothing that was measured elsewhere.

A table keeps every *variant* of a template that was built: its widths, its end-to-end time, and
what each of its layers took. The *entries* are the summary by what was executed, so that networks
of one family share them. Times of different moments are compared through the *anchors*, the full
network and a narrow one, which are timed beside every variant: an entry is what its layer would
have taken while they took their usual times (`usual_pace_ms`).
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from statistics import median

import numpy as np

from hardware.device import Device
from hardware.disturbance import Disturbance
from hardware.errors import DeviceMismatchError, MissingLatencyError, StorageError
from hardware.latency.layers import LayerKey
from hardware.latency.references import References
from hardware.latency.samples import Samples
from hardware.records import Record, load_record, write_whole
from hardware.runtimes.base import EngineSettings, Runtime
from hardware.timing import Latency

# What slows a machine down for seconds slows small networks down more or less than large ones: a
# ResNet-56 by 23 %, its half by 37 %. So a ratio to the full network holds only at about the pace
# at which it was measured.
STEADY_PACE = 0.03


class TableKey(Record):
    """What a table is valid for. Measurements mix only where all of it is equal."""

    device: str  # the device's name, for people
    fingerprint: str  # of the device
    folder: str  # the device's name as a folder name
    runtime: str
    version: str  # of the runtime
    precision: str
    batch: int
    threads: int

    def differences(self, other: "TableKey") -> tuple[str, ...]:
        """Return one text per difference that forbids mixing, empty where there is none."""
        decides = ("fingerprint", "runtime", "version", "precision", "batch", "threads")
        found = []
        for field in decides:
            ours, theirs = getattr(self, field), getattr(other, field)
            if ours != theirs:
                name = f" ({self.device} against {other.device})" if field == "fingerprint" else ""
                found.append(f"{field} {ours} against {theirs}{name}")
        return tuple(found)


class Entry(Record):
    """What one layer takes, over all builds that executed it, corrected for drift."""

    key: LayerKey
    median_us: float
    mad_us: float  # median absolute deviation over the builds' medians
    samples: int  # inferences
    builds: int  # layers of variants that executed it


class Variant(Record):
    """One narrowed network that was built and measured.

    `entries[i]` is the index among the table's entries of what took `times_us[i]` in it, in the
    order of the template's layers, as measured (not corrected for drift).
    """

    template: str  # digest of the network's structure
    widths: Mapping[str, int]  # of every prunable group
    end_to_end: Latency  # with the profiler off
    anchor_ms: float  # what the full network took, timed in turns with this variant
    narrow_ms: float = 0.0  # likewise the narrow network; 0: not timed
    sum_us: float  # of all executed nodes, with the profiler on
    samples: int  # inferences with the profiler on
    entries: tuple[int, ...]
    times_us: tuple[float, ...]
    purpose: str = ""  # why it was built: "stair", "plan"; of the design otherwise
    disturbance: Disturbance | None = None  # what others did meanwhile
    conditions: Mapping[str, str] = {}  # of the device, as far as the system tells
    raw: Samples | None = None  # every sample of the end-to-end times

    @property
    def is_crowded(self) -> bool:
        """Whether others kept the device busy while it was measured."""
        return self.disturbance is not None and self.disturbance.is_crowded

    @property
    def beside(self) -> References:
        """What the networks took that were timed in turns with it."""
        return References(full_ms=self.anchor_ms, narrow_ms=self.narrow_ms)

    @property
    def additivity(self) -> float:
        """End-to-end time over the sum of the nodes' times: 1 where times simply add up."""
        return 1000 * self.end_to_end.median_ms / self.sum_us


class LatencyTable(Record):
    """Everything measured on one device with one runtime at one setting."""

    key: TableKey
    anchors_ms: Mapping[str, float] = {}  # per template: the full network at the table's pace
    narrows_ms: Mapping[str, float] = {}  # likewise the narrow one, where it was timed
    bundles: tuple[str, ...] = ()  # digests of the bundles that it was measured from
    swept: tuple[str, ...] = ()  # sweeps that came to their end; what they want is all there
    entries: tuple[Entry, ...] = ()
    variants: tuple[Variant, ...] = ()

    @cached_property
    def by_key(self) -> dict[LayerKey, Entry]:
        """The entries by what was executed."""
        return {entry.key: entry for entry in self.entries}

    @property
    def additivity(self) -> tuple[float, float, float]:
        """Smallest, median and largest end-to-end time over sum of node times; the audit.

        Raises:
            MissingLatencyError: nothing has been measured.
        """
        ratios = sorted(variant.additivity for variant in self.variants)
        if not ratios:
            raise MissingLatencyError("The table is empty: nothing has been measured yet.")
        return ratios[0], median(ratios), ratios[-1]

    def entry(self, key: LayerKey) -> Entry:
        """Return what was measured of one layer.

        Raises:
            MissingLatencyError: it was never executed here.
        """
        if key in self.by_key:
            return self.by_key[key]
        seen = sorted(
            (e.key.in_channels, e.key.out_channels) for e in self.entries if e.key.kind == key.kind
        )
        raise MissingLatencyError(
            f"No latency for {key.operator} {key.in_channels} -> {key.out_channels} at "
            f"{'x'.join(map(str, key.in_size))} px on {self.key.device}. Measured (in, out): "
            f"{seen or 'none'}. Measure a network that contains it: espalier profile."
        )

    def references(self, template: str) -> References:
        """Return what a template's full and narrow network take at the table's pace."""
        narrow_ms = self.narrows_ms.get(template, 0.0)
        return References(full_ms=self.anchors_ms[template], narrow_ms=narrow_ms)

    def drift(self, variant: Variant) -> float:
        """Return how much slower than usual the device was for a variant when it was measured."""
        usual = self.references(variant.template)
        return variant.beside.slowdown(usual, variant.end_to_end.median_ms)

    def is_at_pace(self, variant: Variant) -> bool:
        """Tell whether the device was about as fast as usual when a variant was measured."""
        return abs(self.drift(variant) - 1) <= STEADY_PACE

    def is_slowed(self, variant: Variant) -> bool:
        """Tell whether the device was slower than usual, so that waiting may help."""
        return self.drift(variant) > 1 + STEADY_PACE

    def corrected_ms(self, variant: Variant) -> float:
        """Return a variant's end-to-end time as it would have been at the device's usual pace."""
        return variant.end_to_end.median_ms / self.drift(variant)

    def holds(self, template: str, widths: Mapping[str, int]) -> bool:
        """Tell whether this variant has been measured."""
        return any(v.template == template and v.widths == widths for v in self.variants)

    def adding(self, variant: Variant, keys: Sequence[LayerKey]) -> "LatencyTable":
        """Return the table with one more variant.

        Args:
            variant: its `entries` are indices into `keys`.
            keys: what the variant executed.
        """
        return _table(
            self.key,
            [(v, [e.key for e in self.entries]) for v in self.variants] + [(variant, keys)],
            self.bundles,
            self.swept,
        )

    def replacing(self, old: Variant, variant: Variant, keys: Sequence[LayerKey]) -> "LatencyTable":
        """Return the table in which a variant stands in the place of another; see `adding`."""
        known = [entry.key for entry in self.entries]
        parts = [(variant, keys) if v == old else (v, known) for v in self.variants]
        return _table(self.key, parts, self.bundles, self.swept)

    def without(self, variants: Collection[Variant]) -> "LatencyTable":
        """Return the table as if some variants had never been measured."""
        known = [entry.key for entry in self.entries]
        parts = [(v, known) for v in self.variants if v not in variants]
        return _table(self.key, parts, self.bundles, self.swept)

    def save(self, path: Path) -> None:
        """Write the table; the file appears whole. One line per entry and per variant.

        Raises:
            StorageError: the folder cannot be written.
        """
        lists = {
            name: ",\n".join(
                json.dumps(r.model_dump(mode="json", exclude_defaults=True)) for r in records
            )
            for name, records in (("entries", self.entries), ("variants", self.variants))
        }
        head = (
            f'{{"schema": {self.SCHEMA},\n"key": {json.dumps(self.key.model_dump(mode="json"))},\n'
            f'"anchors_ms": {json.dumps(dict(self.anchors_ms))},\n'
            f'"narrows_ms": {json.dumps(dict(self.narrows_ms))},\n'
            f'"bundles": {json.dumps(self.bundles)},\n"swept": {json.dumps(self.swept)}'
        )
        body = "".join(f',\n"{name}": [\n{lines}\n]' for name, lines in lists.items())
        write_whole(path, f"{head}{body}}}\n")


def load_table(path: Path, key: TableKey | None = None) -> LatencyTable:
    """Return the table in a file.

    Args:
        path: where it lies.
        key: what it must be valid for; None takes any table.

    Raises:
        StorageError: no such file, or damaged.
        DeviceMismatchError: it was measured on another device, runtime or setting.
    """
    table = load_record(LatencyTable, path)
    known = range(len(table.entries))
    for variant in table.variants:
        if len(variant.entries) != len(variant.times_us) or set(variant.entries) - set(known):
            raise StorageError(
                f"{path} is damaged: a variant refers to entries that it does not hold. "
                "Delete it to measure anew."
            )
    if key is not None and (found := key.differences(table.key)):
        raise DeviceMismatchError(
            f"{path} was measured elsewhere: {'; '.join(found)}. Latencies do not carry over. "
            "Measure here (leave target.table out, or name a file that does not exist yet)."
        )
    return table


def merge(first: LatencyTable, second: LatencyTable) -> LatencyTable:
    """Return one table with the variants of both, those they share once.

    Raises:
        DeviceMismatchError: they were measured on different devices, runtimes or settings.
    """
    if found := first.key.differences(second.key):
        raise DeviceMismatchError(
            f"These tables cannot be merged: {'; '.join(found)}. Keep them as two files, one per "
            "device and setting."
        )
    parts: dict[str, tuple[Variant, list[LayerKey]]] = {}
    for table in (first, second):
        keys = [entry.key for entry in table.entries]
        for variant in table.variants:
            identity = variant.model_dump_json(exclude={"entries"})
            parts.setdefault(identity, (variant, keys))
    bundles, swept = (*first.bundles, *second.bundles), (*first.swept, *second.swept)
    return _table(first.key, parts.values(), bundles, swept)


def key_of(
    runtime: Runtime, settings: EngineSettings, batch: int, device: Device | None = None
) -> TableKey:
    """Return what tables measured with this runtime on its device (or the one named) hold for."""
    device = device or runtime.machine()
    return TableKey(
        device=device.name,
        fingerprint=device.fingerprint,
        folder=device.slug,
        runtime=runtime.name,
        version=runtime.version(),
        precision=settings.precision,
        batch=batch,
        threads=settings.threads,
    )


def table_path(profiles: Path, key: TableKey) -> Path:
    """Return where the table of that key lies under the folder of profiles."""
    name = f"{key.runtime}-{key.precision}-b{key.batch}-t{key.threads}.json"
    return profiles / key.folder / name


def open_table(
    profiles: Path, path: Path | None, runtime: Runtime, settings: EngineSettings, batch: int
) -> tuple[LatencyTable, Path]:
    """Return the table to use here, empty where there is none yet, and its path.

    A table under `profiles` that an older version of the runtime left is set aside (renamed after
    its version); a table named by `path` is never touched.

    Raises:
        StorageError: the file is damaged.
        DeviceMismatchError: the file was measured on another device, runtime or setting.
    """
    key = key_of(runtime, settings, batch)
    place = path or table_path(profiles, key)
    if not place.exists():
        return LatencyTable(key=key), place
    if path is None:
        table = load_table(place)
        if table.key.version != key.version and table.key.fingerprint == key.fingerprint:
            place.rename(place.with_name(f"{place.stem}-{table.key.version}.json"))
            return LatencyTable(key=key), place
    return load_table(place, key), place


def _table(
    key: TableKey,
    parts: Iterable[tuple[Variant, Sequence[LayerKey]]],
    bundles: Sequence[str] = (),
    swept: Sequence[str] = (),
) -> LatencyTable:
    """Return the table of these variants, each given with the keys its indices refer to."""
    index: dict[LayerKey, int] = {}
    by_template: dict[str, list[Variant]] = {}
    variants = []
    for variant, keys in parts:
        places = tuple(index.setdefault(keys[i], len(index)) for i in variant.entries)
        variants.append(variant.model_copy(update={"entries": places}))
        by_template.setdefault(variant.template, []).append(variants[-1])
    seen: list[list[tuple[float, int]]] = [[] for _ in index]
    anchors_ms, narrows_ms = {}, {}
    for template, members in by_template.items():
        usual = _usual(members)
        found = []
        for variant in members:
            drift = variant.beside.slowdown(usual, variant.end_to_end.median_ms)
            for place, time_us in zip(variant.entries, variant.times_us, strict=True):
                found.append((place, time_us / drift, variant.samples))
        pace = pace_of([(us, [time for time, _ in seen[place]]) for place, us, _ in found])
        anchors_ms[template] = usual.full_ms / pace
        if usual.narrow_ms:
            narrows_ms[template] = usual.narrow_ms / pace
        for place, us, samples in found:
            seen[place].append((us / pace, samples))
    return LatencyTable(
        key=key,
        anchors_ms=anchors_ms,
        narrows_ms=narrows_ms,
        bundles=tuple(dict.fromkeys(bundles)),
        swept=tuple(dict.fromkeys(swept)),
        entries=tuple(_entry(k, found) for k, found in zip(index, seen, strict=True)),
        variants=tuple(variants),
    )


def _usual(variants: Sequence[Variant]) -> References:
    """Return what the full and the narrow network took at the device's own pace."""
    narrow = [variant.narrow_ms for variant in variants if variant.narrow_ms]
    return References(
        full_ms=usual_pace_ms([variant.anchor_ms for variant in variants]),
        narrow_ms=usual_pace_ms(narrow) if narrow else 0.0,
    )


def usual_pace_ms(anchors_ms: Sequence[float]) -> float:
    """Return what a network that is timed again and again takes at the device's own pace.

    The median of its times, without those in which the device was slower than usual: two threads
    of a virtual machine take a third longer at times, for seconds or minutes, as if its processors
    shared a core, and what a network takes then is no multiple of what it takes else.
    """
    least = (1 + STEADY_PACE) * float(np.quantile(anchors_ms, 0.25))
    return median(ms for ms in anchors_ms if ms <= least)


def pace_of(shared: Sequence[tuple[float, Sequence[float]]]) -> float:
    """Return how much slower the device was than before, by what was measured both times.

    The median of the ratios, each weighed by the time it took; 1 where there are none.

    Args:
        shared: what each layer takes now, and what it took before, microseconds.
    """
    ratios = sorted((us / median(before), us) for us, before in shared if before and us > 0)
    half, passed = sum(weight for _, weight in ratios) / 2, 0.0
    for ratio, weight in ratios:
        passed += weight
        if passed >= half:
            return ratio
    return 1.0


def _entry(key: LayerKey, found: Sequence[tuple[float, int]]) -> Entry:
    times = [time_us for time_us, _ in found]
    middle = median(times)
    return Entry(
        key=key,
        median_us=round(middle, 2),
        mad_us=round(median(abs(time - middle) for time in times), 2),
        samples=sum(samples for _, samples in found),
        builds=len(found),
    )

"""Latency tables: what was measured on one device, and nothing that was measured elsewhere.

A table keeps every *variant* of a template that was built: its widths, its end-to-end time, and
what each of its layers took. The *entries* are made from these: what each layer adds to the
end-to-end time of a network, at the device's usual speed. They are what plans are made of, and what
`espalier profile show` draws.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import ClassVar

from hardware.device import Device
from hardware.disturbance import Disturbance
from hardware.errors import DeviceMismatchError, MissingLatencyError, StorageError
from hardware.latency.entries import Entry, entries_of, shares_us
from hardware.latency.layers import LayerKey
from hardware.records import Record, load_record, write_whole
from hardware.runtimes.base import EngineSettings, Runtime
from hardware.timing import Latency


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


class Variant(Record):
    """One narrowed network that was built and measured.

    `entries[i]` is the index among the table's entries of what took `times_us[i]` in it, in the
    order of the template's layers, as the profiler said.
    """

    template: str  # digest of the network's structure
    widths: Mapping[str, int]  # of every prunable group
    end_to_end: Latency  # with the profiler off
    full_ms: float  # what the full network took, timed in turns with this variant
    samples: int  # inferences with the profiler on
    entries: tuple[int, ...]
    times_us: tuple[float, ...]
    purpose: str = ""  # why it was built: "plan"; of the sweep's design otherwise
    predicted_ms: float | None = None  # by the table just before it was measured, where it could
    disturbance: Disturbance | None = None  # what others did meanwhile

    @property
    def sum_us(self) -> float:
        """The sum of the times of all executed nodes."""
        return sum(self.times_us)

    @property
    def additivity(self) -> float:
        """End-to-end time over the sum of the nodes' times: 1 where times simply add up."""
        return 1000 * self.end_to_end.median_ms / self.sum_us


class LatencyTable(Record):
    """Everything measured on one device with one runtime at one setting."""

    SCHEMA: ClassVar[int] = 2
    key: TableKey
    full_networks_ms: Mapping[str, float] = {}  # per template: what the full network usually takes
    bundles: tuple[str, ...] = ()  # digests of the bundles that it was measured from
    swept: Mapping[str, float] = {}  # per template: minutes of sweeps that came to their end
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

    def full_ms(self, template: str) -> float:
        """Return what a template's full network usually takes on this device.

        Args:
            template: digest of the network's structure.

        Raises:
            MissingLatencyError: nothing was measured of this network.
        """
        if template not in self.full_networks_ms:
            raise MissingLatencyError(
                f"The table of {self.key.device} ({self.key.runtime}) holds no measurement of this "
                "network. Measure it: espalier profile RECIPE."
            )
        return self.full_networks_ms[template]

    def slowdown(self, variant: Variant) -> float:
        """Return how many times as long as usual the full network took beside a variant."""
        return variant.full_ms / self.full_ms(variant.template)

    def usual_ms(self, variant: Variant) -> float:
        """Return a variant's end-to-end time as it is at the device's usual speed."""
        return variant.end_to_end.median_ms / self.slowdown(variant)

    def variants_of(self, template: str) -> tuple[Variant, ...]:
        """Return what was measured of one template, in the order of measuring."""
        return tuple(variant for variant in self.variants if variant.template == template)

    def holds(self, template: str, widths: Mapping[str, int]) -> bool:
        """Tell whether this variant has been measured."""
        return any(v.widths == widths for v in self.variants_of(template))

    def adding(self, variant: Variant, keys: Sequence[LayerKey]) -> "LatencyTable":
        """Return the table with one more variant.

        Args:
            variant: its `entries` are indices into `keys`.
            keys: what the variant executed.
        """
        return self._of([*self._parts(), (variant, keys)])

    def without(self, variants: Collection[Variant]) -> "LatencyTable":
        """Return the table as if some variants had never been measured."""
        return self._of([(v, keys) for v, keys in self._parts() if v not in variants])

    def _parts(self) -> list[tuple[Variant, Sequence[LayerKey]]]:
        keys = [entry.key for entry in self.entries]
        return [(variant, keys) for variant in self.variants]

    def _of(self, parts: Iterable[tuple[Variant, Sequence[LayerKey]]]) -> "LatencyTable":
        made = _table(self.key, parts)
        return made.model_copy(update={"bundles": self.bundles, "swept": self.swept})

    def save(self, path: Path) -> None:
        """Write the table; the file appears whole. One line per entry and per variant.

        Raises:
            StorageError: the folder cannot be written.
        """
        body = self.model_dump(mode="json", exclude_defaults=True)
        lists = {name: body.pop(name, []) for name in ("entries", "variants")}
        head = ",\n".join(
            f"{json.dumps(name)}: {json.dumps(value)}"
            for name, value in {"schema": self.SCHEMA, **body}.items()
        )
        tail = "".join(
            f',\n"{name}": [\n' + ",\n".join(json.dumps(record) for record in records) + "\n]"
            for name, records in lists.items()
        )
        write_whole(path, f"{{{head}{tail}}}\n")


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
    minutes = [*first.swept.items(), *second.swept.items()]
    swept = {name: max(spent for other, spent in minutes if other == name) for name, _ in minutes}
    bundles = tuple(dict.fromkeys((*first.bundles, *second.bundles)))
    merged = _table(first.key, parts.values())
    return merged.model_copy(update={"bundles": bundles, "swept": swept})


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


def _table(key: TableKey, parts: Iterable[tuple[Variant, Sequence[LayerKey]]]) -> LatencyTable:
    """Return the table of these variants, each given with the keys its indices refer to."""
    index: dict[LayerKey, int] = {}
    variants: list[Variant] = []
    for variant, keys in parts:
        places = tuple(index.setdefault(keys[i], len(index)) for i in variant.entries)
        variants.append(variant.model_copy(update={"entries": places}))
    full_ms: dict[str, list[float]] = {}
    for variant in variants:
        full_ms.setdefault(variant.template, []).append(variant.full_ms)
    table = LatencyTable(
        key=key,
        full_networks_ms={template: median(times) for template, times in full_ms.items()},
        variants=tuple(variants),
    )
    known = list(index)
    entries = entries_of(
        (known[place], time_us)
        for variant in variants
        for place, time_us in zip(
            variant.entries,
            shares_us(1000 * table.usual_ms(variant), variant.times_us),
            strict=True,
        )
    )
    return table.model_copy(update={"entries": entries})

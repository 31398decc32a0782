"""Measuring away from the host: a bundle into a table on the device, and the table back home."""

import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from hardware.bundle import Bundle
from hardware.errors import DeviceMismatchError, StorageError
from hardware.latency.layers import Layer
from hardware.latency.predict import keys_of
from hardware.latency.sweep import Goal, Place, Progress, sweep
from hardware.latency.table import (
    LatencyTable,
    TableKey,
    key_of,
    load_table,
    merge,
    table_path,
)
from hardware.latency.template_layers import layers_of
from hardware.latency.variant import Template
from hardware.lock import file_lock, machine_lock
from hardware.runtimes import RUNTIMES, check_measurable
from hardware.runtimes.base import Runtime

WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


def measure_bundle(
    bundle: Bundle,
    runtime: Runtime,
    path: Path,
    *,
    builds: int | None = None,
    minutes: float = 0.5,
    progress: Progress | None = None,
) -> LatencyTable:
    """Return the table of a bundle's network on this device; it is saved after every variant.

    A table that is there already is continued: what it holds is not measured again.

    Args:
        bundle: from the host.
        runtime: what builds and runs.
        path: where the table lies, or will.
        builds: variants to hold in the end; None: as many as the time allows.
        minutes: how long to measure, earlier sweeps of the same network included.
        progress: gets (variants measured, expected, text) after each.

    Raises:
        BuildError: this runtime cannot measure a latency table at the bundle's settings.
        BusyError: another process measures on this machine, or writes this table.
        DeviceMismatchError: the table was measured on another device, runtime or setting.
        HardwareError: the runtime cannot build or run the network, or a file cannot be written.
    """
    check_measurable(runtime, bundle.settings)
    key = key_of(runtime, bundle.settings, bundle.manifest.batch)
    purpose = f"measuring {bundle.manifest.network} into {path}"
    with file_lock(path, purpose), machine_lock(purpose):
        table = load_table(path, key) if path.exists() else LatencyTable(key=key)
        digests = dict.fromkeys((*table.bundles, bundle.manifest.digest))
        template = Template(
            model=bundle.template,
            channels=bundle.channels,
            layers=layers_of(bundle.template, bundle.channels),
        )
        table = sweep(
            Place(template=template, runtime=runtime, settings=bundle.settings, path=path),
            Goal(
                candidates=bundle.manifest.candidates,
                minutes=minutes,
                builds=builds,
                seed=bundle.manifest.seed,
            ),
            table.model_copy(update={"bundles": tuple(digests)}),
            progress,
        )
        table.save(path)
    return table


def bring_home(
    path: Path,
    digests: Collection[str],
    template: str,
    layers: Sequence[Layer],
    wanted: TableKey,
    profiles: Path,
) -> tuple[Path, LatencyTable]:
    """Return where a device's table now lies under the profiles, and what lies there.

    Merged with what the profiles hold of that device; a table of another version of the runtime
    is set aside. The entries are computed anew from the variants.

    Args:
        path: the table from the device.
        digests: of the bundles that the host would write: one of them it must come from.
        template: digest of the network's structure.
        layers: of the network.
        wanted: what the recipe asks for. Its device counts where it is named (`folder`).
        profiles: the folder of tables.

    Raises:
        BusyError: another process writes the table that lies there.
        StorageError: damaged, or of another bundle.
        DeviceMismatchError: of another device, runtime or setting.
    """
    table = load_table(path)
    _refuse_foreign(path, table, wanted)
    if not set(digests) & set(table.bundles):
        found = ", ".join(digest[:12] for digest in table.bundles) or "none"
        raise StorageError(
            f"{path} was not measured from this recipe's bundle (it names the bundles {found}; "
            f"this recipe's is {' or '.join(digest[:12] for digest in digests)}). The network, the "
            "candidate widths or the settings are others: write a new bundle and measure that."
        )
    _refuse_odd(path, table, template, layers)
    place = table_path(profiles, table.key)
    with file_lock(place, f"merging {path} into it"):
        held = LatencyTable(key=table.key)
        if place.exists():
            before = load_table(place)
            if before.key.version != table.key.version:
                place.rename(place.with_name(f"{place.stem}-{before.key.version}.json"))
            else:
                held = before
        merged = merge(held, table)
        merged.save(place)
    return place, merged


def _refuse_foreign(path: Path, table: LatencyTable, wanted: TableKey) -> None:
    """Refuse a table of another setting, or whose names would not do as names of files."""
    key = table.key
    if key.runtime not in RUNTIMES or not all(
        WORD.fullmatch(word) for word in (key.folder, key.version, key.precision)
    ):
        raise StorageError(
            f"{path} has an odd key (device {key.folder!r}, runtime {key.runtime!r}, version "
            f"{key.version!r}, precision {key.precision!r}). Measure the bundle again."
        )
    fields = ["runtime", "precision", "batch", "threads", *(["folder"] if wanted.folder else [])]
    differ = [
        f"{field} {getattr(key, field)}, where the recipe says {getattr(wanted, field)}"
        for field in fields
        if getattr(key, field) != getattr(wanted, field)
    ]
    if differ:
        raise DeviceMismatchError(
            f"{path} holds {'; '.join(differ)}. Give the recipe that it was measured for, or "
            "override: --set target.runtime=..., target.threads=..., target.device=..."
        )


def _refuse_odd(path: Path, table: LatencyTable, template: str, layers: Sequence[Layer]) -> None:
    """Refuse times that are none, and variants that executed other layers than the network has."""
    ours = [variant for variant in table.variants if variant.template == template]
    if not ours:
        raise StorageError(
            f"{path} holds no measurement of this network: it was interrupted before the first "
            "one. Run the same `espalier measure` again on the device; it continues."
        )
    for variant in table.variants:
        numbers = (*variant.times_us, variant.full_ms, variant.sum_us)
        is_time = all(math.isfinite(number) and number >= 0 for number in numbers)
        if not is_time or not variant.full_ms or not variant.sum_us:
            raise StorageError(f"{path} is damaged: it holds times that are none.")
    for variant in ours:
        executed = [table.entries[index].key for index in variant.entries]
        if executed != keys_of(layers, variant.widths):
            raise StorageError(
                f"{path} holds a variant that executed other layers than this network has. It was "
                "measured with another version of Espalier: use one version on both machines."
            )

"""Looking after latency tables: what changed between two of them, and which are stale."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from hardware.errors import DeviceMismatchError, StorageError
from hardware.latency.layers import LayerKey
from hardware.latency.staircase import label_of
from hardware.latency.table import LatencyTable, load_table

CLEAR = 3.0  # changes beyond so many median absolute deviations are more than spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One layer that both tables hold."""

    key: LayerKey
    before_us: float
    after_us: float
    is_clear: bool  # more than the spread of both explains

    @property
    def label(self) -> str:
        """What was executed, in words."""
        return label_of(self.key)

    @property
    def ratio(self) -> float:
        """After over before."""
        return self.after_us / self.before_us


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """How one table differs from another."""

    changed: tuple[Change, ...]  # the largest first, in microseconds
    networks: tuple[tuple[float, str], ...]  # after over before of full networks that both hold
    only_before: int
    only_after: int


def changes(before: LatencyTable, after: LatencyTable) -> Changes:
    """Return what changed between two tables; the runtime's version may differ, nothing else.

    Raises:
        DeviceMismatchError: of two devices, runtimes or settings.
    """
    same_version = after.key.model_copy(update={"version": before.key.version})
    if found := before.key.differences(same_version):
        raise DeviceMismatchError(
            f"These tables cannot be compared: {'; '.join(found)}. A difference says something "
            "only on one device, with one runtime and setting."
        )
    shared = [key for key in before.by_key if key in after.by_key]
    changed = []
    for key in shared:
        old, new = before.by_key[key], after.by_key[key]
        if old.median_us <= 0 or new.median_us <= 0:
            continue  # fused away in one of them: there is no ratio
        spread = CLEAR * max(old.mad_us, new.mad_us)
        changed.append(
            Change(
                key=key,
                before_us=old.median_us,
                after_us=new.median_us,
                is_clear=abs(new.median_us - old.median_us) > spread,
            )
        )
    return Changes(
        changed=tuple(sorted(changed, key=lambda c: -abs(c.after_us - c.before_us))),
        networks=tuple(
            (after.full_networks_ms[name] / ms, name)
            for name, ms in before.full_networks_ms.items()
            if name in after.full_networks_ms
        ),
        only_before=len(before.entries) - len(shared),
        only_after=len(after.entries) - len(shared),
    )


def stale(path: Path, keep: Collection[str] = ()) -> tuple[tuple[Path, str], ...]:
    """Return the tables that a runtime's earlier versions left beside a table, with the versions.

    They are called after the table and their version, and hold measurements of the same device
    and setting; whatever else lies there is left alone.

    Args:
        path: the table in use.
        keep: versions that are not stale.

    Raises:
        StorageError: the table cannot be read.
    """
    key = load_table(path).key
    found = []
    for other in sorted(path.parent.glob(f"{path.stem}-*.json")):
        try:
            theirs = load_table(other).key
        except StorageError:
            continue  # not a table, or of a newer Espalier: not ours to judge
        same = key.model_copy(update={"version": theirs.version})
        is_set_aside = other.name == f"{path.stem}-{theirs.version}.json"
        if is_set_aside and not same.differences(theirs) and theirs.version not in keep:
            found.append((other, theirs.version))
    return tuple(found)


def remove(paths: Iterable[Path]) -> None:
    """Delete these files.

    Raises:
        StorageError: one of them cannot be deleted.
    """
    for path in paths:
        try:
            path.unlink()
        except OSError as error:
            raise StorageError(f"Cannot delete {path}: {error.strerror or error}.") from error

"""`python -m benchmarks.zoo`: analyse, prune and prove every network of the zoo.

Results are kept in the JSON file as they come; the same command goes on where it was stopped.
`--torch-pruning` needs `pip install torch-pruning`; without it the column says so.
"""

import argparse
import fnmatch
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.util import find_spec
from pathlib import Path

from benchmarks.zoo import networks
from benchmarks.zoo.isolating import run_module
from benchmarks.zoo.records import CRASHED, WRONG, Entry, Peer, Zoo, summarize
from benchmarks.zoo.tables import to_markdown
from hardware.errors import HardwareError
from hardware.records import load_record, save_record, write_whole


def main() -> None:
    """Run the networks that are not in the file yet, and print and write the table."""
    options = _arguments()
    chosen = [name for name in networks.names() if _matches(name, options.filter)]
    if not chosen:
        raise SystemExit(f"No network of the zoo matches {options.filter!r}.")
    entries = _known(options.json)
    tasks = [name for name in chosen if _is_open(entries.get(name), options)]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(f"{len(chosen)} networks, {len(tasks)} to run", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = [pool.submit(_complete, name, entries.get(name), options) for name in tasks]
        for done in as_completed(futures):
            entry = done.result()
            entries[entry.name] = entry
            print(_line(entry), flush=True)
            if options.json is not None:
                save_record(_zoo(entries, networks.names()), options.json)
    zoo = _zoo(entries, chosen)
    assert zoo.summary is not None
    print(zoo.summary.model_dump_json(indent=2))
    if options.markdown is not None:
        write_whole(options.markdown, to_markdown(zoo, len(networks.names())))


def _zoo(entries: Mapping[str, Entry], order: Sequence[str]) -> Zoo:
    """Return what is known of these networks, in this order, with its summary."""
    known = tuple(entries[name] for name in order if name in entries)
    return Zoo(networks=known, summary=summarize(known))


def _line(entry: Entry) -> str:
    """Return one network's result in a line."""
    if entry.status in CRASHED:
        return f"{entry.name}: {entry.status} {entry.detail[:200]}"
    line = (
        f"{entry.name}: {entry.status}, {entry.groups} groups, share {entry.prunable_share:.2f}, "
        f"proof {_power(entry.proof_error)}, parity {_power(entry.ort_parity)}, "
        f"{entry.seconds:.1f} s of {entry.whole_seconds:.0f} s"
    )
    peer = entry.torch_pruning
    return (
        line if peer is None else f"{line}; torch-pruning {peer.status} {peer.prunable_share:.2f}"
    )


def _power(number: float | None) -> str:
    return "-" if number is None else f"{number:.0e}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--filter", default="*", help='such as "timm:*", or a part of a name')
    parser.add_argument("--json", type=Path, help="results; what is in it already is kept")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time")
    parser.add_argument(
        "--timeout", type=float, default=120, help="processor seconds per network and tool"
    )
    parser.add_argument("--memory", type=float, default=10, help="GiB per process")
    parser.add_argument("--retry", action="store_true", help="run again what crashed or was wrong")
    parser.add_argument("--torch-pruning", action="store_true", help="run Torch-Pruning as well")
    parser.add_argument(
        "--class-share", action="store_true", help="what the class form can prune; slow"
    )
    return parser.parse_args()


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatch(name, pattern) or pattern in name


def _known(path: Path | None) -> dict[str, Entry]:
    """Return the results in a file by name.

    Raises:
        SystemExit: the file is not one of the zoo's.
    """
    if path is None or not path.exists():
        return {}
    try:
        return {entry.name: entry for entry in load_record(Zoo, path).networks}
    except HardwareError as error:
        raise SystemExit(str(error)) from error


def _is_open(entry: Entry | None, options: argparse.Namespace) -> bool:
    """Return whether something that is asked for is not known yet."""
    if _needs_own(entry, options):
        return True
    return options.torch_pruning and (entry is None or entry.torch_pruning is None)


def _needs_own(entry: Entry | None, options: argparse.Namespace) -> bool:
    """Return whether the network must be analysed, for the first time or again."""
    if entry is None or (options.retry and entry.status in (*CRASHED, WRONG)):
        return True
    return options.class_share and entry.class_share is None and entry.status not in CRASHED


def _complete(name: str, entry: Entry | None, options: argparse.Namespace) -> Entry:
    """Return everything that is asked for of one network."""
    limits = {"timeout_s": options.timeout, "memory_gib": options.memory}
    if _needs_own(entry, options):
        new = _own(name, options.class_share, limits)
        if entry is None or new.status not in CRASHED:  # what is known is not lost to a time limit
            peer = None if entry is None else entry.torch_pruning
            entry = new.model_copy(update={"torch_pruning": peer})
    assert entry is not None
    if options.torch_pruning and entry.torch_pruning is None:
        entry = entry.model_copy(update={"torch_pruning": _peer(name, limits)})
    return entry


def _own(name: str, with_class: bool, limits: dict[str, float]) -> Entry:
    flags = ["--class-share"] if with_class else []
    outcome = run_module("benchmarks.zoo.measuring", [name, *flags], **limits)
    if outcome.status == "ok":
        return Entry.model_validate_json(outcome.last_line)
    return Entry(
        name=name, status=outcome.status, detail=outcome.last_line, whole_seconds=outcome.seconds
    )


def _peer(name: str, limits: dict[str, float]) -> Peer:
    if find_spec("torch_pruning") is None:
        return Peer(status="not installed", detail="pip install torch-pruning")
    outcome = run_module("benchmarks.zoo.peer", [name], **limits)
    if outcome.status == "ok":
        return Peer.model_validate_json(outcome.last_line)
    return Peer(status=outcome.status, detail=outcome.last_line, seconds=outcome.seconds)


if __name__ == "__main__":
    main()

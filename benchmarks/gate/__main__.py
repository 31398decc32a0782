"""Count how often `espalier bench` errs on this machine.

    python -m benchmarks.gate --aa-runs 200 --runs 50 --budget 10s --json FILE   # 60 to 80 minutes
    python -m benchmarks.gate --aa-runs 6 --runs 2 --budget 2s                    # a trial

Every run is kept in build/gate: the same command continues where it stopped, or was killed, and
with larger numbers adds to what is there. Ctrl-C writes the summary of what there is. Runs of
another device, runtime version or budget do not mix.
"""

import argparse
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from benchmarks.gate.cases import Case, Found, find_slow_downs, plan
from benchmarks.gate.judging import Run, judge, report, shortfalls
from benchmarks.neighbours import neighbour
from hardware.errors import HardwareError
from hardware.gate.bench import Rules, bench
from hardware.gate.run import parse_seconds
from hardware.gate.sample import Schedule
from hardware.lock import machine_lock
from hardware.records import load_record, save_record, write_whole
from hardware.runtimes import get_runtime

FOLDER = Path("build/gate")
RESULTS = Path("benchmarks/results/gate.json")


def read_runs(path: Path) -> list[Run]:
    """Return the runs in a file, without a last line that a kill cut short."""
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    return [Run.model_validate_json(line) for line in whole.splitlines()]


def keep(path: Path, runs: Sequence[Run]) -> None:
    """Write all runs; the file appears whole."""
    write_whole(path, "".join(run.model_dump_json() + "\n" for run in runs))


def missing(cases: Sequence[Case], runs: Sequence[Run]) -> list[Case]:
    """Return the cases that have not been run yet, each as often as it is planned."""
    done = Counter((run.kind, run.beside, run.runtime) for run in runs)
    left = []
    for case in cases:
        key = (case.kind, case.beside, case.runtime)
        if done[key]:
            done[key] -= 1
        else:
            left.append(case)
    return left


def seconds_left(cases: Sequence[Case], runs: Sequence[Run], budget_s: float) -> float:
    """Return how long the cases will take: a kind as long as before, one without runs a budget."""
    took: dict[tuple[str, bool], list[float]] = {}
    for run in runs:
        took.setdefault((run.kind, run.beside), []).append(run.wall_s)
    mean = {key: sum(seconds) / len(seconds) for key, seconds in took.items()}
    return sum(mean.get((case.kind, case.beside), budget_s) for case in cases)


def run_case(case: Case, budget_s: float) -> Run | None:
    """Return the run of a case by the default rules, None where Ctrl-C ended it."""
    engines = [b.engine_file(case.runtime, FOLDER) for b in (case.candidate, case.baseline)]
    rules = Rules(schedule=Schedule(budget_s=budget_s))
    start_s = time.monotonic()
    with neighbour() if case.beside else nullcontext():
        session = bench(engines[:1], engines[1], rules)
    if not session.is_complete:
        return None
    wall_s = time.monotonic() - start_s
    return judge(session, case.kind, beside=case.beside, runtime=case.runtime, wall_s=wall_s)


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def slow_downs(runtime: str, budget_s: float, folder: Path) -> Found:
    """Return the slow-downs of a runtime, and measure them where no file holds them yet."""
    path = folder / f"slow-downs-{runtime}.json"
    if not path.exists():
        tell(f"{runtime}: looking for networks that are slower by a few percent")
        save_record(find_slow_downs(runtime, budget_s, FOLDER), path)
    return load_record(Found, path)


def run_all(cases: Sequence[Case], path: Path, budget_s: float) -> list[Run]:
    """Run all cases that are missing and say how long it will take; Ctrl-C loses no run."""
    runs = read_runs(path)
    left = missing(cases, runs)
    while left:
        minutes = seconds_left(left, runs, budget_s) / 60
        where = "beside a neighbour" if left[0].beside else "alone"
        head = f"{len(runs) + 1} of {len(runs) + len(left)}, about {minutes:.0f} min left"
        try:
            run = run_case(left[0], budget_s)
        except KeyboardInterrupt:
            run = None
        if run is None:
            tell("Interrupted; the same command continues.")
            break
        said = next(iter(run.said.values())).value
        tell(f"{head}: {run.kind} {where}, {run.runtime}: {said} after {run.seconds:.1f} s")
        runs.append(run)
        keep(path, runs)
        left = left[1:]
    return runs


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--aa-runs", type=int, default=200, help="of equal engines")
    parser.add_argument("--runs", type=int, default=50, help="of each slow-down")
    parser.add_argument("--budget", default="10s", help="of one run")
    parser.add_argument("--runtime", action="append", help="may be repeated [default: ort, ov]")
    parser.add_argument("--json", type=Path, nargs="?", const=RESULTS, help=f"[FILE: {RESULTS}]")
    asked = parser.parse_args(words)
    budget_s = parse_seconds(asked.budget)
    runtimes = {name: get_runtime(name) for name in asked.runtime or ("ort", "ov")}
    versions = {name: runtime.version() for name, runtime in runtimes.items()}
    devices = {name: runtime.machine() for name, runtime in runtimes.items()}
    prints = {name: device.fingerprint for name, device in devices.items()}
    settings = {"devices": prints, "versions": versions, "budget_s": budget_s}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    with machine_lock("benchmarking the latency gate"):
        found = {name: slow_downs(name, budget_s, FOLDER / digest) for name in versions}
        cases = plan(asked.aa_runs, asked.runs, found)
        runs = run_all(cases, FOLDER / digest / "runs.jsonl", budget_s)
    result = {
        **report(runs),
        "budget_s": budget_s,
        "device": ", ".join(dict.fromkeys(device.name for device in devices.values())),
        "versions": versions,
        "slow_downs": {name: one.model_dump(mode="json") for name, one in found.items()},
        "missing_runs": len(missing(cases, runs)),
        "minutes": round(sum(run.wall_s for run in runs) / 60, 1),
    }
    text = json.dumps(result, indent=1)
    if asked.json is not None:
        write_whole(asked.json, text + "\n")
    print(text)
    missed = shortfalls(result)
    for line in missed:
        tell(f"MISSED {line}")
    return 1 if missed or result["missing_runs"] else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HardwareError as error:
        sys.exit(f"{type(error).__name__}: {error}")

"""How often `espalier bench` errs on this machine, beside tests that are commonly used.

    python -m benchmarks.gate --runs 50 --aa-runs 200          # hours; continues where it stopped
    python -m benchmarks.gate --runs 1 --aa-runs 1 --budget 2s # a trial

Every run is appended to build/gate; the summary goes to benchmarks/results/gate.json.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from scipy.stats import mannwhitneyu, ttest_ind

from hardware.benching import Rules, Session, bench
from hardware.comparing import Verdict
from hardware.contenders import Contender
from hardware.gating import parse_seconds
from hardware.intervals import median
from hardware.locking import default_lock, machine_lock
from hardware.measuring import whole
from hardware.runtimes.base import EngineSettings
from hardware.sampling import Schedule
from hardware.storing import write_whole

FOLDER = Path("build/gate")
RESULTS = Path("benchmarks/results/gate.json")
RUNTIMES = ("ort", "ov")
SLOWER = (3, 5, 10)  # percent
BLOCKS, WIDTH, SIZE = 12, 32, 28
WIDENED = (1, 2, 3, 4, 6)  # blocks with more channels, of the networks tried
MORE = (8, 16, 32)  # inner channels more in each of them
SPIN = "while True: pass"


def network(widened: int, more: int) -> onnx.ModelProto:
    """Return residual blocks of two convolutions, some of them with more inner channels."""
    generator = np.random.default_rng(0)
    nodes, weights, value = [], [], "input"
    for block in range(BLOCKS):
        inner = WIDTH + (more if block < widened else 0)
        for part, shape in (("a", (inner, WIDTH, 3, 3)), ("b", (WIDTH, inner, 3, 3))):
            values = generator.standard_normal(shape) * (shape[1] * 9) ** -0.5 / 2
            weights.append(numpy_helper.from_array(values.astype(np.float32), f"{part}{block}"))
        node = helper.make_node
        same = {"kernel_shape": [3, 3], "pads": [1] * 4}
        nodes += [
            node("Conv", [value, f"a{block}"], [f"c{block}"], **same),
            node("Relu", [f"c{block}"], [f"r{block}"]),
            node("Conv", [f"r{block}", f"b{block}"], [f"d{block}"], **same),
            node("Add", [f"d{block}", value], [f"s{block}"]),
        ]
        value = f"s{block}"
    shape = [1, WIDTH, SIZE, SIZE]
    graph = helper.make_graph(
        nodes,
        "gate",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, shape)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def engine(runtime: str, widened: int, more: int) -> Contender:
    """Return the engine of a network, which is written where it is not there yet."""
    path = FOLDER / f"net-{widened}-{more}.onnx"
    if not path.exists():
        write_whole(path, network(widened, more).SerializeToString())
    return Contender(path=path, runtime=runtime, settings=EngineSettings())


def find_variants(runtime: str, budget_s: float) -> dict[str, tuple[int, int]]:
    """Return which network is slower by about each percentage, by measuring them all at once.

    A variant is at least as slow as it is called, so that missing it is a miss.
    """
    path = FOLDER / f"variants-{runtime}-{budget_s:g}s.json"
    if path.exists():
        found: dict[str, tuple[int, int]] = json.loads(path.read_text())
        return found
    shapes = [(widened, more) for more in MORE for widened in WIDENED]
    ratios = {}
    for shape in shapes:
        # Without a baseline a bench does not stop early: the whole budget goes into the ratio.
        pair = [engine(runtime, *shape), engine(runtime, 0, 0)]
        new, old = bench(pair, None, Rules(schedule=Schedule(budget_s=budget_s))).measurements
        units = zip(new.units, old.units, strict=True)
        by_unit = [whole("p50", [one]) / whole("p50", [other]) for one, other in units]
        ratios[shape] = 100 * (median(by_unit) - 1)
    chosen = {}
    for percent in SLOWER:
        above = [shape for shape, ratio in ratios.items() if ratio >= percent]
        if not above:
            raise SystemExit(f"No network is {percent} % slower on {runtime}: {ratios}")
        chosen[str(percent)] = min(above, key=lambda shape: ratios[shape])
    write_whole(path, json.dumps(chosen))
    return chosen


@contextmanager
def neighbour(is_there: bool) -> Iterator[None]:
    """Keep one core busy meanwhile."""
    if not is_there:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", SPIN])
    try:
        yield
    finally:
        process.kill()
        process.wait()


Floats = np.ndarray[tuple[int], np.dtype[np.float64]]
OTHERS: dict[str, Callable[[Floats, Floats], bool]] = {
    "fixed 5 % on the median": lambda new, old: bool(np.median(new) > 1.05 * np.median(old)),
    "Welch's t-test, p < 0.05": lambda new, old: bool(
        ttest_ind(new, old, equal_var=False, alternative="greater").pvalue < 0.05
    ),
    "Mann-Whitney, p < 0.05": lambda new, old: bool(
        mannwhitneyu(new, old, alternative="greater").pvalue < 0.05
    ),
}


def judge(session: Session) -> dict[str, str]:
    """Return what each method says of the same samples."""
    assert session.baseline is not None and session.verdict is not None
    new, old = (
        np.array([s for unit in one.units for s in unit.samples_ms])
        for one in (session.measurements[0], session.baseline)
    )
    said = {"espalier": session.verdict.value}
    for name, is_slower in OTHERS.items():
        verdict = Verdict.REGRESSION if is_slower(new, old) else Verdict.PASS
        said[name] = verdict.value
    return said


def summarize(runs: list[dict[str, str]], method: str) -> dict[str, object]:
    """Return the error rates of one method, percent; None where nothing was run."""

    def share(kind: str, verdict: Verdict) -> float | None:
        said = [run[method] for run in runs if run["kind"] == kind]
        return 100 * said.count(verdict.value) / len(said) if said else None

    return {
        "aa_runs": sum(run["kind"] == "aa" for run in runs),
        "false_alarm_pct": share("aa", Verdict.REGRESSION),
        "inconclusive_pct": share("aa", Verdict.INCONCLUSIVE),
        "detection_pct": {str(p): share(str(p), Verdict.REGRESSION) for p in SLOWER},
    }


def report(runs: list[dict[str, str]]) -> dict[str, object]:
    """Return the summary of all runs, with and without a neighbour, of all methods."""
    alone = [run for run in runs if run["neighbour"] == "no"]
    beside = [run for run in runs if run["neighbour"] == "yes"]
    return {
        **summarize(alone, "espalier"),
        "with_neighbour": summarize(beside, "espalier"),
        "others": {
            name: {**summarize(alone, name), "with_neighbour": summarize(beside, name)}
            for name in OTHERS
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--aa-runs", type=int, default=200, help="of equal engines, in all")
    parser.add_argument("--runs", type=int, default=50, help="of each slow-down, in all")
    parser.add_argument("--budget", default="10s")
    parser.add_argument("--runtime", choices=RUNTIMES, action="append")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    asked = parser.parse_args()
    runtimes, budget_s = asked.runtime or list(RUNTIMES), parse_seconds(asked.budget)
    lines = FOLDER / f"runs-{budget_s:g}s.jsonl"  # runs of other budgets do not mix
    lines.parent.mkdir(parents=True, exist_ok=True)
    runs = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    with machine_lock(default_lock()):
        variants = {name: find_variants(name, budget_s) for name in runtimes}
        for number in range(max(asked.aa_runs, asked.runs)):
            runtime = runtimes[number % len(runtimes)]
            for kind in ("aa", *map(str, SLOWER)):
                for busy in ("no", "yes"):
                    done = sum(r["kind"] == kind and r["neighbour"] == busy for r in runs)
                    if done > number or number >= (asked.aa_runs if kind == "aa" else asked.runs):
                        continue
                    shape = (0, 0) if kind == "aa" else variants[runtime][kind]
                    rules = Rules(schedule=Schedule(budget_s=budget_s))
                    with neighbour(busy == "yes"):
                        session = bench([engine(runtime, *shape)], engine(runtime, 0, 0), rules)
                    run = {"kind": kind, "neighbour": busy, "runtime": runtime, **judge(session)}
                    runs.append(run)
                    with lines.open("a") as file:
                        file.write(json.dumps(run) + "\n")
    found = report(runs)
    write_whole(RESULTS, json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1) if asked.json else f"{len(runs)} runs: {RESULTS}")


if __name__ == "__main__":
    main()

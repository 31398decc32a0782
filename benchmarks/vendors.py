"""Hold the medians of `espalier bench` to those of the runtimes' own tools.

    python -m benchmarks.vendors --json FILE       # about three minutes, on a quiet machine

OpenVINO's benchmark_app and the loop of onnxruntime_perf_test time the same files in turns with
`espalier bench`, each in a process of its own, one thread, float32. Every round gives one ratio of
medians; they agree where the interval of the ratios holds 1. Where it does not, the note says
whether two things explain it that are in our time and not in the tools': the call from Python, and
turns with the reference model, which leave the caches cooler than inferences in a row.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gate.engines import Build
from benchmarks.ort_perf import bound
from hardware.device import this_device
from hardware.errors import RunError
from hardware.gate.bench import Rules, bench
from hardware.gate.engines import EngineFile, engine_file, reference_loader
from hardware.gate.sample import TURN_SAMPLES, Schedule
from hardware.intervals import Interval, median, median_interval, samples_needed
from hardware.lock import machine_lock
from hardware.records import write_whole
from hardware.runtimes import get_runtime
from hardware.runtimes.base import EngineSettings
from hardware.timing import fill_caches, timer_of

FOLDER = Path("build/vendors")
RESULTS = Path("benchmarks/results/vendors.json")
BUILDS = (Build(size_px=6), Build(size_px=28))
ROUNDS = samples_needed(0.95)  # for an interval of the median
KNOWN = 0.05  # an interval of the ratio that is wider says nothing
CALLS = 200  # to tell what the call from Python adds, and what turns add
MEDIAN = re.compile(r"Median:\s+([0-9.]+) (ms|us)")


def benchmark_app(path: Path, seconds: float) -> float:
    """Return the median by OpenVINO's benchmark_app, ms: synchronous, one stream, one thread."""
    program = Path(sys.executable).with_name("benchmark_app")
    words = ["-m", str(path), "-d", "CPU", "-api", "sync", "-hint", "none", "-nstreams", "1"]
    words += ["-nireq", "1", "-nthreads", "1", "-infer_precision", "f32", "-inference_only"]
    found = MEDIAN.search(_output([str(program), *words, "-t", str(max(1, round(seconds)))]))
    if found is None:
        raise RunError("benchmark_app printed no median. Run it by hand to see why.")
    return float(found[1]) / (1 if found[2] == "ms" else 1000)


def ort_perf(path: Path, seconds: float) -> float:
    """Return the median by the loop of onnxruntime_perf_test, ms."""
    return float(_output([sys.executable, "-m", "benchmarks.ort_perf", str(path), str(seconds)]))


def _output(command: list[str]) -> str:
    """Return what a command prints; raise RunError where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"{' '.join(command)} failed: {done.stdout[-500:]}{done.stderr[-500:]}")
    return done.stdout


def openvino_call_ms(path: Path) -> float:
    """Return by how much an inference, timed from Python, is longer than the request's clock."""
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": 1}
    request = openvino.Core().compile_model(str(path), "CPU", options).create_infer_request()
    infer = timer_of(lambda: request.infer(share_outputs=True))
    return median([infer(1) - request.latency for _ in range(CALLS)])


def ort_call_ms(path: Path) -> float:
    """Return by how much `session.run` takes longer than running what was bound before."""
    session, binding = bound(str(path))
    engine = get_runtime("ort").load(path, EngineSettings())
    ours = engine.timer(engine.random_feeds())
    theirs = timer_of(lambda: session.run_with_iobinding(binding))
    return median([ours(1) - theirs(1) for _ in range(CALLS)])


def turns_ms(engine: EngineFile) -> float:
    """Return by how much an inference in turns is longer than one in a row.

    The turns are with the reference model.
    """
    loaded = engine.load()
    timer = loaded.timer(loaded.random_feeds())
    other = reference_loader(engine.runtime, engine.settings)().timer
    added = []
    for _ in range(CALLS // TURN_SAMPLES):
        other(TURN_SAMPLES)
        fill_caches(timer)
        in_turns, in_a_row = (
            median([timer(1) for _ in range(TURN_SAMPLES)]) for _ in ("at once", "when warm")
        )
        added.append(in_turns - in_a_row)
    return median(added)


@dataclass(frozen=True, slots=True)
class Tool:
    """A runtime's own way to time an engine."""

    name: str
    runtime: str
    median_ms: Callable[[Path, float], float]  # of a file, in so many seconds
    call_ms: Callable[[Path], float]  # that our time has on top


TOOLS = (
    Tool("benchmark_app", "ov", benchmark_app, openvino_call_ms),
    Tool("onnxruntime_perf_test in Python", "ort", ort_perf, ort_call_ms),
)


def ours_ms(engine: EngineFile, seconds: float) -> Interval:
    """Return the median by `espalier bench` and its 95 % interval, ms."""
    session = bench([engine], None, Rules(schedule=Schedule(budget_s=seconds)))
    if not session.is_complete:
        raise KeyboardInterrupt
    return session.measurements[0].p50()


def compare(tool: Tool, path: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """Return both medians of every round, their ratio, and why it is not 1 where it is not."""
    engine = engine_file(path, tool.runtime, EngineSettings())
    ours: list[Interval] = []
    theirs: list[float] = []
    for index in range(rounds):
        for is_ours in (True, False) if index % 2 else (False, True):
            if is_ours:
                ours.append(ours_ms(engine, seconds))
            else:
                theirs.append(tool.median_ms(path, seconds))
    call_ms, turn_ms = tool.call_ms(path), turns_ms(engine)
    pairs = list(zip(theirs, ours, strict=True))
    plain = median_interval([t / o.estimate for t, o in pairs])
    less = median_interval([t / (o.estimate - call_ms - turn_ms) for t, o in pairs])
    return {
        "tool": tool.name,
        "engine": path.name,
        "ours_ms": median([one.estimate for one in ours]),
        "theirs_ms": median(theirs),
        "theirs_over_ours": [plain.estimate, plain.low, plain.high],
        "call_us": 1e3 * call_ms,
        "turns_us": 1e3 * turn_ms,
        "theirs_over_ours_without_both": [less.estimate, less.low, less.high],
        "rounds_in_our_interval": sum(o.contains(t) for t, o in pairs),
        "rounds": len(pairs),
        "note": note(plain, less, call_ms, turn_ms),
    }


def note(plain: Interval, less: Interval, call_ms: float, turn_ms: float) -> str:
    """Return in words whether the medians agree, and what explains it where they do not."""
    if plain.relative_width > KNOWN:
        return f"unsure: the interval is wider than {KNOWN:.0%}; repeat on a quiet machine"
    if plain.contains(1.0):
        return "agrees"
    ours = (
        f"the {1e3 * call_ms:.1f} us of the call from Python and the {1e3 * turn_ms:.1f} us that "
        "turns with the reference model add, which are in our time and not in the tool's"
    )
    if less.contains(1.0):
        return f"agrees but for {ours}"
    return f"differs by {100 * (less.estimate - 1):+.1f} % beyond {ours}"


def main() -> int:
    """Compare all tools and write what was found; return 0 where all medians agree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, action="append", help="ONNX files [default: two own]")
    parser.add_argument("--rounds", type=int, default=9, help=f"{ROUNDS} at the least")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each tool in each round")
    parser.add_argument("--json", type=Path, nargs="?", const=RESULTS, help=f"[FILE: {RESULTS}]")
    asked = parser.parse_args()
    if asked.rounds < ROUNDS:
        parser.error(f"{asked.rounds} rounds give no interval; {ROUNDS} are needed.")
    started = time.monotonic()
    with machine_lock("comparing with the runtimes' own tools"):
        paths = asked.model or [build.engine_file("ort", FOLDER).path for build in BUILDS]
        found = [compare(t, path, asked.rounds, asked.seconds) for t in TOOLS for path in paths]
    result = {
        "device": this_device().name,
        "versions": {tool.runtime: get_runtime(tool.runtime).version() for tool in TOOLS},
        "minutes": round((time.monotonic() - started) / 60, 1),
        "found": found,
    }
    text = json.dumps(result, indent=1)
    if asked.json is not None:
        write_whole(asked.json, text + "\n")
    print(text)
    return 0 if all(one["note"].startswith("agrees") for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())

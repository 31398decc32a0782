"""Everything that Espalier does on an NVIDIA GPU, tried once; what cannot run is named with why.

    python -m benchmarks.gpu_check --network resnet18 --json gpu.json

Times the network with torch as a reference, on ONNX Runtime's CUDA and TensorRT providers, and on
TensorRT (10, 11, or for RTX) in float32 and float16; compares every engine's outputs with those of
the processor; measures a latency table with TensorRT under `--profiles`, and plans that it never
saw. Engines for chips that are not here are built too. Exit code 1: something that should work did
not.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.fidelity.subjects import NETWORKS, Candidates, held_out, subject_of, template_of
from hardware.errors import HardwareError, RuntimeMissingError
from hardware.latency.sweep import Goal, Place, measure, prediction_errors, sweep
from hardware.latency.table import LatencyTable, key_of, load_table, table_path
from hardware.records import Record, save_record
from hardware.runtimes import get_runtime
from hardware.runtimes.base import Array, Engine, EngineSettings, Feeds
from hardware.runtimes.cuda import gpu_absent, this_gpu
from hardware.runtimes.trt import RTX, TensorRt
from hardware.timing import Latency, Protocol, time_together
from pipeline.delivery.deliver import versions
from pipeline.networks.analyse import Subject

PRECISIONS = ("fp32", "tf32", "fp16")
# Largest difference from float32 on the processor, relative to the largest output.
PARITY = {"fp32": 1e-4, "tf32": 2e-2, "fp16": 2e-2}
CHIPS = ("8.9", "12.0")  # built for, here or not
PROTOCOL = Protocol(max_seconds=5.0)


class Finding(Record):
    """One thing that was tried."""

    name: str
    state: Literal["done", "cannot run", "failed"]
    detail: str  # the reason, or figures in words
    latency: Latency | None = None
    parity: float | None = None  # largest difference over the largest output
    table: str = ""  # the file
    errors_pct: tuple[float, ...] = ()  # of plans that the table never saw


class Findings(Record):
    """Everything that was tried on one machine."""

    network: str
    gpu: str
    versions: dict[str, str]
    findings: tuple[Finding, ...]


class CannotRunError(Exception):
    """Something is not there: no failure."""


def check_torch(subject: Subject, reference: Array, feeds: Feeds) -> Finding:
    """Time the network in torch, by CUDA events."""
    if not torch.cuda.is_available():
        raise CannotRunError("this torch sees no CUDA device")
    module = copy.deepcopy(subject.network.module).cuda().eval()
    image = torch.from_numpy(next(iter(feeds.values()))).cuda()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def milliseconds(calls: int) -> float:
        with torch.no_grad():
            start.record()
            for _ in range(calls):
                module(image)
            end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / calls

    with torch.no_grad():
        parity = _difference(module(image).cpu().numpy(), reference)
    (series,) = time_together([milliseconds], PROTOCOL)
    return _timed("torch, eager", series.latency, parity, PARITY["tf32"])


def check_engine(
    name: str, precision: str, subject: Subject, reference: Array, feeds: Feeds
) -> Finding:
    """Build the network on a runtime, compare its outputs, and time it."""
    runtime = get_runtime(name)
    engine: Engine = runtime.build(subject.template, EngineSettings(precision=precision))
    parity = _difference(next(iter(engine.run(feeds).values())), reference)
    (series,) = time_together([engine.timer(feeds)], PROTOCOL)
    return _timed(f"{name} {precision}", series.latency, parity, PARITY[precision])


def check_profile(subject: Subject, feeds: Feeds) -> Finding:
    """Hold what TensorRT says of its layers against the time of the whole."""
    engine = get_runtime("trt").build(subject.template, EngineSettings(), profile=True)
    times = engine.node_times(feeds, 50)
    (series,) = time_together([engine.timer(feeds)], PROTOCOL)
    whole_us = 1000 * series.latency.median_ms
    known = sum(time.time_us for time in times if time.nodes)
    total = sum(time.time_us for time in times)
    return Finding(
        name="trt, time by layer",
        state="done" if known > 0.5 * total else "failed",
        detail=f"{len(times)} layers; end-to-end time over their sum {whole_us / total:.3f}; "
        f"{known / total:.1%} of their time traced to nodes of the model",
        latency=series.latency,
    )


def check_table(
    subject: Subject, candidates: Candidates, profiles: Path, plans: int, console: Console
) -> Finding:
    """Measure a table with TensorRT, continue it, and predict plans that it never saw."""
    runtime, settings = get_runtime("trt"), EngineSettings()
    key = key_of(runtime, settings, 1)
    path, template = table_path(profiles, key), template_of(subject)
    place = Place(template=template, runtime=runtime, settings=settings, path=path)
    goal = Goal(candidates=candidates)

    def told(done: int, total: int, text: str) -> None:
        console.print(f"  table: {done} of {total}, {text}", highlight=False)

    start = time.monotonic()
    table = load_table(path, key) if path.exists() else LatencyTable(key=key)
    table = sweep(place, goal, table, told)
    seconds = time.monotonic() - start
    again = sweep(place, goal, table, told)
    unseen = held_out(candidates, subject.channels, plans, seed=1)
    for _, widths in unseen:
        table, _ = measure(place, widths, table)
    judged = table.variants[-len(unseen) :]
    errors = [100 * error for error in prediction_errors(table, judged)]
    return Finding(
        name="trt, latency table",
        state="done" if len(again.variants) == len(table.variants) - len(unseen) else "failed",
        detail=f"{len(again.variants)} builds in {seconds:.0f} s; median error of {len(errors)} "
        f"plans {np.median(np.abs(errors)):.1f} %, worst {max(map(abs, errors)):.1f} %",
        table=str(path),
        errors_pct=tuple(round(error, 2) for error in errors),
    )


def check_chip(chip: str, subject: Subject) -> Finding:
    """Build for a chip that need not be here."""
    runtime = TensorRt(capability=chip, package=RTX)
    if (missing := runtime.missing()) is not None:
        raise CannotRunError(missing)
    plan = runtime.build(subject.template, EngineSettings()).plan
    return Finding(
        name=f"build for {chip}",
        state="done",
        detail=f"trt {runtime.version()}, {len(plan)} bytes",
    )


def checks(
    subject: Subject, candidates: Candidates, options: argparse.Namespace, console: Console
) -> Iterator[tuple[str, Callable[[], Finding]]]:
    """Yield everything to try, by name."""
    reference = get_runtime("ort").build(subject.template, EngineSettings())
    feeds = reference.random_feeds()
    expected = next(iter(reference.run(feeds).values()))
    yield "torch, eager", partial(check_torch, subject, expected, feeds)
    for name in ("ort-cuda", "ort-trt", "trt"):
        for precision in PRECISIONS:
            if (name, precision) != ("ort-trt", "fp32"):  # it promises no exact float32
                check = partial(check_engine, name, precision, subject, expected, feeds)
                yield f"{name} {precision}", check
    yield "trt, time by layer", partial(check_profile, subject, feeds)
    table = partial(check_table, subject, candidates, options.profiles, options.plans, console)
    yield "trt, latency table", table
    for chip in CHIPS:
        yield f"build for {chip}", partial(check_chip, chip, subject)


def attempt(name: str, check: Callable[[], Finding]) -> Finding:
    """Return what was found, or why nothing was."""
    try:
        return check()
    except (CannotRunError, RuntimeMissingError) as error:
        return Finding(name=name, state="cannot run", detail=str(error))
    except (HardwareError, RuntimeError) as error:  # torch raises RuntimeError
        return Finding(name=name, state="failed", detail=f"{type(error).__name__}: {error}")


def _timed(name: str, latency: Latency, parity: float, allowed: float) -> Finding:
    text = f"{latency.median_ms:.4f} ms ({latency.low_ms:.4f} to {latency.high_ms:.4f})"
    return Finding(
        name=name,
        state="done" if parity <= allowed else "failed",
        detail=f"{text}, outputs differ by {parity:.1e}, allowed {allowed:.0e}",
        latency=latency,
        parity=parity,
    )


def _difference(found: Array, expected: Array) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def main(arguments: list[str] | None = None) -> int:
    """Try everything; 0 unless something that should work did not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="resnet18")
    parser.add_argument("--plans", type=int, default=5, help="random plans that the table predicts")
    parser.add_argument("--profiles", type=Path, default=Path("profiles"))
    parser.add_argument("--json", type=Path, help="write what was found")
    options = parser.parse_args(arguments)
    out, err = Console(), Console(stderr=True)
    absent = gpu_absent()
    gpu = f"none: {absent}" if absent else f"{this_gpu().name}, {this_gpu().architecture}"
    out.print(f"GPU: {gpu}", highlight=False)
    subject, candidates = subject_of(options.network)
    found = []
    for name, check in checks(subject, candidates, options, err):
        err.print(f"trying {name}", highlight=False)
        found.append(attempt(name, check))
    table = Table("tried", "outcome", "")
    told = ""
    for finding in found:
        table.add_row(
            finding.name, finding.state, "likewise" if finding.detail == told else finding.detail
        )
        told = finding.detail
    out.print(table)
    if options.json is not None:
        record = Findings(
            network=options.network, gpu=gpu, versions=dict(versions()), findings=tuple(found)
        )
        save_record(record, options.json)
    return 1 if any(finding.state == "failed" for finding in found) else 0


if __name__ == "__main__":
    sys.exit(main())

"""How well a latency table predicts plans that it never saw, beside two other kinds of table.

    python -m benchmarks.fidelity --network resnet18 --runtime ov --json fidelity.json
    python -m benchmarks.fidelity --network resnet34 --runtime ov --after resnet18 --plans 5
    python -m benchmarks.fidelity --network resnet56 --runtime ort --repeat

The table is built from nothing in a temporary folder. Every plan is then measured end to end, in
turns with the full network and a narrow one, in three passes over all plans. Sums of layers timed
alone and multiply-adds predict the same plans in the same run; how well one pass predicts another
says what the machine allows. Keep the machine quiet meanwhile: what others did is recorded. A plan
beside which these two are slower or faster than in the table is measured again, for a while; on a
machine that others share, `--quiet` also waits for moments in which they leave the memory alone.
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.fidelity.isolated import IsolatedTable
from benchmarks.fidelity.measuring import (
    Setting,
    Swept,
    build_beside_neighbour,
    build_table,
    coverage_of,
    measure_plans,
)
from benchmarks.fidelity.records import Coverage, Errors, Result, SecondRun, errors_of, repeated_of
from benchmarks.fidelity.subjects import NETWORKS, held_out, subject_of
from benchmarks.quiet import SharedMemory
from hardware.device import this_device
from hardware.disturbance import between
from hardware.latency.sweep import digest_of
from hardware.records import save_record
from hardware.runtimes import RUNTIMES, get_runtime
from hardware.runtimes.base import EngineSettings
from pipeline.delivery.manifest import versions
from pipeline.report.progress import StageProgress


def run(options: argparse.Namespace, shown: StageProgress, folder: Path) -> Result:
    """Build the table, measure the plans, and return what was found."""
    runtime = get_runtime(options.runtime)
    settings = EngineSettings(threads=options.threads)
    memory = SharedMemory(options.quiet)
    setting = Setting(
        runtime=runtime,
        settings=settings,
        seed=options.seed,
        memory=memory,
        minutes=options.minutes,
        patience_s=options.patience,
    )
    subject, candidates = subject_of(options.network)
    digest = digest_of(subject.template)
    tables = _tables(options, setting, shown, folder)
    swept = tables.swept
    plans = held_out(candidates, subject.channels, options.plans, options.seed + 1)
    isolated = IsolatedTable(runtime, settings)
    before = runtime.counters()
    with shown.stage("Measuring plans that the table never saw") as progress:
        whole, *times = measure_plans(subject, plans, swept.table, setting, isolated, progress)
    measured = [plan.measured_ms for plan in times]
    like = [plan for plan in times if plan.is_at_pace]
    scale = whole.measured_ms / whole.isolated_ms
    return Result(
        network=options.network,
        runtime=runtime.name,
        runtime_version=runtime.version(),
        threads=settings.threads,
        precision=settings.precision,
        builds=swept.builds,
        table_minutes=setting.minutes,
        table_seconds=round(swept.seconds, 2),
        **errors_of([plan.predicted_ms for plan in times], measured).model_dump(),
        at_pace=errors_of([p.predicted_ms for p in like], [p.measured_ms for p in like])
        if like
        else None,
        plans_at_pace=len(like),
        quiet_ps=memory.limit_ps,
        waited_s=round(memory.waited_s, 1),
        isolated=errors_of([plan.isolated_ms for plan in times], measured),
        isolated_scaled=errors_of([scale * plan.isolated_ms for plan in times], measured),
        isolated_builds=len(isolated.known_ms),
        macs=errors_of([plan.macs_ms for plan in times], measured),
        repeated=repeated_of(times),
        full_ms=swept.table.anchors_ms[digest],
        second_run=SecondRun(builds=tables.again.builds, seconds=round(tables.again.seconds, 2)),
        after=tables.after,
        coverage=tables.coverage,
        crowded_variants=sum(v.is_crowded for v in swept.table.variants),
        disturbance=between(before, runtime.counters()),
        plans=tuple(times),
        seed=options.seed,
        device=this_device(),
        versions=versions(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tables:
    """What was measured into tables."""

    after: dict[str, int]  # builds of the networks before
    swept: Swept
    again: Swept  # the same with the table present
    coverage: Coverage | None


def _tables(
    options: argparse.Namespace, setting: Setting, shown: StageProgress, folder: Path
) -> _Tables:
    """Measure the networks before, the network, the same again, and where asked from nothing."""
    path, after = folder / "table.json", {}
    for name in options.after:
        with shown.stage(f"Measuring {name} before") as progress:
            after[name] = build_table(*subject_of(name), setting, path, progress).builds
    subject, candidates = subject_of(options.network)
    with shown.stage(f"Measuring {options.network} into the table") as progress:
        swept = build_table(subject, candidates, setting, path, progress)
    with shown.stage("The same with the table present") as progress:
        again = build_table(subject, candidates, setting, path, progress)
    coverage = None
    if options.repeat or options.neighbour:
        build = build_beside_neighbour if options.neighbour else build_table
        with shown.stage("The same from nothing again") as progress:
            other = build(subject, candidates, setting, folder / "again.json", progress)
        coverage = coverage_of(swept.table, other, digest_of(subject.template))
    return _Tables(after=after, swept=swept, again=again, coverage=coverage)


def show(found: Result, console: Console) -> None:
    """Print the errors as a table, and the rest in a few lines."""
    table = Table("table", "builds", "median %", "p95 %", "worst %", "bias %", title_justify="left")
    table.title = f"{found.network}, {found.runtime}, {found.threads} thread(s)"
    ours = Errors(**{name: getattr(found, name) for name in Errors.model_fields})
    alone = str(found.isolated_builds)
    for name, builds, errors in (
        ("in context", str(found.builds), ours),
        (f"the same, {found.plans_at_pace} plans at the table's pace", "", found.at_pace),
        ("layers alone, added", alone, found.isolated),
        ("the same, scaled to the full network", alone, found.isolated_scaled),
        ("multiply-adds times a constant", "0", found.macs),
        ("the plan itself, measured before", "", found.repeated),
    ):
        if errors is None:
            continue
        numbers = [f"{getattr(errors, field):.2f}" for field in Errors.model_fields]
        table.add_row(name, builds, *numbers)
    console.print(table)
    said = [
        f"The table took {found.table_seconds:.1f} s; with the table present "
        f"{found.second_run.builds} builds and {found.second_run.seconds:.1f} s."
    ]
    for name, before in found.after.items():
        said.append(f"{name} before took {before} builds, {found.network} then {found.builds}.")
    if found.coverage is not None:
        said.append(
            f"Of the second sweep's figures {found.coverage.entries_covered_pct} % (entries) and "
            f"{found.coverage.variants_covered_pct} % (end to end) lie in the first's intervals; "
            f"medians moved by {found.coverage.entry_change_pct} % and "
            f"{found.coverage.variant_change_pct} %."
        )
        if found.coverage.noticed_variants is not None:
            said.append(
                f"A neighbour spun beside {found.coverage.beside_variants} variants of the second "
                f"sweep; {found.coverage.noticed_variants} were marked and measured again."
            )
    if found.disturbance.is_crowded or found.crowded_variants:
        said.append(
            f"The machine was not quiet: others kept {found.disturbance.foreign_cores:.2f} cores "
            f"busy while plans were measured, and {found.crowded_variants} variants of the table "
            "were measured beside a busy neighbour."
        )
    console.print("\n".join(said), highlight=False)


def main() -> None:
    """Run one network on one runtime."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, required=True)
    parser.add_argument("--runtime", choices=sorted(RUNTIMES), required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--plans", type=int, default=20, help="random ones; three others come on top"
    )
    parser.add_argument("--after", choices=NETWORKS, action="append", default=[])
    parser.add_argument("--repeat", action="store_true", help="build the table twice and compare")
    parser.add_argument(
        "--neighbour",
        action="store_true",
        help="the same, and a process spins on one core during part of the second sweep",
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=90.0,
        metavar="SECONDS",
        help="of measuring plans again that did not meet the table's pace",
    )
    parser.add_argument(
        "--quiet",
        type=float,
        metavar="PS",
        help="wait for moments in which reading a byte takes at most so many picoseconds; "
        "python -m benchmarks.quiet says what is usual",
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="of measuring the table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with (
        StageProgress(Console(stderr=True)) as shown,
        tempfile.TemporaryDirectory(prefix="espalier-fidelity-") as folder,
    ):
        found = run(options, shown, Path(folder))
    if options.json is not None:
        save_record(found, options.json)
    show(found, Console(file=sys.stdout))


if __name__ == "__main__":
    main()

"""Sweep a network into a table, measure plans that the table never saw, and keep both."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.fidelity.isolated import IsolatedTable
from benchmarks.fidelity.records import Kept, KeptPlan, Pass, load_kept, save_kept
from benchmarks.fidelity.subjects import Candidates, held_out
from hardware.device import this_device
from hardware.latency.layers import LayerKey, macs_of
from hardware.latency.predict import keys_of
from hardware.latency.sweep import Goal, Place, sweep
from hardware.latency.table import LatencyTable, key_of, load_table
from hardware.latency.variant import FULL_ENGINES, Template
from hardware.latency.variant import PROTOCOL as VARIANT_PROTOCOL
from hardware.runtimes.base import Engine, EngineSettings, Runtime
from hardware.timing import ratio, time_together
from pipeline.delivery.deliver import versions

Progress = Callable[[int, int, str], None]

TABLE, PLANS = "table.json", "plans.json.gz"
# The first plans are measured twice, minutes apart and with engines loaded anew, to tell how far a
# plan's own time repeats.
PASSES, EVERY = 2, 3
PROTOCOL = replace(VARIANT_PROTOCOL, relative_width=0.005)  # a plan is what is judged by


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One network on one runtime, and how much is measured of it."""

    network: str
    runtime: Runtime
    settings: EngineSettings
    minutes: float
    plans: int  # random ones; three others come on top
    seed: int
    isolated: bool  # whether the plans' layers are timed alone too

    @property
    def name(self) -> str:
        """What its folder is called."""
        plain = "".join(c if c.isalnum() or c in "._-" else "-" for c in self.network)
        return f"{plain}-{self.runtime.name}-t{self.settings.threads}"


def keep_table(case: Case, template: Template, goal: Goal, path: Path, told: Progress) -> float:
    """Sweep the network into the table at that path; return the seconds that took."""
    key = key_of(case.runtime, case.settings, 1)
    table = load_table(path, key) if path.exists() else LatencyTable(key=key)
    place = Place(template=template, runtime=case.runtime, settings=case.settings, path=path)
    start = time.perf_counter()
    sweep(place, goal, table, told)
    return time.perf_counter() - start


def measure(
    case: Case, template: Template, candidates: Candidates, folder: Path, progress: Progress
) -> Kept:
    """Sweep and measure one case into a folder; what is there already is not measured again."""
    if (folder / PLANS).exists():
        return load_kept(folder / PLANS)
    goal = Goal(candidates=candidates, minutes=case.minutes, seed=case.seed)
    sweep_s = keep_table(case, template, goal, folder / TABLE, progress)
    drawn = held_out(candidates, template.channels, case.plans, case.seed + 1)
    found = _measure_plans(case, template, drawn, progress)
    alone = IsolatedTable(case.runtime, case.settings) if case.isolated else None
    keys: dict[LayerKey, int] = {}
    plans = []
    for (name, widths), passes in zip(drawn, found, strict=True):
        executed = keys_of(template.layers, template.complete(widths))
        plans.append(
            KeptPlan(
                name=name,
                widths=widths,
                layers=tuple(keys.setdefault(key, len(keys)) for key in executed),
                passes=tuple(passes),
                macs=macs_of(template.layers, widths),
                isolated_ms=None if alone is None else alone.sum_ms(template.layers, widths),
            )
        )
    kept = Kept(
        network=case.network,
        runtime=case.runtime.name,
        threads=case.settings.threads,
        template=template.digest,
        seed=case.seed,
        sweep_s=round(sweep_s, 1),
        full_macs=macs_of(template.layers, {}),
        device=this_device(),
        versions=versions(),
        keys=tuple(keys),
        plans=tuple(plans),
    )
    save_kept(kept, folder / PLANS)
    return kept


def _measure_plans(
    case: Case,
    template: Template,
    drawn: list[tuple[str, dict[str, int]]],
    progress: Progress,
) -> list[list[Pass]]:
    """Return the passes over each plan, each beside full networks that are loaded anew as well."""
    runtime, settings = case.runtime, case.settings
    found: list[list[Pass]] = [[] for _ in drawn]
    for turn in range(PASSES):
        fulls = [runtime.build(template.model, settings) for _ in range(FULL_ENGINES)]
        for number, (name, widths) in enumerate(drawn):
            if turn and number % EVERY:
                continue
            fulls = [*fulls[1:], runtime.build(template.model, settings)]
            found[number].append(_one_pass(runtime, settings, template, widths, fulls))
            progress(number + 1, len(drawn), f"{name}: {found[number][-1].ms:.4g} ms")
    return found


def _one_pass(
    runtime: Runtime,
    settings: EngineSettings,
    template: Template,
    widths: Mapping[str, int],
    fulls: Sequence[Engine],
) -> Pass:
    engine = runtime.build(template.carved(widths), settings)
    feeds = engine.random_feeds()
    full, plan = time_together(
        [[one.timer(feeds) for one in fulls], engine.timer(feeds)],
        PROTOCOL,
        foreign_s=lambda: runtime.counters().foreign_s,
    )
    ms = plan.latency.median_ms
    return Pass(ms=ms, full_ms=ms / ratio(plan, full).estimate)

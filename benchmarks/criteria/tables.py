"""The comparison as Markdown: means, spreads, and which differences are more than noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from benchmarks.criteria.records import Comparison, Cost, Result

SURE = 2.0  # standard errors of a difference, from which on it counts
SLOW_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The results of one name over all seeds, %."""

    name: str
    seeds: int
    before: float
    recalibrated: float
    after: float
    spread: float  # standard deviation of `after`; nan for one seed
    share: float


def summaries(results: Sequence[Result]) -> list[Summary]:
    """Return one summary per name, the best after fine-tuning first."""
    found = []
    for name in dict.fromkeys(result.name for result in results):
        own = [result for result in results if result.name == name]
        after = [result.after_pct for result in own]
        found.append(
            Summary(
                name=name,
                seeds=len(own),
                before=fmean(result.before_pct for result in own),
                recalibrated=fmean(result.recalibrated_pct for result in own),
                after=fmean(after),
                spread=stdev(after) if len(after) > 1 else math.nan,
                share=fmean(result.plan_share for result in own),
            )
        )
    return sorted(found, key=lambda one: -one.after)


def apart(one: Summary, other: Summary) -> bool | None:
    """Tell whether two means differ by more than noise; None where seeds are too few to tell."""
    error = math.sqrt(one.spread**2 / one.seeds + other.spread**2 / other.seeds)
    return None if math.isnan(error) else abs(one.after - other.after) > SURE * error


def verdict(found: Sequence[Summary], control: str) -> str:
    """Return in words which means differ from that of the control, and from the best."""
    by_name = {one.name: one for one in found}
    if control not in by_name or len(found) < 2:
        return f"There is nothing to hold against {control} yet."
    others = [one for one in found if one.name != control]
    told = {one.name: apart(one, by_name[control]) for one in others}
    if None in told.values():
        return "One seed does not tell noise from difference."
    better = [o.name for o in others if told[o.name] and o.after > by_name[control].after]
    worse = [o.name for o in others if told[o.name] and o.after < by_name[control].after]
    alike = [o.name for o in others if not told[o.name]]
    parts = [
        f"{text}: {', '.join(names)}."
        for text, names in (
            (f"Better than {control} by more than noise", better),
            (f"Worse than {control} by more than noise", worse),
            (f"Within noise of {control}", alike),
        )
        if names
    ]
    best = found[0]
    level = [one.name for one in found[1:] if not apart(best, one)]
    if level:
        parts.append(f"The best mean, {best.name}, is within noise of {', '.join(level)}.")
    return " ".join(parts)


def report(found: Comparison) -> str:
    """Return the whole comparison as Markdown."""
    setting = found.setting
    baseline = "not tested" if found.baseline_pct is None else f"{found.baseline_pct:.2f} %"
    lines = [
        "# Criteria and redundancy measures",
        "",
        f"{setting['model']['name']} {setting['model']['arguments']}, full network {baseline}; "
        f"{setting['finetune']['epochs']} epochs of fine-tuning; accuracies on the test images. "
        f"A difference counts from {SURE:g} standard errors on.",
        "",
    ]
    if found.criteria:
        lines += [
            f"## Every criterion at the same widths ({found.plan_share:.3f} of the latency)",
            "",
            *_table(summaries(found.criteria), "criterion"),
            "",
            verdict(summaries(found.criteria), "random"),
            "",
        ]
    if found.floors:
        lines += [
            "## Floors of every measure at the same latency target",
            "",
            *_table(summaries(found.floors), "floors by"),
            "",
            verdict(summaries(found.floors), "none"),
            "",
        ]
    lines += [f"- Floors by {name}: {text}" for name, text in found.impossible.items()]
    return "\n".join(lines).rstrip() + "\n"


def cost_report(title: str, costs: Sequence[Cost]) -> str:
    """Return what everything costs as Markdown, and what takes too long."""
    rows = [
        f"| {cost.name} | {cost.kind} | {cost.error or f'{cost.seconds:.1f}'} |" for cost in costs
    ]
    failed = [cost.name for cost in costs if cost.error]
    slow = [cost.name for cost in costs if cost.seconds > SLOW_S]
    ends = [
        f"Longer than {SLOW_S:g} s: {', '.join(slow) or 'none'}.",
        *([f"Not to be had: {', '.join(failed)}."] if failed else []),
    ]
    return "\n".join([f"# {title}", "", "| | | seconds |", "|---|---|---|", *rows, "", *ends, ""])


def _table(found: Sequence[Summary], heading: str) -> list[str]:
    lines = [
        f"| {heading} | seeds | pruned | recalibrated | fine-tuned | latency |",
        "|---|---|---|---|---|---|",
    ]
    return lines + [
        f"| {one.name} | {one.seeds} | {one.before:.2f} | {one.recalibrated:.2f} | "
        f"{one.after:.2f} ± {one.spread:.2f} | {one.share:.3f} |"
        for one in found
    ]

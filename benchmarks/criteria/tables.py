"""The comparison as Markdown: means, spreads, and which differences are more than noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats

from benchmarks.criteria.records import Comparison, Cost, Result

LEVEL = 0.05  # of all comparisons with one control together
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


def p_value(one: Summary, other: Summary) -> float:
    """Return the p-value of Welch's test of two means; nan where seeds are too few to tell."""
    if math.isnan(one.spread) or math.isnan(other.spread):
        return math.nan
    if one.spread == other.spread == 0:
        return float(one.after == other.after)
    found = stats.ttest_ind_from_stats(
        one.after, one.spread, one.seeds, other.after, other.spread, other.seeds, equal_var=False
    )
    return float(found.pvalue)


def differing(found: Sequence[Summary], control: Summary) -> set[str]:
    """Return the names whose means differ from the control's, by Holm's rule at `LEVEL` in all."""
    ordered = sorted((p_value(one, control), one.name) for one in found if one is not control)
    sure = set()
    for place, (value, name) in enumerate(ordered):
        if value > LEVEL / (len(ordered) - place):
            break
        sure.add(name)
    return sure


def verdict(found: Sequence[Summary], control: str) -> str:
    """Return in words which means differ from that of the control, and which from the best."""
    by_name = {one.name: one for one in found}
    if control not in by_name or len(found) < 2:
        return f"There is nothing to hold against {control} yet."
    if any(math.isnan(one.spread) for one in found):
        return "One seed does not tell noise from difference."
    held = by_name[control]
    sure = differing(found, held)
    others = [one for one in found if one is not held]
    parts = [
        f"{text}: {', '.join(names)}."
        for text, names in (
            (
                f"Better than {control}",
                [o.name for o in others if o.name in sure and o.after > held.after],
            ),
            (
                f"Worse than {control}",
                [o.name for o in others if o.name in sure and o.after < held.after],
            ),
            (f"Within noise of {control}", [o.name for o in others if o.name not in sure]),
        )
        if names
    ]
    level = {one.name for one in found[1:]} - differing(found, found[0])
    if level:
        names = [one.name for one in found if one.name in level]
        parts.append(f"The best mean, {found[0].name}, is within noise of {', '.join(names)}.")
    return " ".join(parts)


def report(found: Comparison) -> str:
    """Return the whole comparison as Markdown."""
    setting = found.setting
    baseline = "not tested" if found.baseline_pct is None else f"{found.baseline_pct:.2f} %"
    lines = [
        "# Criteria and redundancy measures",
        "",
        f"{setting['model']['name']} {setting['model']['arguments']}, full network {baseline}; "
        f"images {setting['data']['source']}, epochs of fine-tuning: "
        f"{setting['finetune']['epochs']}; accuracies on the test images. "
        f"Within noise: Welch's test, {100 * LEVEL:g} % over all comparisons together (Holm).",
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
    """Return what every criterion and measure costs as Markdown, and which take too long."""
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

"""What the planner trades, gathered from weights and images: floors, candidates and values."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pipeline import criteria, redundancy
from pipeline.diagnosis.diagnose import inapplicable_groups
from pipeline.errors import RecipeError
from pipeline.evidence.sensitivity import measure_damage
from pipeline.evidence.views import group_views
from pipeline.networks.analyse import Subject
from pipeline.planning.widths import (
    candidate_widths,
    values_from_damage,
    values_from_removals,
    values_from_saliency,
)
from pipeline.recipe import PlanSection
from pipeline.records import PlanningInputs, Progress, Values
from pipeline.redundancy.graph import removals
from pipeline.tasks.data import Data

Entry = TypeVar("Entry")


def gather_inputs(
    subject: Subject, data: Data, section: PlanSection, cache: Path, seed: int, progress: Progress
) -> PlanningInputs:
    """Return floors by redundancy, the candidate widths above them, and what each width is worth.

    Args:
        subject: the network to narrow.
        data: for calibration images.
        section: names the criterion, the measure of redundancy and the objective.
        cache: a file that keeps measured damage, so that a killed run continues.
        seed: of the choice of images.
        progress: takes how far measuring the damage is.

    Raises:
        RecipeError: there is no such criterion or measure.
    """
    network, channels = subject.network, subject.channels
    criterion = _named(criteria.CRITERIA, section.criterion, "plan.criterion")
    measure = _named(redundancy.MEASURES, section.redundancy, "plan.redundancy")
    batches = tuple(data.calibration(section.calibration_images, seed))
    wanted = (criteria.NEEDS.get(section.criterion), redundancy.NEEDS.get(section.redundancy))
    views = group_views(network, channels, batches, needs=[need for need in wanted if need])
    floors = tuple(measure(view) for view in views)
    saliency = {view.name: criterion(view) for view in views}
    candidates = candidate_widths(channels, floors, section.step, section.empty_branches)
    values: Values
    if section.objective == "saliency":
        values = values_from_saliency(saliency, candidates)
    elif section.objective == "redundancy":
        values = values_from_removals(removals(views), candidates)
    else:
        damage = measure_damage(
            network, channels, saliency, candidates, batches, progress=progress, cache=cache
        )
        values = values_from_damage(damage, candidates)
    return PlanningInputs(
        channels=channels,
        candidates=candidates,
        values=values,
        floors=floors,
        saliency=saliency,
        inapplicable=inapplicable_groups(views, section.criterion, criterion, saliency),
    )


def _named(known: Mapping[str, Entry], name: str, key: str) -> Entry:
    """Return the entry of that name.

    Raises:
        RecipeError: there is none.
    """
    if name not in known:
        raise RecipeError(f"{key} is {name!r}; there are {', '.join(known)}.")
    return known[name]

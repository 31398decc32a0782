"""Measure how long every criterion and every measure takes on one network."""

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks.criteria.records import Cost
from pipeline.channels.find import find_groups
from pipeline.criteria import CRITERIA
from pipeline.errors import PipelineError
from pipeline.evidence.needs import GRADIENTS, RESPONSES
from pipeline.evidence.views import group_views
from pipeline.networks.export import export_graph
from pipeline.networks.load import load_network
from pipeline.recipe import ModelSection
from pipeline.records import GroupView, Progress
from pipeline.redundancy import MEASURES
from pipeline.redundancy.graph import removals
from pipeline.redundancy.network import network_redundancy


def measure_costs(
    section: ModelSection, images: int, batch: int, progress: Progress
) -> tuple[Cost, ...]:
    """Return the seconds of collecting, and then of every criterion and measure, on all groups.

    The images are noise: what is measured is time. What is collected once serves all criteria
    that need it, so it is listed by itself. Patterns are not collected: on a network of large
    images that takes hours, and the measure that needs them is listed as not to be had.
    """
    network = load_network(section)
    channels = find_groups(export_graph(network))
    draw = torch.Generator().manual_seed(0)
    batches = [
        (
            torch.randn(count, *section.input_shape, generator=draw),
            torch.zeros(count, dtype=torch.int64),
        )
        for count in [batch] * (images // batch) + ([images % batch] if images % batch else [])
    ]
    found: list[Cost] = []
    needs = {"gradients": GRADIENTS, "responses": RESPONSES}
    total = len(needs) + len(CRITERIA) + len(MEASURES) + 2

    def take(name: str, kind: str, work: Callable[[], object]) -> None:
        found.append(timed(name, kind, work))
        progress(len(found), total, f"{name}: {found[-1].seconds:.1f} s")

    for name, need in needs.items():
        take(name, "collecting", partial(group_views, network, channels, batches, [need]))
    views = group_views(network, channels, batches, needs=tuple(needs.values()))
    for name, criterion in CRITERIA.items():
        take(name, "criterion", partial(on_all, criterion, views))
    for name, measure in MEASURES.items():
        take(name, "measure", partial(on_all, measure, views))
    take("removal loop", "measure", partial(removals, views))
    take("maximum compression, CKA", "measure", partial(network_redundancy, views))
    return tuple(found)


def timed(name: str, kind: str, work: Callable[[], object]) -> Cost:
    """Return how long some work takes, or why it cannot be done."""
    begun, error = time.perf_counter(), ""
    try:
        work()
    except PipelineError as failure:
        error = str(failure)
    return Cost(name=name, kind=kind, seconds=time.perf_counter() - begun, error=error)


def on_all(work: Callable[[GroupView], object], views: Sequence[GroupView]) -> None:
    """Call a function with every group, one after the other."""
    for view in views:
        work(view)

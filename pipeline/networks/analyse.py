"""From a network to what is pruned: its graph, its groups, and the form in which it loses most."""

import copy
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx

from hardware.graph.channel_map import ChannelMap, Keep
from hardware.latency.layers import Layer
from hardware.latency.template_layers import layers_of
from pipeline.channels.counts import prunable_shares
from pipeline.channels.find import find_groups
from pipeline.errors import NetworkError, RecipeError, SurgeryError, first_line
from pipeline.networks.conversion import graph_form
from pipeline.networks.export import export_graph
from pipeline.networks.fold_norms import fold_norms
from pipeline.recipe import Surgery
from pipeline.records import Form, Network
from pipeline.surgery.forms import GraphBacked
from pipeline.surgery.narrow import run_once
from pipeline.surgery.proof import find_guilty, first_draw
from pipeline.surgery.remove import each, failing, joined, prune

log = logging.getLogger(__name__)

# What the class form may lose, of the channels that the graph can, before `auto` takes the graph.
# The user's own class is worth a few channels: their code trains and loads it, and what an export
# drops (stochastic depth) stays. Beyond that the planner misses them: a stream that may not be
# narrowed keeps the time of every layer that reads or writes it.
TOLERATED_LOSS = 0.03
PATTERNS = 6  # of widths, to find out what a class's forward can lose


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A network in the form that is pruned, and what its graph says about it."""

    network: Network
    template: onnx.ModelProto  # batch norms folded: what is carved, built and timed
    channels: ChannelMap
    layers: tuple[Layer, ...]
    form: Form


def analyse(network: Network, batch: int, surgery: Surgery = "auto") -> Subject:
    """Return a network's pruning groups and layers, in the form that `surgery` asks for.

    In class form the groups are frozen that the class's `forward` cannot lose. `auto` takes it
    unless it loses more than 3 per cent of the convolution output channels that the graph can
    lose, and also where the graph form cannot be had.

    Args:
        network: of a class, or in graph form already.
        batch: images per inference.
        surgery: auto, class or graph.

    Raises:
        NetworkError: the network cannot be exported, or has no graph form and must have one.
        RecipeError: the class form is asked for, and there is no class.
    """
    if isinstance(network.module, GraphBacked):
        if surgery == "class":
            raise RecipeError(
                f"surgery is 'class', but {network.spec} has no class: it is a graph. "
                "Say surgery=auto or surgery=graph."
            )
        return _in_graph_form(network, batch, "the network is a graph, without a class")
    if surgery == "graph":
        return _in_graph_form(graph_form(network), batch, "surgery=graph asks for it")
    subject = _in_class_form(network, batch)
    if surgery == "class":
        return _with_reason(subject, "surgery=class asks for it")
    form = subject.form
    if _is_tolerated(form):
        return _with_reason(subject, _compared(form))
    try:
        graph = graph_form(network)
    except NetworkError as error:
        reason = f"{_compared(form)}, but the graph form cannot be had: {first_line(error)}"
        log.warning("%s: %s", network.spec, reason)
        return _with_reason(subject, reason)
    return _in_graph_form(graph, batch, _compared(form), form.class_share)


def _in_class_form(network: Network, batch: int) -> Subject:
    graph = export_graph(network, batch)
    found = find_groups(graph)
    template = fold_norms(graph)
    layers = layers_of(template, found)
    channels = fit_to_class(network, found)
    form = Form(
        taken="class",
        reason="",
        graph_share=prunable_shares(found, layers).channels,
        class_share=prunable_shares(channels, layers).channels,
    )
    return Subject(network=network, template=template, channels=channels, layers=layers, form=form)


def _in_graph_form(
    network: Network, batch: int, reason: str, class_share: float | None = None
) -> Subject:
    graph = export_graph(network, batch)
    channels = find_groups(graph)
    template = fold_norms(graph)
    layers = layers_of(template, channels)
    share = prunable_shares(channels, layers).channels
    form = Form(taken="graph", reason=reason, graph_share=share, class_share=class_share)
    return Subject(network=network, template=template, channels=channels, layers=layers, form=form)


def _with_reason(subject: Subject, reason: str) -> Subject:
    return replace(subject, form=subject.form.model_copy(update={"reason": reason}))


def _compared(form: Form) -> str:
    """Return in words what the class can lose, beside the graph."""
    assert form.class_share is not None
    if form.class_share >= form.graph_share:
        return "the class can lose all that the graph can"
    relation = "at most" if _is_tolerated(form) else "more than"
    return f"the class keeps {relation} {TOLERATED_LOSS:.0%} of what the graph can lose"


def _is_tolerated(form: Form) -> bool:
    """Return whether the class form loses nearly as much as the graph can."""
    assert form.class_share is not None
    return form.class_share >= (1 - TOLERATED_LOSS) * form.graph_share


def fit_to_class(network: Network, channels: ChannelMap) -> ChannelMap:
    """Return the channel map with the groups frozen that the class's `forward` cannot narrow.

    The narrowed class runs without numbers (on torch's meta device; on the CPU where its `forward`
    cannot run there), at several patterns of widths, then once with numbers, against masking.
    Where that fails, the groups are halved until the guilty ones are found; of groups that fail
    only together the later ones are frozen. Branches that cannot be emptied are dropped. A network
    in graph form has no class that could refuse.

    Args:
        network: stays as it is.
        channels: its channel map, as the analysis of its graph gives it.
    """
    if isinstance(network.module, GraphBacked):
        return channels
    bare = _without_numbers(network)
    reasons: dict[str, str] = {}
    widths = {g.name: g.width for g in channels.prunable if g.width > 1}
    for number in range(PATTERNS):
        keep = {n: _pattern(w, n, number) for n, w in widths.items() if n not in reasons}
        found = failing(tuple(keep), _trial(bare, channels, each(keep)))
        reasons |= {
            name: f"the class's forward fixes this size: {why}" for name, why in found.items()
        }
    half = {n: _pattern(w, n, 1) for n, w in widths.items() if n not in reasons}
    exact = {n: units for n, units in half.items() if channels.group(n).mixes is None}
    full, batch = first_draw(network)
    found = find_guilty(full, channels, each(exact), batch)
    reasons |= {
        name: f"the class computes otherwise without it: {why}" for name, why in found.items()
    }
    half = {name: units for name, units in half.items() if name not in reasons}
    emptied: dict[str, Keep] = {b.name: dict.fromkeys(b.groups, ()) for b in channels.branches}
    kept_branches = failing(tuple(emptied), _trial(bare, channels, emptied, half))
    groups = tuple(
        group.model_copy(update={"frozen": reasons[group.name]}) if group.name in reasons else group
        for group in channels.groups
    )
    branches = tuple(branch for branch in channels.branches if branch.name not in kept_branches)
    return channels.model_copy(update={"groups": groups, "branches": branches})


def _pattern(width: int, name: str, number: int) -> tuple[int, ...]:
    """Return which channels of a group stay in one trial.

    All but one, half, then as many as chance has it, so that groups of equal width come to differ.
    """
    if number == 0:
        return tuple(range(1, width))
    if number == 1:
        return tuple(range(width // 2))
    source = random.Random(f"{name} {number}")
    return tuple(sorted(source.sample(range(width), source.randint(1, width))))


def _without_numbers(network: Network) -> Network:
    """Return the network on the meta device where it runs there, else a copy on the CPU."""
    bare = replace(network, module=copy.deepcopy(network.module).to("meta"))
    try:
        run_once(bare.module, network.example().to("meta"))
    except SurgeryError:
        return replace(network, module=copy.deepcopy(network.module).cpu())
    return bare


def _trial(
    network: Network, channels: ChannelMap, parts: Mapping[str, Keep], rest: Keep | None = None
) -> Callable[[Sequence[str]], str | None]:
    """Return a function that prunes the named parts at once and says what failed, if anything."""

    def fails(names: Sequence[str]) -> str | None:
        try:
            prune(network, channels, {**(rest or {}), **joined(parts, names)})
        except SurgeryError as error:
            return first_line(error)
        return None

    return fails

"""From a network to what is pruned: its graph, its groups, and the form in which it loses most."""

import logging
from dataclasses import dataclass, replace

import onnx

from hardware.graph.channel_map import ChannelMap
from hardware.graph.fold_norms import fold_norms
from hardware.latency.layers import Layer
from hardware.latency.template_layers import layers_of
from pipeline.channels.counts import prunable_shares
from pipeline.channels.find import find_groups
from pipeline.errors import NetworkError, RecipeError, first_line
from pipeline.networks.export import export_graph
from pipeline.networks.graphform.build import graph_form
from pipeline.recipe import Surgery
from pipeline.records import Form, Network
from pipeline.surgery.forms import GraphBacked
from pipeline.surgery.prune import fit_to_class

log = logging.getLogger(__name__)

# What the class form may lose, of the channels that the graph can, before `auto` takes the graph.
# The user's own class is worth a few channels: their code trains and loads it, and what an export
# drops (stochastic depth) stays. Beyond that the planner misses them: a stream that may not be
# narrowed keeps the time of every layer that reads or writes it.
TOLERATED_LOSS = 0.03


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

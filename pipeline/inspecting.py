"""What can be pruned in a network, and why the rest cannot: for `espalier inspect`."""

import logging
from dataclasses import dataclass
from pathlib import Path

from hardware.carving import load_model
from hardware.channels import ChannelMap
from hardware.cleaning import fold_norms
from hardware.layers import Layer, layers_of
from hardware.preparing import prepare
from hardware.storing import Record
from pipeline.channels import find_groups
from pipeline.counting import prunable_shares
from pipeline.errors import RecipeError
from pipeline.exporting import export_graph
from pipeline.models import load_network
from pipeline.pruning import fit_to_class
from pipeline.recipe import ModelSection
from pipeline.records import Floor
from pipeline.redundancy import MEASURES
from pipeline.views import group_views

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """The pruning groups of a network with the redundancy of each."""

    title: str
    channels: ChannelMap
    layers: tuple[Layer, ...]
    floors: tuple[Floor, ...]
    notes: tuple[str, ...] = ()  # what was decided to make an ONNX file's shapes static


class InspectionSummary(Record):
    """What `espalier inspect --json` prints."""

    model: str
    notes: tuple[str, ...] = ()  # what was decided to make an ONNX file's shapes static
    prunable_channel_share: float  # of all convolution output channels
    prunable_macs_share: float
    groups: tuple[dict[str, object], ...]
    branches: tuple[str, ...]
    frozen: tuple[dict[str, object], ...]
    unknown_operators: dict[str, int]


def parse_shape(text: str) -> tuple[int, int, int]:
    """Return "3,224,224" as numbers.

    Raises:
        RecipeError: not three whole numbers of at least 1.
    """
    parts = text.replace("x", ",").split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise RecipeError(f"An input shape is channels,height,width, as 3,224,224; got {text!r}.")
    channels, height, width = (int(part) for part in parts)
    return channels, height, width


def inspect_model(
    name: str, input_shape: str, weights: Path | None = None, redundancy: str = "graph"
) -> Inspection:
    """Return the pruning groups of a network, those frozen that its class cannot lose.

    Args:
        name: timm:NAME, torchvision:NAME, package.module:factory, or an ONNX file, whose groups
            are shown as the graph has them, without their redundancy.
        input_shape: "channels,height,width"; an ONNX file has its own, and a batch that it leaves
            open becomes 1.
        weights: a safetensors file; without it redundancy is that of random weights.
        redundancy: one of MEASURES.

    Raises:
        NetworkError: the network cannot be found, built or exported.
        ModelError: the ONNX file is corrupt, or leaves sizes open.
    """
    if name.endswith(".onnx"):
        graph, notes = prepare(load_model(Path(name)))
        for note in notes:
            log.warning("%s: %s", name, note)
        channels = find_groups(graph)
        layers = layers_of(fold_norms(graph), channels)
        return Inspection(title=name, channels=channels, layers=layers, floors=(), notes=notes)
    section = ModelSection(name=name, weights=weights, input_shape=parse_shape(input_shape))
    network = load_network(section)
    graph = export_graph(network)
    channels = fit_to_class(network, find_groups(graph))
    views = group_views(network, channels)
    return Inspection(
        title=name,
        channels=channels,
        layers=layers_of(fold_norms(graph), channels),
        floors=tuple(MEASURES[redundancy](view) for view in views),
    )


def summarize(inspection: Inspection) -> InspectionSummary:
    """Return an inspection as plain numbers and texts."""
    channels = inspection.channels
    shares = prunable_shares(channels, inspection.layers)
    floors = {floor.group: floor for floor in inspection.floors}
    return InspectionSummary(
        model=inspection.title,
        notes=inspection.notes,
        prunable_channel_share=shares.channels,
        prunable_macs_share=shares.macs,
        groups=tuple(
            {
                "name": group.name,
                "width": group.width,
                "floor": floors[group.name].floor if group.name in floors else group.width,
                "layers": list(group.producers),
                "frozen": group.frozen,
                "mixes": group.mixes,
            }
            for group in channels.groups
        ),
        branches=tuple(branch.name for branch in channels.branches),
        frozen=tuple(axis.model_dump() for axis in channels.frozen),
        unknown_operators=dict(channels.unknown_operators),
    )

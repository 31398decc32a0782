"""What can be pruned in a network, and why the rest cannot: all of `espalier inspect`.

`question_of` reads what a command line asks for and `inspect_model` answers it. The answer is shown
as a page (`write_inspection`), as JSON (`summarize`), or by the tables of `report.tables`.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hardware.graph.channel_map import ChannelMap
from hardware.graph.model import load_model
from hardware.latency.layers import Layer
from hardware.latency.template_layers import layers_of
from hardware.records import Record
from pipeline.channels.counts import (
    coupled_layers,
    frozen_rows,
    prunable_macs,
    prunable_shares,
)
from pipeline.channels.find import find_groups
from pipeline.criteria import CRITERIA
from pipeline.diagnosis.diagnose import Diagnosis, diagnose
from pipeline.errors import RecipeError
from pipeline.evidence.needs import GRADIENTS, RESPONSES
from pipeline.evidence.views import group_views
from pipeline.networks.analyse import analyse
from pipeline.networks.fold_norms import fold_norms
from pipeline.networks.load import load_network
from pipeline.networks.prepare import prepare
from pipeline.recipe import DataSection, ModelSection, Surgery, read_recipe
from pipeline.records import Floor, Form
from pipeline.redundancy import MEASURES, SCORES
from pipeline.redundancy.network import NetworkRedundancy, network_redundancy
from pipeline.report import figures as drawing
from pipeline.report.diagnosis_figures import diagnosis_figures
from pipeline.report.report import write_page
from pipeline.tasks.data import load_data

log = logging.getLogger(__name__)

# Small, so that few images give many gradients.
DIAGNOSED_BATCH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """The pruning groups of a network with the redundancy of each."""

    title: str
    channels: ChannelMap
    layers: tuple[Layer, ...]
    floors: tuple[Floor, ...]
    form: Form
    notes: tuple[str, ...] = ()  # what was decided to make an ONNX file's shapes static
    diagnosis: Diagnosis | None = None
    network: NetworkRedundancy | None = None
    replaceable: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # per group


class InspectionSummary(Record):
    """What `espalier inspect --json` prints."""

    model: str
    notes: tuple[str, ...] = ()  # what was decided to make an ONNX file's shapes static
    form: Form
    prunable_channel_share: float  # of all convolution output channels
    prunable_macs_share: float
    groups: tuple[dict[str, object], ...]
    branches: tuple[str, ...]
    frozen: tuple[dict[str, object], ...]
    unknown_operators: dict[str, int]
    diagnosis: Diagnosis | None = None  # where asked for
    network: NetworkRedundancy | None = None  # likewise


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is to be inspected."""

    model: ModelSection
    surgery: Surgery = "auto"
    data: DataSection | None = None  # to compare criteria on


def question_of(
    model: str,
    *,
    input_shape: str | None = None,
    weights: Path | None = None,
    surgery: Surgery | None = None,
    diagnose: bool = False,
    data: str | None = None,
    overrides: tuple[str, ...] = (),
) -> Question:
    """Return what a command line asks for; a recipe brings its model, surgery and data sections.

    Args:
        model: timm:NAME, torchvision:NAME, package.module:factory, path/to/file.py:factory, an
            ONNX file, or a recipe.
        input_shape: "channels,height,width"; None: 3,224,224, or the recipe's.
        weights: a safetensors file.
        surgery: the form that is looked at; None: the recipe's, or auto.
        diagnose: whether criteria are compared on images.
        data: "digits", a folder of images, or a recipe, whose data section is taken.
        overrides: `key.sub=value`, of the recipe.

    Raises:
        RecipeError: the recipe cannot be read, or what is given contradicts itself.
    """
    if data is not None and not diagnose:
        raise RecipeError("--data is for --diagnose: give both, or none.")
    if not _is_recipe(model):
        if overrides:
            raise RecipeError(f"--set changes a recipe, and {model} is none.")
        if diagnose and data is None:
            raise RecipeError("--diagnose needs images: --data digits, a folder, or a recipe.")
        return Question(
            model=ModelSection(
                name=model, weights=weights, input_shape=parse_shape(input_shape or "3,224,224")
            ),
            surgery=surgery or "auto",
            data=_diagnosed(data) if data is not None else None,
        )
    if input_shape is not None or weights is not None:
        raise RecipeError(
            f"{model} is a recipe and names its own weights and input shape; for others, "
            "--set model.weights=FILE, --set model.input_shape=[3,224,224]."
        )
    recipe = read_recipe(Path(model), overrides)
    images = _in_small_batches(recipe.data) if data is None else _diagnosed(data)
    return Question(
        model=recipe.model,
        surgery=surgery or recipe.surgery,
        data=images if diagnose else None,
    )


def _is_recipe(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _diagnosed(source: str) -> DataSection:
    """Return the images that a name stands for, as a diagnosis takes them."""
    is_recipe = _is_recipe(source)
    section = read_recipe(Path(source)).data if is_recipe else DataSection(source=source)
    return _in_small_batches(section)


def _in_small_batches(section: DataSection) -> DataSection:
    """Return the images in the small batches that gradients need, as they are."""
    return section.model_copy(update={"batch": DIAGNOSED_BATCH, "augment": ()})


def inspect_model(question: Question, redundancy: str = "graph", images: int = 256) -> Inspection:
    """Return the pruning groups of a network, those frozen that its class cannot lose.

    Args:
        question: which network, in which form, on which images. An ONNX file's groups are shown as
            the graph has them, without their redundancy; it has its own input shape, and a batch
            that it leaves open becomes 1. Without weights redundancy is that of random ones.
        redundancy: one of MEASURES.
        images: how many of the training images, at most.

    Raises:
        NetworkError: the network cannot be found, built or exported.
        ModelError: the ONNX file is corrupt, or leaves sizes open.
        DataError: images are missing or unreadable.
        RecipeError: an ONNX file is to be diagnosed, or pruned as a class.
    """
    section, data = question.model, question.data
    if section.file is not None:
        return _inspect_file(section.file, question)
    subject = analyse(load_network(section), 1, question.surgery)
    network, channels = subject.network, subject.channels
    batches = load_data(data, network.input_shape, 0).calibration(images, 0) if data else None
    views = group_views(network, channels, batches, needs=(GRADIENTS, RESPONSES))
    seen = sum(len(labels) for _, labels in batches or ())
    return Inspection(
        title=section.name,
        channels=channels,
        layers=subject.layers,
        form=subject.form,
        floors=tuple(MEASURES[redundancy](view) for view in views),
        diagnosis=diagnose(views, CRITERIA, seen) if batches is not None else None,
        replaceable={
            view.name: tuple(round(value, 4) for value in SCORES[redundancy](view).tolist())
            for view in views
        },
        network=network_redundancy(views) if batches is not None and views else None,
    )


def _inspect_file(path: Path, question: Question) -> Inspection:
    """Return the pruning groups of an ONNX file."""
    if question.data is not None:
        raise RecipeError("Criteria are compared on a torch network; give one, not an ONNX file.")
    if question.surgery == "class":
        raise RecipeError(f"{path} has no class: take --surgery auto or graph.")
    graph, notes = prepare(load_model(path))
    for note in notes:
        log.warning("%s: %s", path, note)
    channels = find_groups(graph)
    layers = layers_of(fold_norms(graph), channels)
    share = prunable_shares(channels, layers).channels
    form = Form(taken="graph", reason="an ONNX file has no class", graph_share=share)
    return Inspection(
        title=str(path), channels=channels, layers=layers, floors=(), form=form, notes=notes
    )


def write_inspection(found: Inspection, path: Path) -> None:
    """Write an inspection as one HTML page.

    Raises:
        StorageError: the page cannot be written.
    """
    channels = found.channels
    rows = [(layer, prunable_macs(layer, channels)) for layer in found.layers]
    bars = [
        drawing.Bar(name=layer.name, before=layer.macs / 1e6, after=macs / 1e6)
        for layer, macs in rows
        if layer.macs
    ]
    macs_figure = drawing.draw(
        "macs",
        f"Multiply-adds of {len(bars)} layers in graph order, and the part that is prunable",
        lambda width: drawing.paired_bars(bars, "million multiply-adds", width),
    )
    write_page(
        path,
        "inspection.html.j2",
        title=found.title,
        form=found.form,
        channels=channels,
        floors={floor.group: floor for floor in found.floors},
        layers=rows,
        shares=prunable_shares(channels, found.layers),
        frozen=frozen_rows(channels),
        coupled={group.name: coupled_layers(group) for group in channels.groups},
        diagnosis=found.diagnosis,
        network=found.network,
        figures={"macs": macs_figure, **diagnosis_figures(found.diagnosis, found.network)},
    )


def summarize(inspection: Inspection) -> InspectionSummary:
    """Return an inspection as plain numbers and texts."""
    channels = inspection.channels
    shares = prunable_shares(channels, inspection.layers)
    floors = {floor.group: floor for floor in inspection.floors}
    return InspectionSummary(
        model=inspection.title,
        notes=inspection.notes,
        form=inspection.form,
        prunable_channel_share=shares.channels,
        prunable_macs_share=shares.macs,
        groups=tuple(
            {
                "name": group.name,
                "width": group.width,
                "floor": floors[group.name].floor if group.name in floors else group.width,
                "redundancy": floors[group.name].score if group.name in floors else None,
                "redundancy_of_random": floors[group.name].null if group.name in floors else None,
                "replaceable": list(inspection.replaceable.get(group.name, ())),
                "layers": list(group.producers),
                "frozen": group.frozen,
                "mixes": group.mixes,
            }
            for group in channels.groups
        ),
        branches=tuple(branch.name for branch in channels.branches),
        frozen=tuple(axis.model_dump() for axis in channels.frozen),
        unknown_operators=dict(channels.unknown_operators),
        diagnosis=inspection.diagnosis,
        network=inspection.network,
    )

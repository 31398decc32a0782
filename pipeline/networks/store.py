"""Pruned networks on disk: weights as safetensors, and what rebuilds the class around them."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from pydantic_core import PydanticSerializationError
from safetensors.torch import load, save
from torch import Tensor, nn

from hardware.errors import StorageError
from hardware.graph.channel_map import ChannelMap, Keep
from hardware.records import Record, load_record, save_record, write_whole
from pipeline.errors import NetworkError, SurgeryError
from pipeline.networks.conversion import rebuild
from pipeline.networks.factories import file_of
from pipeline.networks.graphform.module import GraphForm, Roles
from pipeline.networks.load import load_network, load_weights
from pipeline.recipe import ModelSection
from pipeline.records import Network
from pipeline.surgery.empty import Zeros, ZerosRule, replace_layers, set_zero, zeros_of
from pipeline.surgery.narrow import fit_attributes, named_tensors, parts_of, run_once

WEIGHTS, ARCHITECTURE = "model.safetensors", "architecture.json"
GRAPH = "architecture.onnx"  # of a network in graph form: the carved graph, without weights


class Architecture(Record):
    """What makes a pruned network of the class that it came from, besides the weights."""

    spec: str  # as in the recipe: "timm:NAME", "package.module:factory", "path/to/file.py:factory"
    arguments: Mapping[str, Any]  # Any: the user's keyword arguments, as JSON holds them
    input_shape: tuple[int, ...]
    shapes: Mapping[str, tuple[int, ...]]  # parameters and buffers that were narrowed
    parts: Mapping[str, int]  # conv_groups and norm groups that changed, by layer
    emptied: Mapping[str, ZerosRule]  # layers of emptied branches, by path
    untrained: tuple[str, ...]  # parameters that surgery set to zero for good
    keep: Mapping[str, tuple[int, ...]]  # per pruning group the original channels that are left
    widths: Mapping[str, int]  # of the same groups in the original network
    weights_sha256: str
    graph: Roles | None = None  # of a network in graph form: what the graph's tensors are
    graph_sha256: str | None = None
    file: str | None = None  # where the Python file lay that `spec` names, from the root


def save_network(
    network: Network, original: Network, channels: ChannelMap, keep: Keep, folder: Path
) -> None:
    """Write a pruned network as `model.safetensors` and `architecture.json`.

    Of a network in graph form, `architecture.onnx` is the carved graph without its weights.

    Args:
        network: pruned, any number of times, from `original`.
        original: gives the shapes before pruning.
        channels: the channel map of `original`.
        keep: per group of `channels` the channels that are left; for the reader of the file.
        folder: created where it is missing.

    Raises:
        StorageError: the folder cannot be written, or the arguments are not JSON.
    """
    before, after = named_tensors(original.module), named_tensors(network.module)
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in after.items()
        if name in before and tensor.shape != before[name].shape
    }
    form = network.module if isinstance(network.module, GraphForm) else None
    graph = form.architecture().SerializeToString() if form else b""
    hidden = () if form else tuple(shapes)  # the graph holds its constants itself
    weights = save(_unique(network.module, also=hidden))
    architecture = Architecture(
        spec=network.spec,
        arguments=network.arguments,
        input_shape=network.input_shape,
        shapes=shapes,
        parts=dict(parts_of(network.module).items() - parts_of(original.module).items()),
        emptied={path: layer.rule for path, layer in zeros_of(network.module).items()},
        untrained=tuple(
            name
            for name, tensor in network.module.named_parameters()
            if name in before and before[name].requires_grad and not tensor.requires_grad
        ),
        keep=keep,
        widths={name: channels.group(name).width for name in keep},
        weights_sha256=hashlib.sha256(weights).hexdigest(),
        graph=form.roles if form else None,
        graph_sha256=hashlib.sha256(graph).hexdigest() if form else None,
        file=str(file.resolve()) if (file := file_of(network.spec)) is not None else None,
    )
    try:
        architecture.model_dump(mode="json")
    except PydanticSerializationError as error:
        raise StorageError(
            f"The arguments of {network.spec} cannot be stored as JSON: {error}. Use numbers, "
            "texts, lists and mappings in `model.arguments`."
        ) from error
    write_whole(folder / WEIGHTS, weights)
    if form:
        write_whole(folder / GRAPH, graph)
    save_record(architecture, folder / ARCHITECTURE)


def load_pruned(folder: Path) -> Network:
    """Return the pruned network that `save_network` wrote, in evaluation mode, on the CPU.

    The class is built from its name anew, narrowed to the stored shapes, and given the weights;
    nothing is analysed and nothing is unpickled. A graph form is built from its stored graph.

    Raises:
        StorageError: a file is missing, damaged, or does not belong to the other one.
        NetworkError: the class cannot be built, or is not the one that was pruned.
    """
    architecture = load_record(Architecture, folder / ARCHITECTURE)
    weights = load(_read(folder / WEIGHTS, architecture.weights_sha256))
    if architecture.graph is not None:
        return _load_graph_form(folder, architecture, weights)
    network = load_network(
        ModelSection.model_validate(
            {
                "name": _name_of(architecture, folder),
                "arguments": dict(architecture.arguments),
                "input_shape": architecture.input_shape,
            }
        )
    )
    module = network.module
    try:
        _reshape(module, architecture.shapes)
        replace_layers(module, {path: Zeros(rule) for path, rule in architecture.emptied.items()})
        fit_attributes(module, architecture.parts)
    except (SurgeryError, AttributeError) as error:
        raise NetworkError(
            f"{architecture.spec} is not the network that {folder / ARCHITECTURE} was written for: "
            f"{error}. Load it with the version of the class that was pruned."
        ) from error
    _load_hidden(module, weights)
    load_weights(module, weights, folder / WEIGHTS)
    set_zero(module, architecture.untrained)
    run_once(module, network.example())
    return network


def _name_of(architecture: Architecture, folder: Path) -> str:
    """Return the name under which the class is found now: its file may lie in another folder.

    Where it lay counts before the path in the recipe, which may be that of another project's file
    in the current folder.
    """
    named = file_of(architecture.spec)
    if named is None or architecture.file is None:
        return architecture.spec
    for file in (Path(architecture.file), named):
        if file.is_file():
            return f"{file}:{architecture.spec.rpartition(':')[2]}"
    raise NetworkError(
        f"{folder} holds a network of {architecture.spec}, and that file is neither at "
        f"{architecture.file}, where it lay, nor at {named.resolve()}. Put it there, or load the "
        f"network from the folder in which {named} is."
    )


def _load_graph_form(
    folder: Path, architecture: Architecture, weights: dict[str, Tensor]
) -> Network:
    assert architecture.graph is not None and architecture.graph_sha256 is not None
    graph = onnx.load_from_string(_read(folder / GRAPH, architecture.graph_sha256))
    module = rebuild(graph, architecture.graph, weights)
    for name in architecture.untrained:
        module.get_parameter(name).requires_grad_(False)
    return Network(
        module=module,
        spec=architecture.spec,
        arguments=dict(architecture.arguments),
        input_shape=architecture.input_shape,
    )


def _read(path: Path, sha256: str) -> bytes:
    """Return a file's content, after comparing its digest."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(f"Cannot read {path}: {error.strerror or error}.") from error
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise StorageError(
            f"{path} is not the file that {ARCHITECTURE} beside it was written with: its SHA-256 "
            f"is {found[:12]}..., not {sha256[:12]}... It is damaged, or the two files are of "
            "different networks. Copy both again."
        )
    return content


def _unique(module: nn.Module, also: tuple[str, ...]) -> dict[str, Tensor]:
    """Return what the state_dict holds, tied tensors once, and the named buffers that it hides."""
    state: dict[str, Tensor] = module.state_dict(keep_vars=True)
    everything = named_tensors(module)
    state |= {name: everything[name] for name in also if name not in state}
    unique: dict[int, str] = {}
    for name, tensor in state.items():
        unique.setdefault(id(tensor), name)
    return {name: state[name].detach().cpu().contiguous() for name in unique.values()}


def _reshape(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    tensors = named_tensors(module)
    for name, shape in shapes.items():
        if name not in tensors:
            raise SurgeryError(f"{type(module).__name__} has no {name}")
        full = tuple(tensors[name].shape)
        if len(full) != len(shape) or any(a > b for a, b in zip(shape, full, strict=True)):
            raise SurgeryError(f"{name} has shape {full}, which cannot be narrowed to {shape}")
        tensors[name].data = tensors[name].data.new_zeros(shape)


def _load_hidden(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Move buffers that no state_dict names from `weights` into the module."""
    state, own = module.state_dict(), named_tensors(module)
    with torch.no_grad():
        for name in [name for name in weights if name in own and name not in state]:
            own[name].copy_(weights.pop(name))

"""A recipe's model section to a network: built or read, with its weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from pipeline.errors import NetworkError, first_line
from pipeline.networks.conversion import network_of_file
from pipeline.networks.factories import find_factory
from pipeline.recipe import ModelSection
from pipeline.records import Network

# Counters of batch norm: no layer computes with them, and many weight files lack them.
OPTIONAL_SUFFIX = "num_batches_tracked"


def load_network(section: ModelSection) -> Network:
    """Return the network that a recipe names: float32, evaluation mode, weights loaded.

    An ONNX file brings its own weights, and gives a network in graph form.

    Raises:
        NetworkError: no such network, arguments it does not take, weights that do not fit, or an
            input shape that its `forward` refuses.
    """
    if section.file is not None:
        return _from_file(section, section.file)
    module = _build(section).float().eval()
    if section.weights is not None:
        load_weights(module, read_weights(section.weights), section.weights)
    network = Network(
        module=module,
        spec=section.name,
        arguments=dict(section.arguments),
        input_shape=section.input_shape,
    )
    _check_input(network)
    return network


def _build(section: ModelSection) -> nn.Module:
    """Return what the factory of a name builds."""
    factory = find_factory(section.name)
    try:
        # Without a weight file the network is random: the same one in every run, so that a run
        # that is resumed goes on with the network it began with.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = factory(**section.arguments)
    except Exception as error:  # a factory is foreign code and may raise anything
        raise NetworkError(
            f"{section.name} could not be built with arguments {section.arguments}: "
            f"{type(error).__name__}: {first_line(error)}. Check `model.arguments`."
        ) from error
    if not isinstance(module, nn.Module):
        raise NetworkError(
            f"{section.name} returned {type(module).__name__}, not a torch.nn.Module. "
            "Name a class or a function that returns the network."
        )
    return module


def _from_file(section: ModelSection, path: Path) -> Network:
    if section.arguments:
        raise NetworkError(f"{path} is an ONNX file and takes no arguments: drop model.arguments.")
    network = network_of_file(path, section.input_shape)
    if section.weights is not None:
        load_weights(network.module, read_weights(section.weights), section.weights)
    return network


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name.

    Raises:
        NetworkError: no such file, or not safetensors.
    """
    try:
        return load(path.read_bytes())
    except OSError as error:
        raise NetworkError(f"Cannot read the weights {path}: {error.strerror or error}.") from error
    except SafetensorError as error:
        raise NetworkError(
            f"{path} is not a safetensors file, or is damaged: {error}. Convert a torch checkpoint "
            "with safetensors.torch.save_file(state_dict, path)."
        ) from error


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], origin: object) -> None:
    """Copy weights into a module; every name and shape must fit.

    A file may lack the counters of batch norms, and may hold a tied parameter under one of its
    names only. Weights are converted to the dtype of the module.

    Args:
        module: changed in place, and only when everything fits.
        weights: tensors by state_dict name.
        origin: where they come from, for the message.

    Raises:
        NetworkError: names are missing or unexpected, or shapes differ.
    """
    own: dict[str, Tensor] = module.state_dict(keep_vars=True)
    given = {id(own[name]) for name in weights if name in own}
    missing = [
        f"{name} {_shape(tensor)}"
        for name, tensor in own.items()
        if id(tensor) not in given and not name.endswith(OPTIONAL_SUFFIX)
    ]
    unexpected = [f"{name} {_shape(tensor)}" for name, tensor in weights.items() if name not in own]
    unequal = [
        f"{name}: {_shape(tensor)} in the file, {_shape(own[name])} in the network"
        for name, tensor in weights.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if missing or unexpected or unequal:
        faults = [
            *_listed("missing from the file", missing),
            *_listed("not in the network", unexpected),
            *_listed("of another shape", unequal),
        ]
        raise NetworkError(
            f"The weights {origin} do not fit the network {type(module).__name__}:\n  "
            + "\n  ".join(faults)
            + "\nName the network that these weights were trained with (`model.name`, "
            "`model.arguments`), or rename the tensors in the file."
        )
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)


def _listed(what: str, faults: list[str], shown: int = 5) -> list[str]:
    if not faults:
        return []
    more = f", and {len(faults) - shown} more" if len(faults) > shown else ""
    return [f"{len(faults)} {what}: {', '.join(faults[:shown])}{more}"]


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _check_input(network: Network) -> None:
    # Any: what a network returns is its own affair here.
    try:
        with torch.no_grad():
            _: Any = network.module(network.example())
    except Exception as error:  # the user's forward may raise anything
        raise NetworkError(
            f"{network.spec} does not accept an input of shape {(1, *network.input_shape)}: "
            f"{first_line(error)}. Correct `model.input_shape` (channels, height, width)."
        ) from error

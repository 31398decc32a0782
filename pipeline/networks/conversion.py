"""Networks to their graph form: from the user's class, from an ONNX file, from a stored folder."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import onnx
import torch
from torch import Tensor

from hardware.graph.batch_size import free_batch, graph_input, set_input_shape
from hardware.graph.model import complete_shapes, initializers, load_model
from pipeline.errors import NetworkError
from pipeline.networks.export import export_graph
from pipeline.networks.graphform.module import COUNTER, GraphForm, Roles, write_tensors
from pipeline.networks.graphform.names import find_roles, name_parameters
from pipeline.networks.simplify import simplify
from pipeline.records import Network
from pipeline.surgery.narrow import named_tensors
from pipeline.surgery.proof import outputs_of

AGREEMENT = 1e-4  # of two float32 computations of the same thing, relative to the largest output


def graph_form(network: Network) -> Network:
    """Return the graph form of a network of a class: the same function, the same parameter names.

    Raises:
        NetworkError: the exporter refuses the network, an operator has no implementation, or the
            graph holds only for a fixed number of images.
    """
    graph = export_graph(network, keep_dropout=True)
    tensors, state = named_tensors(network.module), network.module.state_dict()
    present = initializers(graph)
    by_tensor = {id(tensors[name]): name for name in tensors if name in present}
    known = [name for name in state if id(tensors.get(name)) in by_tensor]
    trained = {name for name, _ in network.module.named_parameters(remove_duplicate=False)}
    roles = Roles(
        parameters=tuple(name for name in known if name in present and name in trained),
        buffers=tuple(name for name in known if name in present and name not in trained),
        aliases={name: by_tensor[id(tensors[name])] for name in known if name not in present},
    )
    given = {
        name: tensor.detach().clone().requires_grad_(tensor.requires_grad)
        for name, tensor in tensors.items()
        if name in present or name.endswith(COUNTER)
    }
    form = GraphForm(graph, roles, given).train(network.module.training)
    found = replace(network, module=form)
    _check(found, network)
    return found


def network_of_file(path: Path, input_shape: tuple[int, ...]) -> Network:
    """Return the network in an ONNX file in its graph form, in evaluation mode.

    What layers compute with is trained: weights, biases, scales, and whatever weights are computed
    from. A file does not say what else its author trained, so parameters are also taken to be the
    floating tensors that are called as torch calls parameters ("block.gamma").

    Args:
        path: of the file.
        input_shape: of one image; the file must agree, or leave sizes open.

    Raises:
        NetworkError: another input shape, an operator without implementation, or a graph that
            holds only for a fixed number of images.
        ModelError: the file cannot be read, is damaged, or contradicts itself.
    """
    model = load_model(path)
    set_input_shape(model, _input_shape(model, path, input_shape))
    graph = simplify(model)
    complete_shapes(graph)
    free_batch(graph)
    set_input_shape(graph, (1, *input_shape))
    name_parameters(graph)
    module = GraphForm(graph, find_roles(graph)).eval()
    found = Network(module=module, spec=str(path), arguments={}, input_shape=tuple(input_shape))
    _check(found, found)
    return found


def rebuild(model: onnx.ModelProto, roles: Roles, weights: Mapping[str, Tensor]) -> GraphForm:
    """Return the graph form that an architecture and its weights make, in evaluation mode.

    Args:
        model: as `GraphForm.architecture` gave it.
        roles: of its initializers.
        weights: by state_dict name; tied ones under one of their names at least.

    Raises:
        NetworkError: weights are missing, or have another shape.
    """
    given = dict(weights)
    for alias, name in roles.aliases.items():
        if name not in given and alias in given:
            given[name] = given[alias]
    for name, tensor in initializers(model).items():
        if name not in roles.parameters and name not in roles.buffers:
            continue
        found = tuple(given[name].shape) if name in given else "missing"
        if found != tuple(tensor.dims):
            raise NetworkError(f"The weights of {name} are {found}, not {tuple(tensor.dims)}.")
        given[name] = given[name].requires_grad_(name in roles.parameters)
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    write_tensors(whole, given)
    return GraphForm(whole, roles, given).eval()


def _input_shape(
    model: onnx.ModelProto, path: Path, input_shape: tuple[int, ...]
) -> tuple[int, ...]:
    """Return batch and image shape, after comparing with what the file says."""
    stated = [
        dim.dim_value if dim.HasField("dim_value") else None
        for dim in graph_input(model).type.tensor_type.shape.dim
    ]
    image = stated[1:]
    fits = len(image) == len(input_shape) and all(
        size in (None, asked) for size, asked in zip(image, input_shape, strict=True)
    )
    if not fits:
        known = [size if size is not None else "any" for size in image]
        raise NetworkError(
            f"{path} takes images of shape {known}, the recipe says {list(input_shape)}. Correct "
            "`model.input_shape` (channels, height, width)."
        )
    return (stated[0] or 1, *input_shape)


def _check(found: Network, original: Network) -> None:
    """Raise where the graph form differs from the original, or two images from one and one."""
    module = found.module
    parts = [(part, part.training) for net in (found, original) for part in net.module.modules()]
    place = next(module.parameters(), torch.empty(0))
    images = found.example(2).to(place)
    try:
        module.eval(), original.module.eval()
        with torch.no_grad():
            together = outputs_of(module(images))
            alone = [outputs_of(original.module(image[None])) for image in images]
    except RuntimeError as error:  # what torch's operators raise
        raise NetworkError(
            f"The graph of {found.spec} does not run on two images: {error}. A constant of the "
            "graph fixes the number of images; export it with a symbolic batch."
        ) from error
    finally:
        for part, mode in parts:
            part.training = mode
    for one, pieces in zip(together, zip(*alone, strict=True), strict=True):
        expected = torch.cat(pieces) if one.ndim else one
        largest = float(expected.abs().max())
        if one.shape != expected.shape or not largest < float("inf"):
            raise NetworkError(
                f"The graph of {found.spec} gives {tuple(one.shape)} for two images, largest "
                f"output {largest}; expected is {tuple(expected.shape)}, and finite numbers."
            )
        if float((one - expected).abs().max()) > AGREEMENT * max(largest, 1e-12):
            raise NetworkError(
                f"The graph of {found.spec} computes something else for two images than for each "
                "alone: a constant of the graph fixes the number of images. Export it with a "
                "symbolic batch."
            )

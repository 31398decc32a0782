"""Network to ONNX: one un-optimized graph, in which every parameter keeps its name."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import onnx
import torch
from torch import nn

from hardware.errors import ModelError
from hardware.graph.model import complete_shapes, name_nodes
from hardware.graph.operators import PRODUCTS
from pipeline.errors import NetworkError
from pipeline.networks.simplify import simplify
from pipeline.records import Network
from pipeline.surgery.forms import GraphBacked


def export_graph(
    network: Network, batch: int = 1, *, keep_dropout: bool = False
) -> onnx.ModelProto:
    """Return the network as an ONNX model with static shapes, computed in evaluation mode.

    Nothing is optimized: every parameter and buffer that is used is an initializer under its
    state_dict name, every operator is there. Only what depends on no parameter is folded, and
    what no output needs is dropped. The input is called "input", the outputs "output", or
    "output_0", "output_1", ... where there are several.

    Args:
        network: the network; its training mode is restored.
        batch: images per inference.
        keep_dropout: keep `nn.Dropout` as nodes that do nothing in evaluation, for the graph to be
            trained. A network in graph form keeps its own, and is its own graph.

    Raises:
        NetworkError: the exporter refused the network.
    """
    module = network.module
    if isinstance(module, GraphBacked):
        return module.to_onnx(batch)
    training = {name: part.training for name, part in module.named_modules()}
    try:
        module.eval()
        for part in module.modules():
            part.training = keep_dropout and type(part) is nn.Dropout
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                (network.example(batch),),
                dynamo=True,
                optimize=False,
                verbose=False,
                input_names=["input"],
            )
    except Exception as error:  # the exporter's errors share no base class
        raise NetworkError(
            f"{network.spec} cannot be exported to ONNX at input {network.input_shape}: "
            f"{_first_lines(error)}"
        ) from error
    finally:
        for name, part in module.named_modules():
            part.training = training[name]
    if program is None:
        raise NetworkError(f"{network.spec}: the exporter returned nothing.")
    try:
        return _tidy(program.model_proto)
    except ModelError as error:
        raise NetworkError(f"{network.spec} was exported, but not soundly: {error}") from error


def _tidy(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the exporter's model folded, named and with all its shapes."""
    for node in model.graph.node:
        del node.metadata_props[:]  # stack traces: the names of local files
        node.doc_string = ""
        if node.op_type == "Dropout":  # as in evaluation: without training_mode and the mask
            del node.input[2:], node.output[1:]
    complete_shapes(model)
    simple = simplify(model)
    complete_shapes(simple)
    del simple.metadata_props[:]
    _name_outputs(simple)
    _name_layers(simple)
    return simple


def _name_layers(model: onnx.ModelProto) -> None:
    """Call every layer's node as the network calls the layer: "layer1.0.conv1", in place."""
    parameters = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in PRODUCTS and len(node.input) > 1:
            layer, _, last = node.input[1].rpartition(".")
            if last == "weight" and node.input[1] in parameters:
                node.name = layer
    name_nodes(model)  # a layer that runs twice


def _name_outputs(model: onnx.ModelProto) -> None:
    """Call the outputs "output", or "output_0", "output_1", ..., in place."""
    outputs = model.graph.output
    produced = {name for node in model.graph.node for name in node.output}
    renamed: dict[str, str] = {}
    for index, output in enumerate(outputs):
        new = "output" if len(outputs) == 1 else f"output_{index}"
        old = output.name
        if old in produced and old not in renamed and new not in produced:
            _rename(model, old, new)
        else:  # an input or an initializer handed through, or one value given out twice
            source = renamed.get(old, old)
            model.graph.node.append(
                onnx.helper.make_node("Identity", [source], [new], f"Identity_{new}")
            )
        renamed.setdefault(old, new)
        output.name = new


def _rename(model: onnx.ModelProto, old: str, new: str) -> None:
    """Rename a value everywhere but in the list of outputs, in place."""
    for node in model.graph.node:
        for field in (node.input, node.output):
            for index, name in enumerate(field):
                if name == old:
                    field[index] = new
    for index in range(len(model.graph.value_info) - 1, -1, -1):
        if model.graph.value_info[index].name == old:
            del model.graph.value_info[index]


def _first_lines(error: BaseException) -> str:
    """Return the exporter's own reason: the innermost cause, without its report."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip() or type(error).__name__
    return " ".join(text.splitlines()[:3])[:600]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Contain the exporter's warnings, log lines and prints."""
    disabled = logging.root.manager.disable
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(disabled)

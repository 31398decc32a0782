"""The graph form: a torch module that runs an ONNX graph, node by node.

Why an interpreter of our own. The graph that is carved for measuring is the very one that is
trained and delivered: nothing can differ between them. Parameters keep their names, so weights,
channel maps and reports fit both forms. `onnx2torch` refuses these graphs (opset 20), and the
module that `torch.export` makes would need a second carving, with rules of its own.
"""

from collections.abc import Mapping

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from hardware.errors import HardwareError
from hardware.graph.batch_size import free_batch, graph_input, set_input_shape
from hardware.graph.carve import carve
from hardware.graph.channel_map import ChannelMap, Keep
from hardware.graph.model import Shape, drop_dead, initializers, opset, shapes, to_array
from hardware.graph.operators import is_standard
from hardware.records import Record
from pipeline.errors import NetworkError, SurgeryError
from pipeline.networks.graphform.layers import Norm, Path, layer_of
from pipeline.networks.graphform.node import Node, read_node
from pipeline.networks.graphform.operators import OPERATORS
from pipeline.surgery.narrow import find_cuts

COUNTER = "num_batches_tracked"


class Roles(Record):
    """What the initializers of a graph are; those that are not named are constants."""

    parameters: tuple[str, ...]  # trained; in the order of the state_dict
    buffers: tuple[str, ...] = ()  # kept with the weights, not trained: statistics
    aliases: Mapping[str, str] = {}  # other names of tied parameters, and the name in the graph


class GraphForm(nn.Module):
    """An ONNX graph of one input that can be trained, pruned again and exported.

    Convolutions, linear layers, batch norms and dropouts are torch's own layers, under the names
    of their parameters, so hooks, train and eval mode work as in the class that was exported;
    everything else is a pure function of the `operators` modules. Runs any batch, and any
    floating type. What an export in evaluation mode drops, such as stochastic depth, is not there;
    neither are parameters that the graph does not read.
    """

    def __init__(
        self, graph: onnx.ModelProto, roles: Roles, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        """Read a graph.

        Args:
            graph: simplified, with static shapes; left as it is.
            roles: what its initializers are.
            tensors: parameters (those that require gradients are trained) and buffers by name; left
                out where the graph holds them.

        Raises:
            NetworkError: an operator has no implementation.
            ModelError: the graph has several inputs, or contradicts itself.
        """
        super().__init__()
        model = onnx.ModelProto()
        model.CopyFrom(graph)
        drop_dead(model)
        free_batch(model)
        values = initializers(model)
        kept = [name for name in (*roles.parameters, *roles.buffers) if name in values]
        self._roles = Roles(
            parameters=tuple(name for name in roles.parameters if name in values),
            buffers=tuple(name for name in roles.buffers if name in values),
            aliases={alias: name for alias, name in roles.aliases.items() if name in values},
        )
        given = tensors or {n: _tensor(values[n], n in roles.parameters) for n in kept}
        constants = {name: to_array(t) for name, t in values.items() if name not in kept}
        nodes = [read_node(node, constants, opset(model)) for node in model.graph.node]
        _refuse_unknown(model)
        self._owners: dict[str, tuple[nn.Module, str]] = {}
        self._outputs = tuple(output.name for output in model.graph.output)
        self._steps = self._make_steps(nodes, {n: tuple(values[n].dims) for n in kept})
        self._register(given, constants)
        self._input = graph_input(model).name
        self._image: Shape = shapes(model)[self._input][1:]
        for name in kept:  # the numbers live in the module
            empty = TensorProto(name=name, data_type=values[name].data_type, dims=values[name].dims)
            values[name].CopyFrom(empty)
        self._graph = model.SerializeToString()

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the output of the graph, a tuple where it has several.

        Args:
            images: (batch, channels, height, width).
        """
        values: dict[str, Tensor] = {self._input: images}
        for node, layer, finished in self._steps:
            if layer is not None:
                outputs = layer(self._read(node.inputs[0], values))
            else:
                inputs = [self._read(name, values) if name else None for name in node.inputs]
                outputs = OPERATORS[node.operator](node, *inputs)
            if isinstance(outputs, Tensor):
                outputs = (outputs,)
            values.update(zip(node.outputs, outputs, strict=False))
            for name in finished:
                values.pop(name, None)
        results = tuple(self._read(name, values) for name in self._outputs)
        return results[0] if len(results) == 1 else results

    @property
    def roles(self) -> Roles:
        """What the initializers of `architecture` are."""
        return self._roles

    def to_onnx(self, batch: int = 1) -> onnx.ModelProto:
        """Return the graph, in evaluation mode, with the weights as they are now, in float32."""
        model = self.architecture()
        kept = (*self._roles.parameters, *self._roles.buffers)
        write_tensors(model, {name: self._read(name, {}) for name in kept})
        set_input_shape(model, (batch, *self._image))
        return model

    def architecture(self) -> onnx.ModelProto:
        """Return the graph without the numbers of parameters and buffers."""
        model: onnx.ModelProto = onnx.ModelProto.FromString(self._graph)
        return model

    def carved(self, channels: ChannelMap, keep: Keep) -> "GraphForm":
        """Return a graph form with only the units that are kept, with its own parameters.

        Raises:
            SurgeryError: the graph cannot be carved so.
        """
        cuts, tensors = find_cuts(channels, keep), {}
        try:
            graph = carve(self.to_onnx(), channels, keep)
        except HardwareError as error:
            raise SurgeryError(f"The graph cannot be carved: {error}") from error
        for name, dims in shapes(graph).items():
            if name not in self._roles.parameters and name not in self._roles.buffers:
                continue
            owner, last = self._owners[name]
            old = getattr(owner, last)
            tensor = old.detach()
            for axis, positions in cuts.get(name, {}).items():
                tensor = tensor.index_select(axis, torch.tensor(positions, device=tensor.device))
            if tuple(tensor.shape) != dims:
                raise SurgeryError(
                    f"{name} is {tuple(tensor.shape)} after surgery and {dims} in the carved "
                    "graph: the channel map was made for another network."
                )
            tensors[name] = tensor.clone().requires_grad_(old.requires_grad)
        tensors |= {n: b for n, b in self.named_buffers() if n.endswith(COUNTER)}
        form = GraphForm(graph, self._roles, tensors)
        modes = {name: part.training for name, part in self.named_modules()}
        for name, part in form.named_modules():
            part.training = modes.get(name, self.training)
        return form

    def _make_steps(
        self, nodes: list[Node], kept: Mapping[str, Shape]
    ) -> list[tuple[Node, nn.Module | None, tuple[str, ...]]]:
        """Return per node its layer, if it has one, and the values that nothing reads later."""
        last_reader = {name: place for place, node in enumerate(nodes) for name in node.inputs}
        made: dict[str, tuple[object, nn.Module]] = {}
        steps: list[tuple[Node, nn.Module | None, tuple[str, ...]]] = []
        for place, node in enumerate(nodes):
            layer = None
            if (found := layer_of(node, kept)) is not None:
                path, layer = found
                signature = (node.operator, node.attributes, node.inputs[1:])
                if path not in made:
                    made[path] = (signature, layer)
                elif made[path][0] == signature:
                    layer = made[path][1]  # a layer that runs twice
                else:
                    layer = None  # the same weights, used in another way
            read = {name for name in node.inputs if last_reader[name] == place}
            read.difference_update(self._outputs)
            steps.append((node, layer, tuple(read)))
        layers = {path: layer for path, (_, layer) in made.items()}
        for name in self._roles.parameters:  # modules in the order of the class
            path = name.rpartition(".")[0]
            if path in layers:
                self._put(path, layers.pop(path))
            elif path:
                self._at(path)
        for path, layer in layers.items():
            self._put(path, layer)
        return steps

    def _register(self, given: Mapping[str, Tensor], constants: Mapping[str, object]) -> None:
        """Put parameters, statistics and constants where their names say."""
        for name in self._roles.parameters:
            self._set(name, nn.Parameter(given[name].detach(), given[name].requires_grad))
        for name in self._roles.buffers:
            self._set(name, given[name].detach())
        for alias, name in self._roles.aliases.items():
            owner, last = self._owners[name]
            self._set(alias, getattr(owner, last))
        place = next(iter(given.values()), torch.empty(0))
        for name, value in constants.items():
            tensor = torch.from_numpy(np.array(value)).to(place.device)
            if tensor.is_floating_point():
                tensor = tensor.to(place.dtype)
            self._set(name, tensor, persistent=False)
        for path, layer in self.named_modules():
            if isinstance(layer, Norm):
                count = given.get(f"{path}.{COUNTER}", torch.tensor(0, dtype=torch.long))
                layer.register_buffer(COUNTER, count.detach().clone().to(place.device))

    def _set(self, name: str, tensor: Tensor, persistent: bool = True) -> None:
        path, _, last = name.rpartition(".")
        owner = self._at(path) if path else self
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(last, tensor)
        else:
            owner.register_buffer(last, tensor, persistent)
        self._owners[name] = (owner, last)

    def _put(self, path: str, layer: nn.Module) -> None:
        parent, _, last = path.rpartition(".")
        place = self._at(parent) if parent else self
        if last in place._modules:  # what lies below it was put there first
            layer._modules.update(place.get_submodule(last)._modules)
        place.add_module(last, layer)

    def _at(self, path: str) -> nn.Module:
        """Return the module at a path, made where it is missing."""
        place: nn.Module = self
        for part in path.split("."):
            if part not in place._modules:
                place.add_module(part or "_", Path())
            place = place.get_submodule(part)
        return place

    def _read(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        if name in values:
            return values[name]
        owner, last = self._owners[name]
        found: Tensor = getattr(owner, last)
        return found


def write_tensors(model: onnx.ModelProto, tensors: Mapping[str, Tensor]) -> None:
    """Give initializers the numbers of the tensors of their names, in their own types, in place."""
    for tensor in model.graph.initializer:
        if tensor.name in tensors:
            numbers = tensors[tensor.name].detach().cpu().contiguous().numpy()
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            tensor.CopyFrom(numpy_helper.from_array(numbers.astype(dtype), tensor.name))


def _tensor(tensor: TensorProto, is_trained: bool) -> Tensor:
    return torch.from_numpy(to_array(tensor).copy()).requires_grad_(is_trained)


def _refuse_unknown(model: onnx.ModelProto) -> None:
    """Raise where a node's operator has no implementation."""
    for node in model.graph.node:
        if node.op_type not in OPERATORS or not is_standard(node):
            operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            raise NetworkError(
                f"The graph form has no implementation of operator {operator}, node {node.name}. "
                "Take the class form with surgery=class, or add the operator to "
                "pipeline/networks/graphform/operators.py."
            )

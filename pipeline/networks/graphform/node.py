"""One node of a graph, read once: its attributes and its constant inputs as plain numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from hardware.graph.model import attributes
from pipeline.errors import NetworkError

Constant = npt.NDArray[Any]  # Any: of whatever type the graph says
Numbers = tuple[Any, ...]  # Any: int, float or bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What an operator needs to know besides its tensors."""

    name: str
    operator: str
    attributes: Mapping[str, Any]  # Any: an attribute has one of ten types
    constants: tuple[Numbers | None, ...]  # per input its value, where the graph fixes it
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    opset: int

    def get(self, name: str, default: Any) -> Any:  # noqa: ANN401 - as above
        """Return an attribute, or what ONNX takes where it is left out."""
        return self.attributes.get(name, default)

    def constant(self, place: int) -> Numbers | None:
        """Return the numbers of the constant at an input, None where the input is left out.

        Raises:
            NetworkError: it is computed from the images or from parameters.
        """
        if place >= len(self.inputs) or not self.inputs[place]:
            return None
        value = self.constants[place]
        if value is None:
            raise self.refuse(f"its input {self.inputs[place]} is computed, and must be a constant")
        return value

    def integers(self, place: int) -> list[int] | None:
        """Return a constant input as whole numbers, None where it is left out."""
        value = self.constant(place)
        return None if value is None else [int(item) for item in value]

    def refuse(self, reason: str) -> NetworkError:
        """Return the error that this node cannot be computed in torch."""
        return NetworkError(f"Node {self.name} ({self.operator}) cannot run in torch: {reason}.")


def read_node(node: onnx.NodeProto, constants: Mapping[str, Constant], opset: int) -> Node:
    """Return a node of a graph whose constants are these."""
    return Node(
        name=node.name,
        operator=node.op_type,
        attributes={key: _plain(value) for key, value in attributes(node).items()},
        constants=tuple(_numbers(constants.get(name)) for name in node.input),
        inputs=tuple(node.input),
        outputs=tuple(node.output),
        opset=opset,
    )


def _numbers(value: Constant | None) -> Numbers | None:
    """Return a constant as plain numbers, so that `torch.compile` sees no array; None for a tensor.

    What an operator takes as numbers (axes, sizes, bounds) has one axis at most.
    """
    if value is None or (value.ndim > 1 and value.size > 1):
        return None
    return tuple(value.reshape(-1).tolist())


def _plain(value: Any) -> Any:  # noqa: ANN401 - as above
    # ONNX stores float32: 1e-5 comes back as 9.99999974e-06 unless it is read as written.
    return float(str(np.float32(value))) if isinstance(value, float) else value

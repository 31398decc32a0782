"""When only some pixels of a value are read, a runtime may compute only those.

A strided 1x1 convolution reads every second pixel of its input. Where it is the only reader, as in
a residual network whose downsampling block has been emptied, OpenVINO moves the stride to the layer
before, which then takes a quarter of its time. Such a layer is another layer, and is keyed so.
"""

from collections.abc import Mapping, Sequence

import onnx

from hardware.graph.channel_map import Branch
from hardware.graph.model import attributes, initializers

Readers = Mapping[str, Sequence[tuple[onnx.NodeProto, bool]]]
"""Per value the nodes that read it, and whether each is a strided 1x1 convolution."""

# These hand on what they get pixel by pixel.
PIXELWISE = frozenset({"Relu", "Clip", "LeakyRelu", "HardSwish", "Sigmoid", "Add", "Identity"})


def readers_of(model: onnx.ModelProto) -> Readers:
    """Return the readers of every value; the network's outputs are read by nobody known."""
    shapes = {name: tuple(tensor.dims) for name, tensor in initializers(model).items()}
    readers: dict[str, list[tuple[onnx.NodeProto, bool]]] = {}
    for node in model.graph.node:
        strided = False
        if node.op_type == "Conv":
            stated = attributes(node)
            kernel = shapes.get(node.input[1], ())[2:]
            strided = (
                set(kernel) == {1}
                and min(stated.get("strides", [1])) > 1
                and not any(stated.get("pads", ()))
            )
        for name in node.input:
            if name:
                readers.setdefault(name, []).append((node, strided))
    return readers


def strided_readers(
    value: str, readers: Readers, branches: Sequence[Branch]
) -> tuple[Branch, ...] | None:
    """Return the branches that must be emptied for strided 1x1 convolutions alone to read a value.

    Returns:
        The branches, () where none need be; None where other readers stay whatever is emptied.
    """
    needed: dict[str, Branch] = {}
    found = False
    pending, seen = [value], {value}
    while pending:
        name = pending.pop()
        if not readers.get(name):  # an output of the network: read in full
            return None
        for node, strided in readers[name]:
            inside = next((b for b in branches if node.name in b.layers), None)
            if inside is not None:
                needed[inside.name] = inside
            elif strided:
                found = True
            elif node.op_type not in PIXELWISE:
                return None
            elif node.output[0] not in seen:
                seen.add(node.output[0])
                pending.append(node.output[0])
    return tuple(needed.values()) if found else None

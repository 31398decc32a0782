"""Whose time it was: from the nodes that a runtime executed to the layers of the template.

A runtime reports executed nodes, each with the ONNX nodes that it covers. Its time
belongs to the layer of the first convolution, Gemm or MatMul among them, else to the layer of the
first node that is known. An executed node that covers none (a layout reorder) prepares the input
of what runs next, and belongs to that layer; after the last layer, to the last.
"""

from collections.abc import Mapping, Sequence

import onnx

from hardware.errors import RunError
from hardware.latency.keys import Layer, LayerKey
from hardware.latency.layers import PRODUCTS
from hardware.runtimes.base import NodeTime


def attribute(
    times: Sequence[NodeTime],
    owners: Mapping[str, tuple[Layer, bool]],
    layers: Sequence[Layer],
    widths: Mapping[str, int],
) -> list[tuple[LayerKey, float]]:
    """Return what was executed and how long it took, in the order of the layers.

    A layer that is emptied appears where some of its tail may still run. What runs of a layer of
    which nothing should be left counts for the layer before it.

    Args:
        times: executed nodes in run order.
        owners: per name of a node or value its layer, and whether it is the layer's anchor.
        layers: of the template.
        widths: of the variant.

    Raises:
        RunError: the runtime named no node of the model.
    """
    homes = [_home(time, owners) for time in times]
    if not any(homes):
        names = ", ".join(time.name for time in times[:5])
        raise RunError(
            f"None of the {len(times)} executed nodes ({names}, ...) could be traced to the model. "
            "The runtime renamed them all: report this with the runtime's version."
        )
    spent: dict[str, float] = {}
    following: str | None = None
    last = next(home for home in reversed(homes) if home)
    for time, home in zip(reversed(times), reversed(homes), strict=True):
        following = home or following or last
        spent[following] = spent.get(following, 0.0) + time.time_us
    found: list[tuple[LayerKey, float]] = []
    for layer in layers:
        key = layer.rest_key_at(widths) if layer.is_emptied(widths) else layer.key_at(widths)
        if key is not None:
            found.append((key, spent.get(layer.name, 0.0)))
        elif layer.name in spent and found:
            before, time_us = found.pop()
            found.append((before, time_us + spent[layer.name]))
    return found


def owners_of(model: onnx.ModelProto, layers: Sequence[Layer]) -> dict[str, tuple[Layer, bool]]:
    """Return, per name of a node or value of a model, its layer and whether it is its anchor."""
    by_node = {name: layer for layer in layers for name in layer.nodes}
    owners: dict[str, tuple[Layer, bool]] = {}
    for node in model.graph.node:
        name = node.name if node.name in by_node else node.output[0]
        if name in by_node:
            layer = by_node[name]
            anchors = name == layer.nodes[0] and layer.key.operator in PRODUCTS
            for label in (node.name, *node.output):
                owners.setdefault(label, (layer, anchors))
    return owners


def _home(time: NodeTime, owners: Mapping[str, tuple[Layer, bool]]) -> str | None:
    known = [owners[name] for name in time.nodes if name in owners]
    anchors = [layer.name for layer, is_anchor in known if is_anchor]
    return next(iter([*anchors, *(layer.name for layer, _ in known)]), None)

"""Which ONNX nodes a runtime's executed nodes stand for, after it has fused and renamed them."""

from collections import Counter
from collections.abc import Sequence

import onnx

from hardware.graph.operators import PIXELWISE, POOLS, PRODUCTS, REDUCTIONS

# Nodes that a runtime builds a fused node around: pixelwise nodes disappear into them.
HEADS = PRODUCTS | POOLS | REDUCTIONS


def nodes_behind(
    model: onnx.ModelProto, executed: Sequence[Sequence[str]]
) -> tuple[tuple[str, ...], ...]:
    """Return the ONNX nodes of every executed node, heads first, the others in graph order.

    An ONNX node that no runtime name points at was fused: backwards when a fused node is known by
    its tail's name (a convolution called after the value its activation writes), forwards when it
    is known by its head's. A node without a name, or with another's, goes by its first output.

    Args:
        model: the ONNX model that was built.
        executed: in run order, the names the runtime knows each executed node by: of ONNX nodes or
            of values; names that are neither are passed over.

    Returns:
        One tuple per executed node; () where it stands for no ONNX node (a layout reorder).
    """
    nodes = list(model.graph.node)
    labels = _labels(nodes)
    at_label = {label: index for index, label in enumerate(labels)}
    at_value = {value: index for index, node in enumerate(nodes) for value in node.output if value}
    owner: dict[int, int] = {}  # index of the ONNX node -> index of the executed node
    for number, names in enumerate(executed):
        for name in names:
            index = at_label.get(name, at_value.get(name))
            if index is not None:
                owner.setdefault(index, number)
    _claim_backwards(nodes, at_value, owner)
    for index, node in enumerate(nodes):
        hosts = [owner[at_value[v]] for v in node.input if at_value.get(v) in owner]
        if index not in owner and node.op_type in PIXELWISE and hosts:
            owner[index] = max(hosts)
    found: list[list[int]] = [[] for _ in executed]
    for index in sorted(owner, key=lambda i: (nodes[i].op_type not in HEADS, i)):
        found[owner[index]].append(index)
    return tuple(tuple(labels[index] for index in indices) for indices in found)


def _claim_backwards(
    nodes: Sequence[onnx.NodeProto], at_value: dict[str, int], owner: dict[int, int]
) -> None:
    """Give fused nodes known by a tail alone the head that feeds it, and what lies between."""
    readers = Counter(value for node in nodes for value in node.input)
    headed = {number for i, number in owner.items() if nodes[i].op_type in HEADS}
    for start, number in list(owner.items()):
        if number in headed or nodes[start].op_type not in PIXELWISE:
            continue
        path, index = [], start
        while nodes[index].op_type not in HEADS:
            # Only what nobody else reads and nobody else executes can have been fused away.
            before = [
                at_value[v]
                for v in nodes[index].input
                if v in at_value and readers[v] == 1 and at_value[v] not in owner
            ]
            if not before:
                break
            index = before[0]
            path.append(index)
        else:
            owner.update(dict.fromkeys(path, number))
            headed.add(number)


def _labels(nodes: Sequence[onnx.NodeProto]) -> list[str]:
    """Return what each node is called: its name where that is its own, else its first output."""
    counts = Counter(node.name for node in nodes)
    return [
        node.name if node.name and counts[node.name] == 1 else next(iter(node.output), "")
        for node in nodes
    ]

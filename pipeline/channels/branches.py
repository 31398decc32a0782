"""Residual branches that can be emptied as a whole."""

from collections import defaultdict

import onnx
from onnx import NodeProto

from hardware.graph.channel_map import Branch, Group
from hardware.graph.model import INTEGERS, initializers, uses


def find_branches(
    graph: onnx.ModelProto, groups: tuple[Group, ...], known: dict[str, tuple[int, ...]]
) -> tuple[Branch, ...]:
    """Return the branches that end in an addition and nowhere else.

    Once a branch's groups are empty it adds nothing: its nodes are not executed and the addition
    hands its other side through. Of the two sides of an addition at most one is offered, so
    something always stays; of branches within one another the innermost.
    """
    weights = initializers(graph)
    producer = {name: node for node in graph.graph.node for name in node.output}
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.graph.node:
        for name in uses([node]):
            readers[name].append(node)
    outputs = {output.name for output in graph.graph.output}
    order = {node.name: place for place, node in enumerate(graph.graph.node)}
    found: list[tuple[Branch, set[str]]] = []
    for join in graph.graph.node:
        if join.op_type != "Add" or len(set(join.input)) != 2:
            continue
        if known.get(join.input[0], 0) != known.get(join.input[1], 1):
            continue
        sides = []
        for name in join.input:
            dead = _only_for(name, join, producer, readers, outputs)
            dead.sort(key=lambda node: order[node.name])
            owned = _owned(dead, weights, readers)
            branch = _branch(join, dead, groups, owned)
            if branch is not None:
                sides.append((branch, {node.name for node in dead}))
        if sides:
            found.append(max(sides, key=lambda side: len(side[1])))
    return tuple(
        branch for branch, dead in found if not any(other.join in dead for other, _ in found)
    )


def _only_for(
    name: str,
    join: NodeProto,
    producer: dict[str, NodeProto],
    readers: dict[str, list[NodeProto]],
    outputs: set[str],
) -> list[NodeProto]:
    """Return the nodes that are executed for one side of an addition only."""
    dead: dict[str, NodeProto] = {}
    waiting = [name]
    while waiting:
        value = waiting.pop()
        node = producer.get(value)
        if node is None or node.name in dead or outputs.intersection(node.output):
            continue
        if all(
            (reader is join and output == name) or reader.name in dead
            for output in node.output
            for reader in readers.get(output, [])
        ):
            dead[node.name] = node
            waiting += [source for source in node.input if source]
    return list(dead.values())


def _owned(
    dead: list[NodeProto],
    weights: dict[str, onnx.TensorProto],
    readers: dict[str, list[NodeProto]],
) -> dict[str, int]:
    """Return the parameters that these nodes read and no others, and how many axes each has."""
    mine = {node.name for node in dead}
    read = dict.fromkeys(name for node in dead for name in node.input if name in weights)
    return {
        name: len(weights[name].dims)
        for name in read
        if weights[name].data_type not in INTEGERS
        and all(reader.name in mine for reader in readers[name])
    }


def _branch(
    join: NodeProto,
    dead: list[NodeProto],
    groups: tuple[Group, ...],
    owned: dict[str, int],
) -> Branch | None:
    """Return the branch of those nodes, None where no group lies within it."""
    inside = [g for g in groups if all(s.parameter in owned for s in g.slices)]
    if not inside:
        return None
    last = next(name for name in reversed(owned) if owned[name] > 1)
    return Branch(
        name=last.removesuffix(".weight"),
        groups=tuple(group.name for group in inside),
        layers=tuple(node.name for node in dead),
        join=join.name,
        parameters=tuple(owned),
    )

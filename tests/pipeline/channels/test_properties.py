"""Laws that the channel analysis must obey on random networks.

The oracle of the groups knows no rule of any operator. It cuts the network at its layers, disturbs
one channel of what a layer makes, and looks in numbers where that arrives. Channels that arrive at
one element, or at one column of a weight, go together. Where what is left must stay rectangular (an
axis split in two, a grouped convolution) it tries both ways.
"""

import itertools
from collections import Counter, defaultdict

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from hardware.graph.carve import carve
from pipeline.channels.checks import check_carved, mask_graph, random_keep
from pipeline.channels.find import find_groups
from tests.drawn import BLOCKS, SIZE, Drawn, build, drawn_networks

LAWS = settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
FIXED = ("fixed",)


def computed(model: onnx.ModelProto, seed: int = 0) -> np.ndarray:
    image = np.random.default_rng(seed).standard_normal((1, 3, SIZE, SIZE))
    (output,) = ReferenceEvaluator(model).run(None, {"input": image})
    return output


def assert_removed_is_masked(drawn: Drawn) -> None:
    channels = find_groups(drawn.model)
    keep = random_keep(channels, seed=1)
    check_carved(channels, keep, carve(drawn.model, channels, keep))
    exact = {name: units for name, units in keep.items() if channels.group(name).mixes is None}

    removed = computed(carve(drawn.model, channels, exact))

    masked = computed(mask_graph(drawn.model, channels, exact))
    assert np.abs(removed - masked).max() <= 1e-9 * np.abs(masked).max()


def assert_groups_are_those_of_brute_force(drawn: Drawn) -> None:
    channels = find_groups(drawn.model)
    axes = {(layer.weight, layer.makes) for layer in drawn.layers}
    axes |= {(layer.weight, layer.reads) for layer in drawn.layers}
    found: set[frozenset] = set()
    for group in channels.groups:
        units: list[set] = [set() for _ in range(group.width)]
        for part in group.slices:
            if (part.parameter, part.axis) in axes:
                for place, unit in enumerate(part.units):
                    if unit >= 0:
                        units[unit].add((part.parameter, part.axis, place))
        found |= {frozenset(unit) for unit in units}

    ways = expected_units(drawn)
    assert found in ways
    assert len(found) == max(len(way) for way in ways)


@LAWS
@given(drawn_networks)
def test_removed_is_masked_in_random_networks(drawn: Drawn) -> None:
    assert_removed_is_masked(drawn)


@LAWS
@given(drawn_networks)
def test_groups_of_random_networks_are_those_of_brute_force(drawn: Drawn) -> None:
    assert_groups_are_those_of_brute_force(drawn)


def test_a_grouped_convolution_left_with_one_channel_per_group_is_not_taken_for_depthwise() -> None:
    drawn = build(["grouped"], width=4, is_flat=False, seed=0)
    channels = find_groups(drawn.model)
    first, second = (group.name for group in channels.groups)

    keep = {first: (1,), second: (0, 2)}

    assert channels.group(first).width == 2  # of four channels: the same place in both groups
    check_carved(channels, keep, carve(drawn.model, channels, keep))


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_obeys_both_laws(block: str) -> None:
    drawn = build([block, "plain"], width=8, is_flat=False, seed=0)

    assert drawn.blocks == [block, "plain"]
    assert_removed_is_masked(drawn)
    assert_groups_are_those_of_brute_force(drawn)


class Ties:
    """Slots that go together: a union-find."""

    def __init__(self) -> None:
        self.parent: dict = {}

    def root(self, slot):
        self.parent.setdefault(slot, slot)
        while self.parent[slot] != slot:
            slot = self.parent[slot]
        return slot

    def tie(self, *slots) -> None:
        roots = [self.root(slot) for slot in slots]
        for root in roots[1:]:
            self.parent[self.root(root)] = self.root(roots[0])

    def copy(self) -> "Ties":
        other = Ties()
        other.parent = dict(self.parent)
        return other


def expected_units(drawn: Drawn) -> list[set[frozenset]]:
    """Return the units for every combination of ways to keep what is left rectangular."""
    arrivals = disturbances(drawn)
    ties = Ties()
    for elements in arrivals.values():
        for sources in elements.reshape(-1):
            ties.tie(*sources) if sources else None
    shapes = {tensor.name: tuple(tensor.dims) for tensor in drawn.model.graph.initializer}
    choices = []
    for layer in drawn.layers:
        for follower in layer.followers:
            if shapes[follower] == shapes[layer.weight]:  # the other part of a sum: both axes
                for axis in (layer.makes, layer.reads):
                    for place in range(shapes[follower][axis]):
                        ties.tie((layer.weight, axis, place), (follower, axis, place))
            else:
                for place in range(shapes[follower][0]):
                    ties.tie((layer.weight, layer.makes, place), (follower, 0, place))
        read = per_channel(arrivals[layer.source])
        if layer.groups == 1:
            for place, sources in enumerate(read):
                ties.tie((layer.weight, layer.reads, place), *(sources or [FIXED]))
        else:
            choices.append(ways_of_grouped(layer, read, shapes[layer.weight]))
    for parameter, value in drawn.followers:
        for place, sources in enumerate(per_channel(arrivals[value])):
            ties.tie((parameter, 0, place), *sources)
    for sources in per_channel(arrivals[drawn.model.graph.output[0].name]):
        ties.tie(FIXED, *sources)
    for grid in drawn.grids:
        cells = per_cell(arrivals[grid])
        choices.append(([[*row] for row in cells.T], [[*row] for row in cells]))
    found = []
    for ways in itertools.product(*choices):
        mine = ties.copy()
        for rows in ways:
            for row in rows:
                mine.tie(*(slot for slots in row for slot in slots))
        found.append(offered(mine, drawn))
    return found


def ways_of_grouped(layer, read, shape) -> tuple[list, list]:
    """Return what is tied if the same positions of all groups go, or if whole groups go."""
    inputs = np.empty(len(read), dtype=object)
    inputs[:] = read
    made = np.empty(shape[0], dtype=object)
    made[:] = [{(layer.weight, layer.makes, place)} for place in range(shape[0])]
    inputs, made = inputs.reshape(layer.groups, -1), made.reshape(layer.groups, -1)
    columns = [{(layer.weight, layer.reads, place)} for place in range(shape[1])]
    positions = [[*inputs[:, p], columns[p]] for p in range(shape[1])]
    positions += [[*made[:, p]] for p in range(made.shape[1])]
    whole = [[*inputs[g], *made[g]] for g in range(layer.groups)]
    whole.append([{FIXED}, *columns])
    return positions, whole


def offered(ties: Ties, drawn: Drawn) -> set[frozenset]:
    """Return the units that can go: not fixed, and another one of their kind stays."""
    units: dict = defaultdict(set)
    for slot in ties.parent:
        units[ties.root(slot)].add(slot)
    units.pop(ties.root(FIXED))
    makes = {(layer.weight, layer.makes) for layer in drawn.layers}
    axes = makes | {(layer.weight, layer.reads) for layer in drawn.layers}
    kinds: dict = defaultdict(list)
    for unit in units.values():
        footprint = Counter((parameter, axis) for parameter, axis, _ in unit)
        if makes & footprint.keys():
            kinds[frozenset(footprint.items())].append(unit)
    return {
        frozenset(slot for slot in unit if slot[:2] in axes)
        for kind in kinds.values()
        if len(kind) > 1
        for unit in kind
    }


def per_channel(elements: np.ndarray) -> list[set]:
    """Return for every position of the second axis what arrives there."""
    rows = np.moveaxis(elements, 1, 0).reshape(elements.shape[1], -1)
    return [set().union(*row) for row in rows]


def per_cell(elements: np.ndarray) -> np.ndarray:
    """Return for every group and position of a grid what arrives there."""
    cells = np.empty(elements.shape[1:3], dtype=object)
    for place in np.ndindex(cells.shape):
        cells[place] = set().union(*elements[0][place].reshape(-1))
    return cells


def disturbances(drawn: Drawn) -> dict[str, np.ndarray]:
    """Return for every element of every value the channels whose disturbance arrives there."""
    cut = cut_at_layers(drawn)
    session = ReferenceEvaluator(cut)
    names = [output.name for output in cut.graph.output]
    random = np.random.default_rng(0)
    shapes = {
        info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        for info in cut.graph.input
    }
    feeds = {name: random.uniform(1, 2, shape) for name, shape in shapes.items()}
    calm = dict(zip(names, session.run(None, feeds), strict=True)) | feeds
    found = {name: np.empty(np.shape(values), dtype=object) for name, values in calm.items()}
    for elements in found.values():
        for place in np.ndindex(elements.shape):
            elements[place] = set()
    slots = {layer.output: (layer.weight, layer.makes) for layer in drawn.layers}
    for source, shape in shapes.items():
        for channel in range(shape[1]):
            feed = feeds[source].copy()
            feed[:, channel] += 0.37
            loud = dict(zip(names, session.run(None, feeds | {source: feed}), strict=True))
            slot = FIXED if source == "input" else (*slots[source], channel)
            for name, values in (loud | {source: feed}).items():
                for place in zip(*np.nonzero(values != calm[name]), strict=True):
                    found[name][place].add(slot)
    return found


def cut_at_layers(drawn: Drawn) -> onnx.ModelProto:
    """Return the network in which what a layer makes is an input; parameters are positive."""
    inferred = onnx.shape_inference.infer_shapes(drawn.model).graph
    known = {info.name: info for info in [*inferred.value_info, *inferred.output, *inferred.input]}
    made = [layer.output for layer in drawn.layers]
    nodes = [node for node in drawn.model.graph.node if node.name not in made]
    tensors = []
    for tensor in drawn.model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        positive = np.abs(values) + 0.1 if tensor.data_type == TensorProto.DOUBLE else values
        if tensor.name.endswith(".mean"):
            positive = 0 * values  # nothing may fall below zero, where a Relu would hide it
        tensors.append(numpy_helper.from_array(positive, tensor.name))
    outputs = [known[name] for node in nodes for name in node.output]
    graph = helper.make_graph(
        nodes, "cut", [known["input"], *(known[name] for name in made)], outputs, tensors
    )
    return helper.make_model(graph, opset_imports=drawn.model.opset_import, ir_version=9)

"""Surgery on what the channel analysis finds, from tiny networks to whole ones."""

from collections import Counter

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from hardware.graph.carve import carve
from hardware.graph.channel_map import ChannelMap
from pipeline.channels.find import find_groups
from pipeline.networks.analyse import fit_to_class
from pipeline.networks.export import export_graph
from pipeline.networks.fold_norms import fold_norms
from pipeline.networks.load import load_network
from pipeline.networks.store import load_pruned, save_network
from pipeline.recipe import ModelSection
from pipeline.records import Network
from pipeline.surgery.proof import examine, prove
from pipeline.surgery.remove import prune
from tests import nets
from tests.graphs import exported
from tests.pipeline.maps import random_keep

EXACT = 1e-12
WHOLE = {
    "benchmarks.networks:digits_resnet": (1, 32, 32),
    "benchmarks.networks:cifar_resnet": (3, 32, 32),
    "timm:resnet18": (3, 64, 64),
    "torchvision:mobilenet_v2": (3, 64, 64),
}
# The class's own forward fixes these sizes; the graph of the same network can lose them.
FIXED = {
    "padded_shortcut": {"conv2"},  # pads by a number
    "split": {"conv1", "conv1#2"},  # chunks into equal halves
    "hierarchy": {"conv1", "conv1#2"},
}


def tiny(name: str) -> Network:
    return Network(
        module=nets.build(name),
        spec=f"tests.nets:{type(nets.build(name)).__name__}",
        arguments={},
        input_shape=nets.INPUT_SHAPE,
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small that a second thread only waits
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def fitted() -> dict[str, ChannelMap]:
    return {name: fit_to_class(tiny(name), find_groups(exported(name))) for name in nets.NETS}


@pytest.mark.parametrize("name", nets.NETS)
def test_the_class_loses_what_its_forward_does_not_fix(fitted, name):
    found = {group.name for group in fitted[name].groups if group.frozen is None}

    assert found == set(nets.WIDTHS[name]) - FIXED.get(name, set())
    assert {b.name for b in fitted[name].branches} == set(nets.BRANCHES.get(name, {}))


@pytest.mark.parametrize("name", nets.NETS)
def test_removed_is_masked_at_random_widths(fitted, name):
    for seed in range(3):
        keep = random_keep(fitted[name], seed, emptied=seed)

        assert examine(tiny(name), fitted[name], keep).error < EXACT


@pytest.mark.parametrize("name", ["many_groups", "group_normed", "inverted", "tied", "upsampled"])
def test_what_was_pruned_reads_back(fitted, name, tmp_path):
    network, channels = tiny(name), fitted[name]
    keep = random_keep(channels, 2, emptied=1)
    pruned = prune(network, channels, keep)

    save_network(pruned, network, channels, keep, tmp_path)

    x = network.example(2)
    assert torch.equal(load_pruned(tmp_path).module(x), pruned.module(x))


@pytest.mark.parametrize("name", ["residual", "inverted", "layer_normed"])
def test_the_exported_class_is_the_carved_graph(fitted, name):
    network, channels = tiny(name), fitted[name]
    keep = random_keep(channels, 1, emptied=1)

    exported_class = fold_norms(export_graph(prune(network, channels, keep)))
    carved = carve(fold_norms(exported(name)), channels, keep)

    operators = [Counter(n.op_type for n in g.graph.node) for g in (exported_class, carved)]
    assert operators[0] == operators[1]
    feeds = {"input": network.example().numpy()}
    one, other = (ReferenceEvaluator(g).run(None, feeds)[0] for g in (exported_class, carved))
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * float(np.abs(other).max()))


@pytest.mark.parametrize(
    "spec", [s if "benchmarks" in s else pytest.param(s, marks=pytest.mark.slow) for s in WHOLE]
)
def test_removed_is_masked_in_a_whole_network_over_two_rounds(spec, tmp_path):
    arguments = {"depth": 20} if "cifar" in spec else {}
    section = ModelSection(name=spec, arguments=arguments, input_shape=WHOLE[spec])
    network = load_network(section)
    channels = fit_to_class(network, find_groups(export_graph(network)))
    keep = random_keep(channels, 0, emptied=3)

    assert prove(network, channels, keep) < EXACT
    once = prune(network, channels, keep)
    again = fit_to_class(once, find_groups(export_graph(once)))
    later = random_keep(again, 1, emptied=1)
    assert prove(once, again, later) < EXACT
    twice = prune(once, again, later)
    save_network(twice, network, channels, keep, tmp_path)
    x = network.example(2)
    assert torch.equal(load_pruned(tmp_path).module(x), twice.module(x))

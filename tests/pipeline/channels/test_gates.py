"""Gates that look at neighbouring channels: the channels around them stay prunable."""

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from hardware.graph.carve import carve
from hardware.graph.channel_map import ChannelMap
from pipeline.channels.checks import check_carved
from pipeline.channels.find import find_groups
from pipeline.networks.export import export_graph
from pipeline.records import Network
from tests import nets
from tests.graphs import difference, run

WIDTH = 8


class NeighbourGate(nn.Module):
    """A convolution gated by what a convolution along its channels makes of their means.

    Reference:
        Wang et al., "ECA-Net: Efficient Channel Attention for Deep CNNs", CVPR 2020,
        arXiv:1910.03151, figure 2.
    """

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(nets.INPUT_SHAPE[0], width, 3, padding=1)
        self.gate = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, 6, 3, padding=1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, 2, height, width)."""
        x = self.conv1(x)
        scores = self.gate(x.mean((2, 3)).view(x.shape[0], 1, -1)).view(x.shape[0], -1, 1, 1)
        made: Tensor = self.head(torch.relu(self.conv2(x * scores.sigmoid())))
        return made


@pytest.fixture(scope="module")
def gated() -> tuple[nn.Module, onnx.ModelProto, ChannelMap]:
    module = nets.randomise(NeighbourGate())
    network = Network(module=module, spec="gate", arguments={}, input_shape=nets.INPUT_SHAPE)
    graph = export_graph(network)
    return module, graph, find_groups(graph)


def test_channels_that_a_gate_mixes_are_prunable_and_say_so(gated) -> None:
    groups = {group.name: (group.width, group.mixes) for group in gated[2].prunable}

    assert groups == {"conv1": (WIDTH, "Conv"), "conv2": (6, None)}


def test_a_gate_looks_at_the_neighbours_that_are_left(gated) -> None:
    module, graph, channels = gated
    kept = (0, 3, 4, 6, 7)
    narrow = NeighbourGate(len(kept))
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for name in ("conv1.weight", "conv1.bias"):
        state[name] = state[name][list(kept)]
    state["conv2.weight"] = state["conv2.weight"][:, list(kept)]
    narrow.load_state_dict(state)

    carved = carve(graph, channels, {"conv1": kept})
    images = np.random.default_rng(0).standard_normal((1, *nets.INPUT_SHAPE)).astype(np.float32)
    with torch.no_grad():
        expected = narrow(torch.from_numpy(images)).numpy()

    check_carved(channels, {"conv1": kept}, carved)
    assert difference(run(carved), [expected]) < 1e-5

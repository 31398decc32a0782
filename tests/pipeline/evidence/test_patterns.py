import pytest
import torch
from torch import nn

from hardware.graph.channel_map import ChannelMap
from pipeline.evidence.needs import PATTERNS
from pipeline.evidence.patterns import collect_patterns
from pipeline.evidence.views import group_views
from pipeline.redundancy import MEASURES
from tests.pipeline.maps import cut, group, network_of


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)
    ).eval()


def test_a_linear_filter_looks_for_itself_at_the_centre() -> None:
    net, channels = chain(), ChannelMap(groups=(group(4, ["0"], ["1"], ["3"]),))
    with torch.no_grad():
        net[1].weight[1] = -1  # the batch norm turns what it looks for around

    [patterns] = collect_patterns(net, channels, (2, 7, 7)).values()

    window = patterns.reshape(4, 2, 7, 7)[:, :, 2:5, 2:5].flatten(1)
    weights = net[0].weight.detach().flatten(1) * torch.tensor([1.0, -1, 1, 1])[:, None]
    cosines = nn.functional.cosine_similarity(window, weights)
    torch.testing.assert_close(cosines, torch.ones(4))
    assert patterns.norm(dim=1).tolist() == pytest.approx(window.norm(dim=1).tolist())


def test_twins_share_a_function_and_a_dead_filter_has_none() -> None:
    net, channels = chain(), ChannelMap(groups=(group(4, ["0"], ["1"], ["3"]),))
    with torch.no_grad():
        net[0].weight[2] = 3 * net[0].weight[0]
        net[0].weight[3] = 0
    state = {name: value.clone() for name, value in net.state_dict().items()}

    [view] = group_views(network_of(net, 2, 7, 7), channels, needs=(PATTERNS,))
    floor = MEASURES["functionality_maximised"](view)

    assert floor.floor == 2 and floor.score == 2
    assert "2 patterns of 4 filters" in floor.detail and "1 look for nothing" in floor.detail
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert not net[1]._forward_hooks


def test_linear_layers_have_patterns_and_groups_that_no_layer_makes_have_none() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    made = group(3, ["1"], [], ["3"])
    unmade = made.model_copy(update={"name": "x", "slices": (cut("3.weight", "input", 3, axis=1),)})

    found = collect_patterns(net, ChannelMap(groups=(made, unmade)), (2, 2, 2))

    cosines = nn.functional.cosine_similarity(found[made.name], net[1].weight.detach())
    torch.testing.assert_close(cosines, torch.ones(3))
    assert found.keys() == {made.name}

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from benchmarks.networks import digits_resnet
from hardware.graph.channel_map import Branch, ChannelMap, Group, ParameterSlice
from hardware.records import load_record
from pipeline.errors import PipelineError
from pipeline.evidence import sensitivity
from pipeline.evidence.recalibrate import recalibrate_module
from pipeline.evidence.sensitivity import LossTable, measure_damage, most_salient
from pipeline.records import Network
from pipeline.surgery.mask import masked
from tests.pipeline.maps import network_of, resnet_map

Batches = list[tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure exactly, so that it can be held against a plain computation."""
    monkeypatch.setattr(sensitivity, "has_bf16", lambda place: False)


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    network = network_of(digits_resnet(width=4, blocks=1), 1, 8, 8)
    for part in network.module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight)
            nn.init.normal_(part.running_mean)
    return network


@pytest.fixture
def channels(network: Network) -> ChannelMap:
    return resnet_map(network.module)


@pytest.fixture
def batches() -> Batches:
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 1, 8, 8, generator=draw), torch.randint(0, 10, (n,), generator=draw))
        for n in (4, 3)
    ]


@pytest.fixture
def many() -> Batches:
    """Enough images for a variance over n and one over n - 1 to be the same."""
    draw = torch.Generator().manual_seed(3)
    images = torch.randn(128, 1, 8, 8, generator=draw)
    return [(images, torch.randint(0, 10, (128,), generator=draw))]


def candidates_of(channels: ChannelMap) -> dict[str, tuple[int, ...]]:
    emptiable = {name for branch in channels.branches for name in branch.groups}
    return {
        group.name: ((0,) if group.name in emptiable else ()) + (group.width // 2, group.width)
        for group in channels.prunable
    }


def saliency_of(channels: ChannelMap) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    return {group.name: torch.rand(group.width, generator=draw) for group in channels.prunable}


def recalibrated_loss(module: nn.Module, batches: Batches) -> float:
    """The plain way: a copy whose batch norms get their statistics from the images."""
    module = copy.deepcopy(module)
    recalibrate_module(module, batches)
    with torch.no_grad():
        sums = [functional.cross_entropy(module(x), y, reduction="sum").item() for x, y in batches]
    return sum(sums) / sum(len(y) for _, y in batches)


def test_damage_is_the_rise_of_the_loss_after_recalibration(network, channels, many) -> None:
    candidates, saliency = candidates_of(channels), saliency_of(channels)
    recalibrate_module(network.module, many)

    damage = measure_damage(network, channels, saliency, candidates, many)

    module, full = network.module, recalibrated_loss(network.module, many)
    rises = []
    for name, widths in candidates.items():
        assert damage[name].keys() == set(widths) and damage[name][widths[-1]] == 0
        for width in widths[:-1]:
            with masked(module, channels, {name: most_salient(saliency[name], width)}):
                rise = recalibrated_loss(module, many) - full
            assert damage[name][width] == pytest.approx(rise, rel=0.02, abs=1e-4)
            rises.append(abs(rise))
    assert max(rises) > 0.01  # else this test could not tell


def test_a_layer_whose_scale_the_next_norm_takes_out_does_no_damage() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip
    with torch.no_grad():
        net[0].weight[2:], net[0].bias[2:] = net[0].weight[:2], net[0].bias[:2]  # twins
        net[1].weight[:, 2:] = net[1].weight[:, :2]
    images = [(torch.randn(16, 1, 9, 9), torch.randint(0, 3, (16,)))]
    recalibrate_module(net, images)
    parts = (("0.weight", 0, "filter"), ("0.bias", 0, "bias"), ("1.weight", 1, "input"))
    slices = [
        ParameterSlice(parameter=name, axis=axis, role=role, units=(0, 1, 2, 3))
        for name, axis, role in parts
    ]
    group = Group(name="0", width=4, slices=tuple(slices))
    network, channels = network_of(net, 1, 9, 9), ChannelMap(groups=(group,))

    damage = measure_damage(
        network, channels, {group.name: torch.arange(4.0)}, {group.name: (2, 4)}, images
    )

    # The remaining twins give half of what all four gave, and the norm doubles it.
    assert damage[group.name][2] == pytest.approx(0, abs=1e-4)
    with masked(net.eval(), channels, {group.name: (2, 3)}), torch.no_grad():
        halved = functional.cross_entropy(net(images[0][0]), images[0][1]).item()
    assert abs(halved - recalibrated_loss(net, images)) > 1e-2


def test_the_network_is_not_changed(network, channels, batches) -> None:
    network.module.train()
    before = {name: tensor.clone() for name, tensor in network.module.state_dict().items()}

    measure_damage(network, channels, saliency_of(channels), candidates_of(channels), batches)

    after = network.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert network.module.training
    assert all("forward" not in part.__dict__ for part in network.module.modules())


def test_what_emptying_a_branch_does_is_split_over_its_groups(network, channels, many) -> None:
    inner, outer = channels.branches[0], channels.branches[1]
    both = Branch(
        name="both",
        groups=inner.groups + outer.groups,
        layers=(),
        join="add",
        parameters=inner.parameters + outer.parameters,
    )
    nested = channels.model_copy(update={"branches": (both, inner)})
    candidates = {inner.groups[0]: (0, 4), outer.groups[0]: (0, 8)}

    recalibrate_module(network.module, many)
    damage = measure_damage(network, nested, saliency_of(channels), candidates, many)

    full = recalibrated_loss(network.module, many)
    with masked(network.module, nested, dict.fromkeys(both.groups, ())):
        rise = recalibrated_loss(network.module, many) - full
    with masked(network.module, channels, dict.fromkeys(inner.groups, ())):
        alone = recalibrated_loss(network.module, many) - full
    assert damage[inner.groups[0]][0] == pytest.approx(alone, rel=0.02)
    assert damage[outer.groups[0]][0] == pytest.approx(rise - alone, rel=0.04)


class KilledError(Exception):
    """Stands for the signal that ends a run."""


def test_a_killed_measurement_continues_and_gives_the_same(
    network, channels, batches, tmp_path, monkeypatch
) -> None:
    candidates, saliency, cache = (
        candidates_of(channels),
        saliency_of(channels),
        tmp_path / "d.json",
    )
    monkeypatch.setattr(sensitivity, "SAVE_EVERY_S", 0.0)
    whole = measure_damage(network, channels, saliency, candidates, batches)
    counts: list[int] = []

    def kill(done: int, total: int, text: str) -> None:
        counts.append(done)
        if len(counts) == 5:
            raise KilledError

    with pytest.raises(KilledError):
        measure_damage(network, channels, saliency, candidates, batches, kill, cache)
    first = sum(len(line) for line in json.loads(cache.read_text())["sums"].values())
    resumed = measure_damage(
        network, channels, saliency, candidates, batches, lambda d, t, x: counts.append(d), cache
    )

    assert first == 4 and counts[5] == first + 1
    assert resumed == whole


def test_new_widths_extend_a_cache_and_other_inputs_replace_it(
    network, channels, batches, tmp_path
) -> None:
    saliency, cache = saliency_of(channels), tmp_path / "damage.json"
    name = channels.prunable[0].name

    def runs(candidates, batches=batches, saliency=saliency) -> int:
        done: list[int] = []
        measure_damage(
            network, channels, saliency, candidates, batches, lambda d, t, x: done.append(d), cache
        )
        return len(done)

    assert runs({name: (2, 4)}) == 4  # the full network and one width, two batches
    assert runs({name: (2, 4)}) == 0
    assert runs({name: (1, 2, 4)}) == 2
    assert runs({name: (2, 4)}, batches=batches[:1]) == 2
    assert runs({name: (2, 4)}, saliency={**saliency, name: -saliency[name]}) == 4
    with torch.no_grad():
        network.module.linear.bias.add_(1)
    assert runs({name: (2, 4)}, saliency={**saliency, name: -saliency[name]}) == 4


def test_a_damaged_cache_is_measured_again(network, channels, batches, tmp_path: Path) -> None:
    candidates, saliency = candidates_of(channels), saliency_of(channels)
    cache = tmp_path / "damage.json"
    cache.write_text("{")

    found = measure_damage(network, channels, saliency, candidates, batches, cache=cache)

    assert found == measure_damage(network, channels, saliency, candidates, batches, cache=cache)
    assert len(load_record(LossTable, cache).sums["full"]) == 2  # one sum per batch


def test_no_images_and_a_broken_network_are_refused(network, channels, batches) -> None:
    candidates, saliency = candidates_of(channels), saliency_of(channels)
    broken = network_of(digits_resnet(width=4, blocks=1), 1, 8, 8)
    nn.init.constant_(broken.module.linear.bias, float("nan"))

    with pytest.raises(PipelineError, match="no calibration images"):
        measure_damage(network, channels, saliency, candidates, [])
    with pytest.raises(PipelineError, match="loss on calibration images is nan"):
        measure_damage(broken, channels, saliency, candidates, batches)


def test_bf16_gives_nearly_the_same(network, channels, batches, monkeypatch) -> None:
    candidates, saliency = candidates_of(channels), saliency_of(channels)
    exact = measure_damage(network, channels, saliency, candidates, batches)
    monkeypatch.setattr(sensitivity, "has_bf16", lambda place: True)

    rounded = measure_damage(replace(network), channels, saliency, candidates, batches)

    extent = max(abs(x) for line in exact.values() for x in line.values())
    for name, line in exact.items():
        assert rounded[name] == pytest.approx(line, abs=0.1 * extent)

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import pipeline.training.training
from benchmarks.networks import digits_resnet
from hardware.graph.channel_map import ChannelMap
from pipeline.errors import TrainingError
from pipeline.recipe import DataSection, SparsifySection
from pipeline.records import Network
from pipeline.surgery.mask import masked
from pipeline.tasks.data import Data, load_data
from pipeline.training.sparsifying.admm import Admm, phase_of, project
from pipeline.training.sparsifying.scp import SoftMasks, silenced, soft_mask
from pipeline.training.sparsifying.targets import Target, channel_norms, parameters_of, targets_of
from pipeline.training.stages import Sparsified, sparsify
from pipeline.training.training import TrainingJob
from tests.pipeline.maps import cut, group, network_of, resnet_map

METHODS = ["admm", "scp"]


def chain() -> tuple[nn.Module, ChannelMap]:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)
    )
    return net, ChannelMap(groups=(group(4, ["0"], ["1"], ["3"]),))


def admm(net: nn.Module, channels: ChannelMap, keep: dict, **changes: object) -> Admm:
    return Admm(net, channels, keep, SparsifySection(method="admm", **changes))


# ADMM


def test_the_projection_keeps_the_filters_of_largest_norm_and_zeroes_the_others() -> None:
    weight = torch.tensor([[3.0, 4], [0, 1], [6, 8], [0, 0.5]])  # norms 5, 1, 10, 0.5
    target = Target(group="g", full=4, width=2, made=(cut("w", "filter", 4),), read=())

    found, kept = project({"w": weight}, {target: 2}, ())

    assert kept == {"g": (0, 2)}
    assert found["w"].tolist() == [[3, 4], [0, 0], [6, 8], [0, 0]]
    # No two other filters come nearer: what is lost is 1 + 0.25 squared.
    assert float((found["w"] - weight).square().sum()) == 1.25


def test_a_channel_is_its_filters_in_all_coupled_layers_and_its_batch_norms() -> None:
    tensors = {"a": torch.eye(2) * 3, "b": torch.tensor([[4.0], [0]]), "n": torch.tensor([0, 4.0])}
    slices = (cut("a", "filter", 2), cut("b", "filter", 2), cut("n", "norm", 2))

    assert channel_norms(tensors, slices, 2).tolist() == [5, 5]


def test_positions_of_other_groups_are_neither_projected_nor_penalised() -> None:
    net, channels = chain()
    shared = channels.groups[0].model_copy(
        update={"slices": (cut("0.weight", "filter", (0, 1, -1, -1)),), "width": 2}
    )
    penalty = admm(net, ChannelMap(groups=(shared,)), {shared.name: (0,)}, rho=0.01)
    penalty.begin(0)
    with torch.no_grad():
        net[0].weight[2:] += 5

    assert penalty.loss() is not None
    norms = net[0].weight.detach()[:2].flatten(1).square().sum(dim=1)
    assert penalty.loss().item() == pytest.approx(0.01 / 2 * float(norms.min()), rel=1e-5)


def test_the_dual_adds_up_what_is_still_to_go_and_rho_grows() -> None:
    net, channels = chain()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([4.0, 1, 2, 3]).reshape(4, 1, 1, 1).expand(4, 1, 3, 3))
    penalty = admm(
        net, channels, {channels.groups[0].name: (0, 3)}, epochs=4, rho=0.01, masked_share=0
    )

    penalty.begin(0)
    first = penalty.loss().item()
    penalty.begin(1)
    second = penalty.loss().item()

    # Filters 1 and 2 are to go, with their batch norms of scale 1: 9 * (1 + 4) + 2.
    assert first == pytest.approx(0.01 / 2 * 47, rel=1e-5)
    # W - Z + U is twice as far after an update with W unchanged, and rho is 1.3 times as large.
    assert second == pytest.approx(1.3 * 4 * first, rel=1e-5)
    assert penalty.dual["0.weight"][:, 0, 0, 0].tolist() == [0, 1, 2, 0]


def test_gradient_descent_on_the_penalty_ends_at_the_projection() -> None:
    torch.manual_seed(0)
    net, channels = chain()
    before = net[0].weight.detach().clone()
    name = channels.groups[0].name
    penalty = admm(net, channels, {name: (0, 1)}, epochs=10, rho=1.0, masked_share=0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)

    for step in range(100):
        if step % 10 == 0:
            penalty.begin(step // 10)
        optimizer.zero_grad()
        penalty.loss().backward()
        optimizer.step()

    kept = penalty.finish()[name]
    norms = channel_norms({"0.weight": before}, (cut("0.weight", "filter", 4),), 4)
    assert kept == tuple(sorted(norms.argsort(descending=True)[:2].tolist()))
    torch.testing.assert_close(net[0].weight[list(kept)].detach(), before[list(kept)])
    gone = [unit for unit in range(4) if unit not in kept]
    assert net[0].weight[gone].abs().max() == 0 == net[1].bias[gone].abs().max()


def test_a_progression_falls_in_equal_ratios_and_each_step_ends_masked() -> None:
    section = SparsifySection(method="admm", epochs=12, steps=2, masked_share=0.34)
    phases = [phase_of(epoch, section) for epoch in range(12)]
    target = Target(group="g", full=64, width=16, made=(), read=())

    assert [phase.step for phase in phases] == [0] * 6 + [1] * 6
    assert [phase.is_masked for phase in phases] == ([False] * 4 + [True] * 2) * 2
    assert [target.width_at(step, 2) for step in (1, 2)] == [32, 16]


def test_masked_retraining_holds_what_is_gone_at_zero() -> None:
    torch.manual_seed(0)
    net, channels = chain()
    penalty = admm(net, channels, {channels.groups[0].name: (0, 1)}, epochs=2, masked_share=0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(2):
        penalty.begin(epoch)
        loss = net(torch.randn(2, 1, 8, 8)).square().sum()
        assert (penalty.loss() is None) == (epoch == 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        penalty.after_step()

    [kept] = penalty.finish().values()
    gone = [unit for unit in range(4) if unit not in kept]
    for tensor in (net[0].weight[gone], net[1].weight[gone], net[3].weight[:, gone]):
        assert tensor.abs().max() == 0
    assert net[0].weight[list(kept)].abs().min() > 0


# SCP


def test_a_relu_behind_a_norm_is_silent_with_the_probability_of_the_normal_distribution() -> None:
    scale, shift = torch.tensor([1.0, 1, 2, -1]), torch.tensor([0.0, 1, 2, -1])

    phi = [0.5 * (1 + math.erf(x / math.sqrt(2))) for x in (0, -1, -1, 1)]
    assert silenced(scale, shift).tolist() == pytest.approx(phi, abs=1e-6)
    draws = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    assert float((draws + 1 <= 0).float().mean()) == pytest.approx(phi[1], abs=5e-3)


def test_the_mask_passes_as_many_channels_as_the_plan_has_room_for() -> None:
    chances = torch.tensor([0.9, 0.1, 0.5, 0.3])

    soft, hard = soft_mask(chances, 2, 10.0), soft_mask(chances, 2, 1000.0)

    # The threshold is 0.4, half way between the second and the third.
    assert soft.tolist() == pytest.approx([1 / (1 + math.exp(10 * (c - 0.4))) for c in chances])
    assert hard.round().tolist() == [0, 1, 0, 1]


def test_the_mask_is_a_function_of_scale_and_shift_that_the_loss_can_change() -> None:
    net, channels = chain()
    nn.init.uniform_(net[1].bias, -1, 1)
    section = SparsifySection(method="scp", epochs=2)
    penalty = SoftMasks(net, channels, {channels.groups[0].name: (0, 1)}, section)
    penalty.begin(0)

    torch.autograd.grad(penalty.loss(), [net[1].weight, net[1].bias])
    net(torch.randn(2, 1, 8, 8)).square().sum().backward()

    assert penalty.masks[channels.groups[0].name].requires_grad
    assert net[1].bias.grad.abs().max() > 0


def test_putting_the_masks_into_the_norms_changes_nothing_behind_a_relu() -> None:
    torch.manual_seed(0)
    net, channels = chain()
    nn.init.uniform_(net[1].bias, -1, 1)
    section = SparsifySection(method="scp", epochs=2)
    penalty = SoftMasks(net.eval(), channels, {channels.groups[0].name: (0, 1)}, section)
    penalty.begin(0)
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        hooked = net(images)
        kept = penalty.finish()[channels.groups[0].name]
        folded = net(images)

    torch.testing.assert_close(folded, hooked)
    chances = silenced(torch.ones(4), net[1].bias.detach() / net[1].weight.detach())
    assert kept == tuple(sorted(chances.argsort()[:2].tolist()))
    assert not net._forward_pre_hooks and not net[1]._forward_hooks


# Both, as a stage


SHAPE = (1, 16, 16)


@pytest.fixture(scope="module")
def data() -> Data:
    return load_data(DataSection(source="digits", batch=120), SHAPE, seed=5)


@pytest.fixture(scope="module")
def subject() -> tuple[Network, ChannelMap, dict[str, tuple[int, ...]]]:
    torch.manual_seed(0)
    network = network_of(digits_resnet(width=4, blocks=1), *SHAPE)
    channels = resnet_map(network.module)
    emptied = channels.branches[1].groups
    keep = {
        one.name: () if one.name in emptied else tuple(range(one.width // 2))
        for one in channels.prunable
    }
    return network, channels, keep


def section_of(method: str, epochs: int = 4) -> SparsifySection:
    return SparsifySection(
        method=method, epochs=epochs, learning_rate=0.05, warmup_epochs=0.5, distill=0.0,
        bf16=False, rho=0.3, sharpness=(10, 1000), pressure=5,
    )  # fmt: skip


def run(subject, data: Data, folder: Path, method: str, epochs: int = 4) -> Sparsified:
    network, channels, keep = subject
    job = TrainingJob(network=network, teacher=network, data=data, folder=folder, seed=3)
    return sparsify(job, section_of(method, epochs), channels, keep)


@pytest.mark.parametrize("method", METHODS)
def test_a_sparse_network_loses_nothing_when_the_chosen_channels_go(
    subject, data, tmp_path, method
) -> None:
    network, channels, keep = subject
    images = next(data.validation_batches())[0]
    before = {name: value.clone() for name, value in network.module.state_dict().items()}

    found = run(subject, data, tmp_path, method)

    assert {name: len(units) for name, units in found.keep.items()} == {
        name: len(units) for name, units in keep.items()
    }
    with torch.no_grad():
        full = found.network.module(images)
        with masked(found.network.module, channels, found.keep):
            cut_down = found.network.module(images)
    loss = (full - cut_down).norm() / full.norm()
    assert loss < (1e-6 if method == "admm" else 0.05)
    assert len(found.epochs) == 4 and found.epochs[-1].val_loss < found.epochs[0].val_loss
    assert all(torch.equal(network.module.state_dict()[n], before[n]) for n in before)


class KilledError(Exception):
    """Stands for the signal that ends a run."""


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_stage_continues_to_the_same_network(
    subject, data, tmp_path, method, monkeypatch
) -> None:
    whole = run(subject, data, tmp_path / "whole", method, epochs=2)
    save = pipeline.training.training.save_checkpoint

    def killed(folder: Path, belongs_to, epochs, tensors) -> None:
        save(folder, belongs_to, epochs, tensors)
        if len(epochs) == 1:
            raise KilledError

    monkeypatch.setattr(pipeline.training.training, "save_checkpoint", killed)
    with pytest.raises(KilledError):
        run(subject, data, tmp_path / "killed", method, epochs=2)
    monkeypatch.undo()
    resumed = run(subject, data, tmp_path / "killed", method, epochs=2)
    again = run(subject, data, tmp_path / "killed", method, epochs=2)

    assert resumed.keep == whole.keep == again.keep
    for one in (resumed, again):
        state, expected = one.network.module.state_dict(), whole.network.module.state_dict()
        assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_a_stage_for_other_widths_is_not_continued(subject, data, tmp_path) -> None:
    network, channels, keep = subject
    run(subject, data, tmp_path, "admm", epochs=1)
    wider = {name: (*units, len(units)) if units else () for name, units in keep.items()}

    with pytest.raises(TrainingError, match="holds a training of another plan"):
        run((network, channels, wider), data, tmp_path, "admm", epochs=1)


def test_groups_that_stay_whole_are_no_targets(subject) -> None:
    network, channels, _ = subject
    whole = {one.name: tuple(range(one.width)) for one in channels.prunable}

    assert targets_of(parameters_of(network.module), channels, whole) == ()

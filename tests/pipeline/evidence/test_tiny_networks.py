"""Every criterion, every measure and measured damage on every tiny network, from its own graph."""

import pytest
import torch
from torch import Tensor, nn

from hardware.graph.channel_map import ChannelMap
from pipeline.channels.find import find_groups
from pipeline.criteria import CRITERIA, NEEDS
from pipeline.errors import PipelineError
from pipeline.evidence import sensitivity
from pipeline.evidence.needs import GRADIENTS, PATTERNS, RESPONSES
from pipeline.evidence.recalibrate import following, observing
from pipeline.evidence.sensitivity import measure_damage, most_salient
from pipeline.evidence.views import group_views
from pipeline.planning.widths import candidate_widths
from pipeline.records import GroupView, Network
from pipeline.redundancy import MEASURES
from pipeline.surgery.mask import masked
from pipeline.tasks.losses import classification_loss
from tests import nets
from tests.graphs import exported

# What these count may be equal for all units of a group; scp knows nothing of a linear layer
# without a norm whose bias is added by another node.
COARSE = {"apoz", "hrank", "scp"}

ONE_OUTPUT = sorted(set(nets.NETS) - {"two_heads"})


def network_of(name: str) -> Network:
    return Network(module=nets.build(name), spec=name, arguments={}, input_shape=nets.INPUT_SHAPE)


@pytest.fixture(scope="module")
def maps() -> dict[str, ChannelMap]:
    return {name: find_groups(exported(name)) for name in nets.NETS}


def batches_of(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return two batches, with a label for every element of the outputs if they are maps."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for _ in range(2):
        images = torch.randn(8, *nets.INPUT_SHAPE, generator=draw)
        with torch.no_grad():
            outputs = module(images)
        shape = (len(images), *outputs.shape[2:])
        found.append((images, torch.randint(0, outputs.shape[1], shape, generator=draw)))
    return found


@pytest.fixture(scope="module")
def views(maps: dict[str, ChannelMap]) -> dict[str, tuple[GroupView, ...]]:
    networks = {name: network_of(name) for name in ONE_OUTPUT}
    return {
        name: group_views(
            network, maps[name], batches_of(network.module), needs=(GRADIENTS, RESPONSES, PATTERNS)
        )
        for name, network in networks.items()
    }


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize("name", ONE_OUTPUT)
def test_every_criterion_scores_every_group(views, maps, name, criterion) -> None:
    assert [view.name for view in views[name]] == [g.name for g in maps[name].prunable]
    for view in views[name]:
        scores = CRITERIA[criterion](view)

        assert scores.shape == (view.width,) and bool(scores.isfinite().all())
        assert float(scores.min()) >= 0
        if not scores.any():
            # Its ReLU is closed on these images: nothing arrives, and no gradient comes back.
            assert (name, view.name) == ("inverted", "squeeze") and criterion in NEEDS
            continue
        assert float(scores.mean()) == pytest.approx(1, abs=1e-4)
        assert float(scores.std()) > 0 or criterion in COARSE  # it tells random filters apart


@pytest.mark.parametrize("measure", sorted(MEASURES))
@pytest.mark.parametrize("name", ONE_OUTPUT)
def test_every_measure_gives_every_group_a_floor(views, name, measure) -> None:
    for view in views[name]:
        if measure == "functionality_maximised" and view.patterns is None:
            with pytest.raises(PipelineError, match="runs as a module"):
                MEASURES[measure](view)
            continue
        floor = MEASURES[measure](view)

        assert floor.group == view.name and 1 <= floor.floor <= floor.width == view.width


@pytest.mark.parametrize("name", ONE_OUTPUT)
def test_damage_is_that_of_the_masked_network(maps, name, monkeypatch) -> None:
    monkeypatch.setattr(sensitivity, "has_bf16", lambda place: False)
    network, channels = network_of(name), maps[name]
    module, batches = network.module, batches_of(network.module)
    saliency = {view.name: CRITERIA["l2"](view) for view in group_views(network, channels)}
    candidates = candidate_widths(channels, ())

    damage = measure_damage(network, channels, saliency, candidates, batches)

    moments = []
    for images, _ in batches:
        with torch.no_grad(), observing(module) as seen:
            module(images)
        moments.append(dict(seen))

    def loss() -> float:
        sums = []
        for (images, labels), before in zip(batches, moments, strict=True):
            with torch.no_grad(), following(module, before):
                sums.append(float(classification_loss(module(images), labels, "sum")))
        return sum(sums) / sum(len(y) for _, y in batches)

    full = loss()
    for group, widths in candidates.items():
        narrowest = next(width for width in widths if width)
        with masked(module, channels, {group: most_salient(saliency[group], narrowest)}):
            assert damage[group][narrowest] == pytest.approx(loss() - full, rel=1e-3, abs=2e-3)
    for branch in channels.branches:
        with masked(module, channels, dict.fromkeys(branch.groups, ())):
            rise = loss() - full
        found = sum(damage[group][0] for group in branch.groups)
        assert found == pytest.approx(rise, rel=1e-3, abs=2e-3)


def test_a_network_of_two_outputs_has_no_loss_and_says_so(maps) -> None:
    network, images = network_of("two_heads"), torch.zeros(1, *nets.INPUT_SHAPE)

    with pytest.raises(PipelineError, match="returns a tuple, and measuring a loss takes one"):
        group_views(network, maps["two_heads"], [(images, torch.zeros(1, dtype=torch.long))])


def test_labels_that_do_not_fit_the_outputs_are_refused() -> None:
    with pytest.raises(PipelineError, match=r"outputs of shape \(2, 10\) .* up to 10"):
        classification_loss(torch.zeros(2, 10), torch.tensor([1, 10]), "mean")

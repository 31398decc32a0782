"""The form in which a network is pruned, and that the graph form loses nothing on the way."""

import onnxruntime
import pytest
import torch
from torch import nn

from benchmarks.networks import cifar_resnet
from hardware.graph.channel_map import Branch, ChannelMap
from pipeline.channels.checks import random_keep
from pipeline.errors import NetworkError, RecipeError
from pipeline.networks.analyse import TOLERATED_LOSS, analyse, fit_to_class
from pipeline.networks.export import export_graph
from pipeline.networks.graphform.module import GraphForm
from pipeline.networks.load import load_network
from pipeline.networks.store import load_pruned, save_network
from pipeline.recipe import DataSection, FinetuneSection, ModelSection
from pipeline.records import Network
from pipeline.surgery.proof import examine
from pipeline.surgery.remove import prune
from pipeline.tasks.data import load_data
from pipeline.training.stages import finetune
from pipeline.training.training import TrainingJob
from tests.pipeline.maps import chain, cut, group, network_of


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Fixed(nn.Module):
    """Its `forward` fixes the width of its second convolution."""

    def __init__(self, width, fixed, oddity):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, width, 1), nn.Conv2d(width, fixed, 1)
        self.head, self.oddity, self.fixed = nn.Linear(fixed, 4), oddity, fixed

    def forward(self, x):
        x = self.conv2(self.conv1(x).relu())
        x = x.view(x.shape[0], self.fixed, -1)
        return self.oddity(self.head(x.mean(2)))


class Summed(nn.Module):
    def forward(self, x):
        return x.cumsum(1)  # no operator of the graph form


def fixed(width, fixed, oddity=None):
    module = Fixed(width, fixed, oddity or nn.Identity())
    return Network(module=module, spec="f", arguments={}, input_shape=(3, 8, 8))


@pytest.mark.parametrize(("width", "width_fixed", "form"), [(60, 4, "graph"), (196, 4, "class")])
def test_auto_takes_the_class_unless_it_loses_too_many_channels(width, width_fixed, form):
    lost = width_fixed / (width + width_fixed)

    found = analyse(fixed(width, width_fixed), 1)

    assert (lost > TOLERATED_LOSS) == (form == "graph")
    assert found.form.taken == form and found.form.graph_share == 1
    assert found.form.class_share == pytest.approx(1 - lost)
    assert isinstance(found.network.module, GraphForm) == (form == "graph")
    assert [g.name for g in found.channels.groups if g.frozen] == ["conv2"] * (form == "class")


def test_either_form_can_be_asked_for():
    network = fixed(60, 4)

    one, other = analyse(network, 2, "class"), analyse(network, 2, "graph")

    assert one.network is network and one.form.taken == "class"
    assert (one.form.class_share, one.form.graph_share) == (60 / 64, 1)
    assert other.form.taken == "graph" and other.form.class_share is None
    assert other.template.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2
    assert analyse(other.network, 1).form.taken == "graph"
    with pytest.raises(RecipeError, match=r"surgery is 'class', but f has no class"):
        analyse(other.network, 1, "class")


def test_what_the_graph_form_lacks_is_said_and_the_class_taken():
    network = fixed(60, 4, Summed())

    found = analyse(network, 1)

    assert found.form.taken == "class"
    assert (
        "the graph form cannot be had: The graph form has no implementation of operator CumSum"
        in (found.form.reason)
    )
    with pytest.raises(NetworkError, match=r"operator CumSum.*surgery=class"):
        analyse(network, 1, "graph")


def test_streams_behind_padded_shortcuts_are_pruned_in_graph_form_only():
    network = Network(module=cifar_resnet(8), spec="c", arguments={}, input_shape=(3, 32, 32))
    streams = {"layer2.0.conv2", "layer3.0.conv2"}

    found = analyse(network, 1)

    assert found.form.taken == "graph" and found.form.graph_share == 1
    total = 16 + 2 * (16 + 32 + 64)
    lost = (32 - 16) + (64 - 16)  # what the stream of the first stage does not reach
    assert found.form.class_share == pytest.approx(1 - lost / total)
    assert streams <= {g.name for g in found.channels.prunable}
    keep = random_keep(found.channels, 1)
    assert all(0 < len(keep[name]) < found.channels.group(name).width for name in streams)
    assert examine(found.network, found.channels, keep).error < 1e-9


def test_a_shufflenet_in_graph_form_is_trained_stored_and_delivered(tmp_path):
    section = ModelSection(
        name="torchvision:shufflenet_v2_x0_5",
        arguments={"num_classes": 10},
        input_shape=(3, 32, 32),
    )
    original = load_network(section)
    subject = analyse(original, 1, "graph")
    network, channels = subject.network, subject.channels
    keep = {g.name: tuple(range(0, g.width, 2)) for g in channels.prunable if g.width > 1}
    data = load_data(DataSection(source="digits", batch=128), section.input_shape, seed=0)
    training = FinetuneSection(
        epochs=2, warmup_epochs=0, learning_rate=0.02, bf16=False, distill=0.0
    )

    assert list(network.module.state_dict()) == list(original.module.state_dict())
    assert examine(network, channels, keep).error < 1e-6
    pruned = prune(network, channels, keep)
    job = TrainingJob(network=pruned, data=data, folder=tmp_path / "state", seed=0)
    trained, epochs = finetune(job, training)
    save_network(trained, network, channels, keep, tmp_path / "out")

    assert epochs[1].train_loss < epochs[0].train_loss
    assert finetune(job, training)[1] == epochs  # resumed
    images = next(data.validation_batches())[0][:1]
    with torch.no_grad():
        expected = trained.module(images)
        assert torch.equal(load_pruned(tmp_path / "out").module(images), expected)
    session = onnxruntime.InferenceSession(export_graph(trained).SerializeToString())
    (engine,) = session.run(None, {"input": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(engine), expected, rtol=1e-3, atol=1e-4)


# What a class can lose


def test_a_class_that_shrinks_everywhere_keeps_all_groups():
    network, channels = chain()

    assert fit_to_class(network, channels) == channels


def test_a_size_in_forward_freezes_its_group_with_the_reason():
    network, channels = chain("second")

    fitted = fit_to_class(network, channels)

    assert fitted.group("conv1.weight").frozen is None
    assert "the class's forward fixes this size: " in fitted.group("conv2.weight").frozen
    assert "shape '[1, 8, 8, 8]' is invalid" in fitted.group("conv2.weight").frozen


@pytest.mark.parametrize("fixed", ["together", "not on meta"])
def test_groups_that_fail_jointly_are_found_also_where_meta_does_not_run(fixed):
    network, channels = chain(fixed)

    frozen = [g.name for g in fit_to_class(network, channels).groups if g.frozen]

    assert frozen == (["conv2.weight"] if fixed == "together" else [])


def test_a_branch_that_the_class_cannot_empty_is_dropped():
    class Nosy(nn.Module):
        """Looks at the weight of its second branch's convolution."""

        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)) for _ in "ab")

        def forward(self, x):
            x = x + self.a(x)
            return (x + self.b(x)).to(self.b[0].weight.dtype)

    groups = tuple(
        group(4, [f"{n}.0"], [], [f"{n}.1"], [cut(f"{n}.0.bias", "bias", 4)]) for n in "ab"
    )
    branches = tuple(
        Branch(
            name=n,
            groups=(f"{n}.0.weight",),
            layers=(),
            join="",
            parameters=tuple(f"{n}.{i}.{part}" for i in (0, 1) for part in ("weight", "bias")),
        )
        for n in "ab"
    )
    network = network_of(Nosy(), 3, 8, 8)

    fitted = fit_to_class(network, ChannelMap(groups=groups, branches=branches))

    assert [branch.name for branch in fitted.branches] == ["a"]
    assert fitted.prunable == groups

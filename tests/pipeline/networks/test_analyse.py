"""The form in which a network is pruned, and that the graph form loses nothing on the way."""

import onnxruntime
import pytest
import torch
from torch import nn

from benchmarks.networks import cifar_resnet
from pipeline.channels.checks import random_keep
from pipeline.errors import NetworkError, RecipeError
from pipeline.networks.analyse import TOLERATED_LOSS, analyse
from pipeline.networks.export import export_graph
from pipeline.networks.graphform.module import GraphForm
from pipeline.networks.load import load_network
from pipeline.networks.store import load_pruned, save_network
from pipeline.recipe import DataSection, FinetuneSection, ModelSection
from pipeline.records import Network
from pipeline.surgery.prune import examine, prune
from pipeline.tasks.data import load_data
from pipeline.training.finetune import finetune


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
    trained, epochs = finetune(pruned, None, data, training, tmp_path / "state", seed=0)
    save_network(trained, network, channels, keep, tmp_path / "out")

    assert epochs[1].train_loss < epochs[0].train_loss
    assert (
        finetune(pruned, None, data, training, tmp_path / "state", seed=0)[1] == epochs
    )  # resumed
    images = next(data.validation_batches())[0][:1]
    with torch.no_grad():
        expected = trained.module(images)
        assert torch.equal(load_pruned(tmp_path / "out").module(images), expected)
    session = onnxruntime.InferenceSession(export_graph(trained).SerializeToString())
    (engine,) = session.run(None, {"input": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(engine), expected, rtol=1e-3, atol=1e-4)

import copy
import functools

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from benchmarks.networks import digits_resnet
from hardware.errors import StorageError
from pipeline.channels.checks import random_keep
from pipeline.channels.find import find_groups
from pipeline.errors import NetworkError
from pipeline.networks.analyse import fit_to_class
from pipeline.networks.conversion import graph_form
from pipeline.networks.export import export_graph
from pipeline.networks.graphform.module import GraphForm, Roles
from pipeline.networks.load import load_network
from pipeline.networks.store import load_pruned, save_network
from pipeline.recipe import DataSection, FinetuneSection, ModelSection
from pipeline.records import Network
from pipeline.surgery.proof import examine, outputs_of
from pipeline.surgery.remove import prune
from pipeline.tasks.data import load_data
from pipeline.training.stages import finetune
from pipeline.training.training import TrainingJob
from tests import graphs, nets


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def _form(name):
    return graph_form(tiny(name))


def form_of(name):
    return copy.deepcopy(_form(name))


def tiny(name):
    return Network(module=nets.build(name), spec=name, arguments={}, input_shape=nets.INPUT_SHAPE)


def gradients(module, images):
    module.zero_grad()
    sum(output.sigmoid().sum() for output in outputs_of(module(images))).backward()
    return {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("name", nets.NETS)
def test_the_graph_form_is_the_class(name):
    network = tiny(name)
    form = form_of(name).module
    images = torch.randn(3, *nets.INPUT_SHAPE)

    assert list(form.state_dict()) == list(network.module.state_dict())
    for training in (False, True):
        network.module.train(training), form.train(training)
        found, expected = gradients(form, images), gradients(network.module, images)
        torch.testing.assert_close(form(images), network.module(images), rtol=1e-5, atol=1e-6)
        assert found.keys() == expected.keys()
        for parameter, gradient in expected.items():
            scale = max(1.0, float(gradient.abs().max()))
            torch.testing.assert_close(found[parameter], gradient, rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(form.state_dict(), network.module.state_dict())  # statistics too
    assert not any(
        a is b for a, b in zip(form.parameters(), network.module.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", nets.NETS)
def test_a_graph_form_is_pruned_and_proved(name):
    network = form_of(name)
    channels = find_groups(export_graph(network))
    keep = random_keep(channels, 1)
    cut = {name for name, units in keep.items() if len(units) < channels.group(name).width}

    proof = examine(network, channels, keep)

    assert fit_to_class(network, channels) is channels
    assert proof.error < 1e-9
    assert {*proof.exact, *proof.structure_only} == cut


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, momentum=0.3)
        self.drop, self.one, self.two = nn.Dropout(0.4), nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.two(self.one(self.drop(x)).relu())


def test_dropout_statistics_and_tied_weights_are_those_of_the_class():
    network = Network(module=Dropped(), spec="d", arguments={}, input_shape=(3, 8, 8))
    form = graph_form(network).module
    images = torch.randn(16, 3, 8, 8)

    assert form.state_dict().keys() == network.module.state_dict().keys()
    assert form.one.weight is form.two.weight
    outputs = []
    for module in (form.train(), network.module.train()):
        torch.manual_seed(0)
        outputs.append(module(images))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(form.norm.running_var, network.module.norm.running_var)
    assert not torch.equal(form(images), form(images))


@pytest.mark.parametrize("name", ["padded_shortcut", "shuffle"])
def test_a_graph_form_compiles_in_one_piece(name):
    form = form_of(name).module.train()
    compiled = torch.compile(copy.deepcopy(form), backend="eager", fullgraph=True)
    images = torch.randn(3, *nets.INPUT_SHAPE)

    expected, found = gradients(form, images), gradients(compiled, images)

    torch.testing.assert_close(compiled(images), form(images))
    assert found.keys() == {f"_orig_mod.{name}" for name in expected}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[f"_orig_mod.{name}"], gradient)


def test_a_stored_graph_form_comes_back(tmp_path):
    network = form_of("shuffle")
    channels = find_groups(export_graph(network))
    keep = {"left": (0, 2, 5)}
    pruned = prune(network, channels, keep)

    save_network(pruned, network, channels, keep, tmp_path)
    loaded = load_pruned(tmp_path)

    x = network.example(2)
    assert loaded.module.left.out_channels == 3
    assert torch.equal(loaded.module(x), pruned.module(x))
    (tmp_path / "architecture.onnx").write_bytes(b"other")
    with pytest.raises(StorageError, match=r"architecture.onnx is not the file"):
        load_pruned(tmp_path)


def test_a_norm_in_training_mode_uses_the_statistics_of_what_it_gets():
    graph = graphs.exported("chain")
    norm = next(node for node in graph.graph.node if node.op_type == "BatchNormalization")
    norm.attribute.append(onnx.helper.make_attribute("training_mode", 1))
    graph.graph.output.append(
        next(info for info in graph.graph.value_info if info.name == norm.output[0])
    )
    state = nets.build("chain").state_dict()
    scale, shift = (state[name] for name in norm.input[1:3])

    form = GraphForm(graph, Roles(parameters=())).eval()
    normed = form(torch.randn(2, *nets.INPUT_SHAPE))[1]

    torch.testing.assert_close(normed.mean((0, 2, 3)), shift, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(normed.std((0, 2, 3)), scale.abs(), rtol=1e-2, atol=1e-3)


def test_an_operator_without_implementation_is_named():
    graph = graphs.exported("chain")
    graph.graph.node[1].op_type, graph.graph.node[1].name = "Det", "odd"

    with pytest.raises(NetworkError, match=r"operator Det, node odd"):
        GraphForm(graph, Roles(parameters=()))


def test_an_onnx_file_is_pruned_trained_and_exported(tmp_path):
    shape = (1, 16, 16)
    original = Network(module=digits_resnet(width=8), spec="r", arguments={}, input_shape=shape)
    path = tmp_path / "model.onnx"
    onnx.save(export_graph(original, batch=2), path)
    network = load_network(ModelSection(name=str(path), input_shape=shape))
    channels = find_groups(export_graph(network))
    keep = random_keep(channels, 0)
    data = load_data(DataSection(source="digits"), shape, seed=0)
    section = FinetuneSection(epochs=2, warmup_epochs=0, bf16=False)

    assert network.module.state_dict().keys() == original.module.state_dict().keys()
    assert examine(network, channels, keep).error < 1e-9
    pruned = prune(network, channels, keep)
    job = TrainingJob(network=pruned, data=data, folder=tmp_path / "state", seed=0)
    trained, epochs = finetune(job, section)

    assert epochs[-1].train_loss < epochs[0].train_loss
    model = export_graph(trained)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    images = trained.example()
    (engine,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(
        torch.from_numpy(engine), trained.module(images).detach(), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(NetworkError, match=r"takes images of shape \[1, 16, 16\]"):
        load_network(ModelSection(name=str(path), input_shape=(3, 16, 16)))

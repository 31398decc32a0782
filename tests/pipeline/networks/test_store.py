import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hardware.errors import StorageError
from hardware.graph.channel_map import Branch, ChannelMap
from pipeline.errors import NetworkError
from pipeline.networks.load import load_network
from pipeline.networks.store import ARCHITECTURE, WEIGHTS, load_pruned, save_network
from pipeline.recipe import ModelSection
from pipeline.surgery.remove import prune
from tests.pipeline.maps import cut, group, network_of, random_keep, resnet_map

SPEC = "benchmarks.networks:digits_resnet"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small that a second thread only waits
    yield
    torch.set_num_threads(threads)


class Oddities(nn.Module):
    """Tied weights, a buffer that no state_dict names, and a layer scale held by the block."""

    def __init__(self, channels=4):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 1)
        self.branch = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.full((channels, 1, 1), 0.5))
        self.register_buffer("mask", torch.arange(4.0).view(4, 1, 1), persistent=False)
        self.one = nn.Conv2d(channels, 2, 1, bias=False)
        self.two = nn.Conv2d(channels, 2, 1, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x):
        x = self.conv(x) * self.mask
        x = x + self.gamma * self.branch(x)
        return self.one(x) + self.two(x)


def pruned_digits(seed=0, emptied=2):
    section = ModelSection(name=SPEC, arguments={"width": 8}, input_shape=(1, 16, 16))
    original = load_network(section)
    channels = resnet_map(original.module)
    keep = random_keep(channels, seed, emptied)
    return prune(original, channels, keep), original, channels, keep


def test_a_pruned_network_reads_back_bit_for_bit(tmp_path):
    pruned, original, channels, keep = pruned_digits()
    x = original.example(3)

    save_network(pruned, original, channels, keep, tmp_path / "out")
    loaded = load_pruned(tmp_path / "out")

    assert torch.equal(loaded.module(x), pruned.module(x))
    assert (loaded.spec, loaded.arguments, loaded.input_shape) == (SPEC, {"width": 8}, (1, 16, 16))
    assert str(loaded.module) == str(pruned.module) and not loaded.module.training
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [ARCHITECTURE, WEIGHTS]


NETS = """
from torch import nn

def build(width=4):
    return nn.Sequential(nn.Conv2d(3, width, 1), nn.ReLU(), nn.Conv2d(width, 2, 1))
"""


def test_a_network_of_a_file_is_rebuilt_from_where_the_file_lay(tmp_path, monkeypatch):
    for folder, text in (("mine", NETS), ("other", NETS.replace("ReLU", "Tanh"))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "nets.py").write_text(text)
    monkeypatch.chdir(tmp_path / "mine")
    original = load_network(ModelSection(name="nets.py:build", input_shape=(3, 4, 4)))
    channels = ChannelMap(groups=(group(4, ["0"], [], ["2"], [cut("0.bias", "bias", 4)]),))
    keep = {"0.weight": (1, 3)}
    pruned = prune(original, channels, keep)
    save_network(pruned, original, channels, keep, tmp_path / "out")
    x = original.example(2)

    monkeypatch.chdir(tmp_path / "other")  # whose file of this name is another one
    loaded = load_pruned(tmp_path / "out")

    assert torch.equal(loaded.module(x), pruned.module(x))
    (tmp_path / "mine").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert torch.equal(load_pruned(tmp_path / "out").module(x), pruned.module(x))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NetworkError, match=r"neither at .*mine/nets\.py, where it lay, nor at"):
        load_pruned(tmp_path / "out")


def test_the_file_says_what_was_kept_of_every_group(tmp_path):
    pruned, original, channels, keep = pruned_digits()

    save_network(pruned, original, channels, keep, tmp_path)

    body = json.loads((tmp_path / ARCHITECTURE).read_text())
    assert {name: tuple(units) for name, units in body["keep"].items()} == keep
    assert body["widths"]["layer3.1.conv1.weight"] == 32
    assert len(body["emptied"]) == 8


def test_tied_hidden_and_zeroed_tensors_read_back(tmp_path):
    original = network_of(
        Oddities(), 3, 4, 4, spec="tests.pipeline.networks.test_store:Oddities", channels=4
    )
    others = [cut(name, "other", 4) for name in ("conv.bias", "mask", "gamma", "branch.bias")]
    stream = group(4, ["conv", "branch"], [], ["branch", "one", "two"], others)
    scaled = group(1, ["gate"], name="gate")
    branch = Branch(
        name="scaled",
        groups=("gate",),
        layers=(),
        join="add",
        parameters=("branch.weight", "branch.bias", "gamma"),
    )
    channels = ChannelMap(groups=(stream, scaled), branches=(branch,))
    keep = {"conv.weight": (1, 3), "gate": ()}
    pruned = prune(original, channels, keep)

    save_network(pruned, original, channels, keep, tmp_path)
    loaded = load_pruned(tmp_path).module

    x = original.example(2)
    assert torch.equal(loaded(x), pruned.module(x))
    assert loaded.one.weight is loaded.two.weight
    assert loaded.mask.flatten().tolist() == [1.0, 3.0]
    assert not loaded.gamma.any() and not loaded.gamma.requires_grad
    assert "two.weight" not in load_file(tmp_path / WEIGHTS)


def test_a_file_that_is_missing_is_an_error(tmp_path):
    save_network(*pruned_digits(), tmp_path)
    (tmp_path / WEIGHTS).unlink()

    with pytest.raises(StorageError, match=r"Cannot read .*model.safetensors: No such file"):
        load_pruned(tmp_path)
    with pytest.raises(StorageError, match=r"Cannot read .*architecture.json"):
        load_pruned(tmp_path / "elsewhere")


def test_damaged_or_exchanged_weights_are_an_error(tmp_path):
    for seed in (0, 1):
        save_network(*pruned_digits(seed), tmp_path / str(seed))
    exchanged = (tmp_path / "1" / WEIGHTS).read_bytes()
    cut_short = (tmp_path / "0" / WEIGHTS).read_bytes()[:-1]

    for content in (exchanged, cut_short):
        (tmp_path / "0" / WEIGHTS).write_bytes(content)
        with pytest.raises(StorageError, match=r"is not the file that architecture.json"):
            load_pruned(tmp_path / "0")


def test_a_damaged_architecture_is_an_error(tmp_path):
    save_network(*pruned_digits(), tmp_path)
    path = tmp_path / ARCHITECTURE

    path.write_text(path.read_text().replace('"spec"', '"spce"'))
    with pytest.raises(StorageError, match="not a valid Architecture"):
        load_pruned(tmp_path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(StorageError, match="damaged, not JSON"):
        load_pruned(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": "benchmarks.networks:cifar_resnet", "arguments": {"depth": 8}}, "input of shape"),
        ({"arguments": {"width": 4}}, r"cannot be narrowed to"),
        ({"arguments": {"width": 8, "blocks": 1}}, r"ResNet has no layer1.1"),
        ({"arguments": {"width": 8, "blocks": 3}}, r"30 missing from the file"),
    ],
)
def test_an_architecture_of_another_class_is_an_error(tmp_path, change, message):
    save_network(*pruned_digits(emptied=0), tmp_path)
    path = tmp_path / ARCHITECTURE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))

    with pytest.raises(NetworkError, match=message):
        load_pruned(tmp_path)


def test_arguments_that_are_not_json_are_refused_before_anything_is_written(tmp_path):
    original = network_of(nn.Sequential(nn.Conv2d(1, 1, 1)), 1, 4, 4, act=nn.ReLU)

    with pytest.raises(StorageError, match="cannot be stored as JSON"):
        save_network(original, original, ChannelMap(groups=()), {}, tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_a_read_only_folder_is_an_error(tmp_path):
    (tmp_path / "out").write_text("a file where a folder should be")

    with pytest.raises(StorageError, match="Cannot write"):
        save_network(*pruned_digits(), tmp_path / "out")

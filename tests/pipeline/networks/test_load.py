import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.errors import NetworkError
from pipeline.networks.load import load_network, load_weights
from pipeline.recipe import ModelSection

DIGITS = "benchmarks.networks:digits_resnet"


def section(name: str, shape=(1, 32, 32), **fields) -> ModelSection:
    return ModelSection(name=name, input_shape=shape, **fields)


def test_a_timm_network_comes_in_evaluation_mode_with_its_arguments():
    network = load_network(section("timm:resnet18", (3, 32, 32), arguments={"num_classes": 7}))

    assert not network.module.training
    assert network.module(network.example(2)).shape == (2, 7)
    assert network.spec == "timm:resnet18" and network.arguments == {"num_classes": 7}


def test_torchvision_classifies_and_segments_without_fetching_weights():
    classifier = load_network(section("torchvision:mobilenet_v2", (3, 32, 32)))
    segmenter = load_network(section("torchvision:lraspp_mobilenet_v3_large", (3, 32, 32)))

    assert classifier.module(classifier.example()).shape == (1, 1000)
    assert segmenter.module(segmenter.example())["out"].shape == (1, 21, 32, 32)


def test_without_weights_the_same_random_network_comes_every_time():
    state = torch.get_rng_state()
    one, other = (load_network(section(DIGITS)).module.state_dict() for _ in range(2))

    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_are_loaded_and_counters_of_batch_norm_may_be_absent(tmp_path):
    source = load_network(section(DIGITS)).module
    state = {n: t + 1 for n, t in source.state_dict().items() if "num_batches" not in n}
    save_file(state, tmp_path / "w.safetensors")

    loaded = load_network(section(DIGITS, weights=tmp_path / "w.safetensors")).module

    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in state.items())


def test_a_tied_weight_may_be_stored_under_one_of_its_names():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight

    load_weights(net, {"1.weight": torch.full((4, 4), 2.0)}, "here")

    assert net[0].weight is net[1].weight and bool((net[0].weight == 2).all())


def test_weights_that_do_not_fit_are_listed_and_nothing_is_loaded(tmp_path):
    state = load_network(section(DIGITS)).module.state_dict()
    for index in (0, 1):
        del state[f"layer1.{index}.bn1.bias"]
    state["head.weight"] = torch.zeros(3)
    state["linear.bias"] = torch.zeros(12)
    save_file(state, tmp_path / "w.safetensors")

    with pytest.raises(NetworkError, match="do not fit") as caught:
        load_network(section(DIGITS, weights=tmp_path / "w.safetensors"))

    message = str(caught.value)
    assert "2 missing from the file: layer1.0.bn1.bias (16,), layer1.1.bn1.bias (16,)" in message
    assert "1 not in the network: head.weight (3,)" in message
    assert "linear.bias: (12,) in the file, (10,) in the network" in message


def test_a_file_that_is_not_safetensors_or_not_there_is_an_error(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"PK\x03\x04 a torch checkpoint")

    with pytest.raises(NetworkError, match="not a safetensors file"):
        load_network(section(DIGITS, weights=tmp_path / "w.pth"))
    with pytest.raises(NetworkError, match="No such file"):
        load_network(section(DIGITS, weights=tmp_path / "none.safetensors"))


def test_arguments_that_the_factory_does_not_take_are_an_error():
    with pytest.raises(NetworkError, match=r"could not be built with arguments.*depht"):
        load_network(section(DIGITS, arguments={"depht": 3}))


def test_an_input_shape_that_the_network_refuses_is_an_error():
    with pytest.raises(NetworkError, match=r"does not accept an input of shape \(1, 3, 32, 32\)"):
        load_network(section(DIGITS, (3, 32, 32)))

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.networks import PaddedShortcut, cifar_resnet, digits_resnet
from pipeline.networks.load import load_network
from pipeline.recipe import ModelSection


def test_cifar_resnets_have_the_parameters_that_the_paper_gives():
    # He et al., arXiv:1512.03385, table 6: 0.27 M, 0.46 M, 0.66 M, 0.85 M, 1.7 M.
    counts = {
        depth: sum(p.numel() for p in cifar_resnet(depth).parameters()) / 1e6
        for depth in (20, 32, 44, 56, 110)
    }

    assert {depth: round(count, 2 if depth < 110 else 1) for depth, count in counts.items()} == {
        20: 0.27,
        32: 0.46,
        44: 0.66,
        56: 0.85,
        110: 1.7,
    }


def test_names_are_those_of_the_published_weights():
    names = set(cifar_resnet(20).state_dict())
    layers = {"conv1", "bn1", "linear"} | {
        f"layer{stage}.{block}.{layer}"
        for stage in (1, 2, 3)
        for block in range(3)
        for layer in ("conv1", "bn1", "conv2", "bn2")
    }

    assert {name.rpartition(".")[0] for name in names} == layers


def test_the_padded_shortcut_takes_every_second_pixel_between_zero_channels():
    x = torch.arange(2.0 * 4 * 4).view(1, 2, 4, 4)

    out = PaddedShortcut(2, 4, 2)(x)

    assert out.shape == (1, 4, 2, 2)
    assert not out[:, 0].any() and not out[:, 3].any()
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])


def test_a_depth_that_is_not_6n_plus_2_is_refused():
    with pytest.raises(ValueError, match="20, 32, 44, 56, 110"):
        cifar_resnet(18)


def test_the_digits_network_takes_one_channel_at_any_size():
    net = digits_resnet(width=4, blocks=1, classes=3).eval()

    assert net(torch.randn(2, 1, 32, 32)).shape == net(torch.randn(2, 1, 16, 24)).shape == (2, 3)


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "accuracy_pct"), [(20, 91.73), (56, 93.39)])
def test_published_weights_score_as_published(depth, accuracy_pct):
    weights, images = (os.environ.get(f"ESPALIER_CIFAR10_{what}") for what in ("WEIGHTS", "IMAGES"))
    if not weights or not images:
        pytest.skip("needs ESPALIER_CIFAR10_WEIGHTS and ESPALIER_CIFAR10_IMAGES: two folders")
    section = ModelSection(
        name="benchmarks.networks:cifar_resnet",
        arguments={"depth": depth},
        weights=Path(weights) / f"resnet{depth}-cifar10.safetensors",
        input_shape=(3, 32, 32),
    )
    module = load_network(section).module.to(memory_format=torch.channels_last)
    folders = sorted((Path(images) / "test").iterdir())
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))

    right = 0
    for label, folder in enumerate(folders):
        raw = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])
        batch = ((torch.from_numpy(raw) / 255 - mean) / std).permute(0, 3, 1, 2)
        with torch.no_grad():
            right += int((module(batch).argmax(dim=1) == label).sum())

    assert round(right / 100, 2) == accuracy_pct

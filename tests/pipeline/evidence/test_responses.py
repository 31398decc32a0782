"""Responses against what arithmetic says a layer reads, on layers of every kind."""

import pytest
import torch
from torch import Tensor, nn

from hardware.graph.channel_map import ChannelMap, Group
from pipeline.errors import PipelineError
from pipeline.evidence.responses import collect_responses, contributions
from pipeline.records import Responses
from tests.pipeline.maps import cut


class Two(nn.Module):
    """A convolution, and a layer that reads what a function makes of it."""

    def __init__(self, reader: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 1)
        self.reader = reader

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu()
        return self.reader(x.mean((2, 3)) if isinstance(self.reader, nn.Linear) else x)


def channels_of(*readers) -> ChannelMap:
    return ChannelMap(
        groups=(Group(name="conv", width=4, slices=(cut("conv.weight", "filter", 4), *readers)),)
    )


def batch_of(images: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(part, torch.zeros(len(part), dtype=torch.long)) for part in images.split(2)]


def seen_by(reader: nn.Module, images: Tensor, *units) -> tuple[Two, Responses]:
    module = Two(reader).eval()
    piece = cut("reader.weight", "input", units or 4, axis=1)
    [found] = collect_responses(module, channels_of(piece), batch_of(images))["conv"]
    return module, found


def images_of(count: int = 5, size: int = 3) -> Tensor:
    return torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(0))


def test_a_summary_is_that_of_what_the_layer_reads() -> None:
    images = images_of()

    module, found = seen_by(nn.Conv2d(4, 2, 3, padding=1), images)

    with torch.no_grad():
        values = module.conv(images).relu()
    torch.testing.assert_close(found.active, (values > 0).float().mean((0, 2, 3)))
    torch.testing.assert_close(found.magnitude, values.mean((0, 2, 3)))
    torch.testing.assert_close(found.pooled, values.mean((2, 3)))
    torch.testing.assert_close(found.map_ranks, torch.linalg.matrix_rank(values).float().mean(0))
    assert found.reader == "reader" and found.rows == 5 * 9


def test_a_layer_that_reads_one_value_per_image_gives_one_row_each() -> None:
    images = images_of()

    module, found = seen_by(nn.Linear(4, 2), images)

    with torch.no_grad():
        values = module.conv(images).relu().mean((2, 3))
    assert found.rows == 5
    torch.testing.assert_close(found.covariance, values.T.cov(correction=0), rtol=1e-3, atol=1e-6)


def test_a_unit_responds_with_the_mean_of_its_positions() -> None:
    images = images_of()
    module = Two(nn.Conv2d(4, 2, 1)).eval()
    pieces = (
        cut("conv.weight", "filter", (0, 0, 1, 1)),
        cut("reader.weight", "input", (0, 0, 1, -1), axis=1),
    )
    channels = ChannelMap(groups=(Group(name="conv", width=2, slices=pieces),))

    [found] = collect_responses(module, channels, batch_of(images))["conv"]

    with torch.no_grad():
        pooled = module.conv(images).relu().mean((2, 3))
    torch.testing.assert_close(found.pooled, torch.stack([pooled[:, :2].mean(1), pooled[:, 2]], 1))


def test_a_grouped_reader_has_one_column_for_the_same_position_of_all_groups() -> None:
    images = images_of()
    module = Two(nn.Conv2d(4, 4, 1, groups=2)).eval()
    pieces = (cut("conv.weight", "filter", (0, 1, 0, 1)), cut("reader.weight", "input", 2, axis=1))
    channels = ChannelMap(groups=(Group(name="conv", width=2, slices=pieces),))

    [found] = collect_responses(module, channels, batch_of(images))["conv"]

    with torch.no_grad():
        pooled = module.conv(images).relu().mean((2, 3))
    torch.testing.assert_close(found.pooled, (pooled[:, :2] + pooled[:, 2:]) / 2)


def test_where_no_layer_reads_as_a_module_the_output_is_watched() -> None:
    images = images_of()
    module = Two(nn.Identity()).eval()

    [found] = collect_responses(module, channels_of(), batch_of(images))["conv"]

    assert found.reader == "output of conv"
    with torch.no_grad():
        torch.testing.assert_close(found.pooled, module.conv(images).mean((2, 3)))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1, stride=2),
        nn.Conv2d(4, 6, (1, 3), padding="same", dilation=2),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.ConvTranspose2d(4, 6, 2, stride=2),
        nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2),
        nn.Linear(4, 6),
    ],
    ids=str,
)
def test_contributions_sum_to_outputs_of_the_layer(layer: nn.Module) -> None:
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(3, 4, 7, 7, generator=draw)
    value = images.movedim(1, -1) if isinstance(layer, nn.Linear) else images

    terms = contributions(layer, value, 20, draw)

    with torch.no_grad():
        bias = layer.bias.detach().clone()
        layer.bias.zero_()
        outputs = layer(value).flatten(1)
        layer.bias.copy_(bias)
    assert terms.shape == (60, 4)
    nearest = (terms.detach().sum(1).view(3, 20, 1) - outputs[:, None]).abs().amin(2)
    assert float(nearest.max()) < 1e-5


def test_hooks_and_modes_are_undone_after_an_error() -> None:
    module = Two(nn.Conv2d(4, 2, 1)).train()
    piece = cut("reader.weight", "input", 4, axis=1)

    with pytest.raises(RuntimeError):
        collect_responses(module, channels_of(piece), batch_of(torch.zeros(2, 3, 5, 5)))
    with pytest.raises(PipelineError, match="What reader reads on calibration images is not a num"):
        collect_responses(module, channels_of(piece), batch_of(torch.full((2, 1, 5, 5), torch.nan)))

    assert module.training and module.reader.training
    assert not module.reader._forward_hooks and not module.conv._forward_hooks


def test_without_images_there_is_nothing_to_see() -> None:
    with pytest.raises(PipelineError, match=r"no calibration images: raise plan\.calibration_im"):
        collect_responses(Two(nn.Identity()), channels_of(), [])

import pytest
import torch

from pipeline.tasks.augmentation import (
    centre_box,
    crop_box,
    generator_of,
    normalise,
    shift_and_flip,
)


def test_a_generator_depends_on_every_key_and_on_their_order() -> None:
    draws = {
        torch.rand(1, generator=generator_of(*keys)).item()
        for keys in ((), (0,), (0, 0), (0, 1), (1, 0), ("order", 0), (-1,))
    }

    assert len(draws) == 7
    assert torch.rand(1, generator=generator_of("a", 5)) == torch.rand(
        1, generator=generator_of("a", 5)
    )


def test_a_shift_moves_by_at_most_an_eighth_of_the_side_and_fills_with_black() -> None:
    images = torch.zeros(500, 16, 32, 1, dtype=torch.uint8)
    images[:, 8, 16] = 255

    moved = shift_and_flip(images, generator_of(0), shift=True, flip=False)

    rows, columns = moved[..., 0].nonzero()[:, 1], moved[..., 0].nonzero()[:, 2]
    assert len(rows) == 500  # nobody lost the pixel, nobody gained one
    assert set(rows.tolist()) == set(range(6, 11))  # 16 / 8 = 2 either way
    assert set(columns.tolist()) == set(range(12, 21))  # 32 / 8 = 4 either way


def test_a_flip_mirrors_about_half_of_the_images_left_to_right() -> None:
    images = torch.arange(2 * 3 * 2, dtype=torch.uint8).reshape(1, 2, 3, 2).repeat(1000, 1, 1, 1)

    seen = shift_and_flip(images, generator_of(0), shift=False, flip=True)

    mirrored = (seen == images.flip(2)).flatten(1).all(dim=1)
    straight = (seen == images).flatten(1).all(dim=1)
    assert bool((mirrored ^ straight).all())
    assert 400 < int(mirrored.sum()) < 600  # 500 +/- 6 standard deviations


def test_shift_and_flip_together_show_a_part_of_the_padded_image() -> None:
    image = torch.arange(1, 65, dtype=torch.uint8).reshape(1, 8, 8, 1)
    padded = torch.nn.functional.pad(image[0, :, :, 0], (1, 1, 1, 1))
    windows = {
        tuple(view[top : top + 8, left : left + 8].flatten().tolist())
        for view in (padded, padded.flip(1))
        for top in range(3)
        for left in range(3)
    }

    seen = shift_and_flip(image.repeat(400, 1, 1, 1), generator_of(0), shift=True, flip=True)

    assert {tuple(view.flatten().tolist()) for view in seen} == windows


def test_random_crops_stay_within_the_image_and_cover_8_to_100_percent() -> None:
    areas = []
    for frame in torch.rand(2000, 4, generator=generator_of(0)).tolist():
        left, top, right, bottom = crop_box(tuple(frame), 200, 200)
        assert 0 <= left < right <= 200 and 0 <= top < bottom <= 200
        areas.append((right - left) * (bottom - top) / 200**2)

    assert 0.079 < min(areas) < 0.1
    assert 0.9 < max(areas) <= 1


@pytest.mark.parametrize(
    ("source", "size", "resize", "box"),
    [
        ((100, 50), (32, 32), None, (25, 0, 75, 50)),  # the largest square in the middle
        ((50, 100), (32, 32), None, (0, 25, 50, 75)),
        ((64, 64), (32, 32), None, (0, 0, 64, 64)),
        ((64, 64), (32, 32), 64, (16, 16, 48, 48)),  # shorter side 64, 32 of it are shown
        ((128, 64), (24, 24), 32, (40, 8, 88, 56)),  # halved to 64x32, then 24x24
        ((40, 40), (20, 40), None, (0, 10, 40, 30)),  # an input that is wide
    ],
)
def test_a_centre_crop_shows_the_middle(
    source: tuple[int, int],
    size: tuple[int, int],
    resize: int | None,
    box: tuple[float, float, float, float],
) -> None:
    assert centre_box(*source, size, resize) == pytest.approx(box)


def test_normalising_scales_each_channel_and_lays_channels_last() -> None:
    pixels = torch.tensor([0, 255, 51], dtype=torch.uint8).reshape(1, 1, 1, 3).repeat(2, 4, 4, 1)

    images = normalise(pixels, (0.5, 0.5, 0.2), (0.5, 0.25, 1.0))

    assert images.shape == (2, 3, 4, 4) and images.dtype == torch.float32
    assert images[0, :, 0, 0].tolist() == pytest.approx([-1, 2, 0], abs=1e-6)
    assert images.is_contiguous(memory_format=torch.channels_last)

"""Random views of training images, drawn for a whole batch at once from one generator."""

import hashlib
import math

import torch
from torch import Tensor

Box = tuple[float, float, float, float]  # left, top, right, bottom in source pixels

# Inception-style crops, as torchvision and timm train ImageNet with.
CROP_AREA = (0.08, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)


def seed_of(*keys: int | str) -> int:
    """Return a seed of 32 bits (torch uses no more on the CPU) that depends on every key."""
    return int.from_bytes(hashlib.sha256(repr(keys).encode()).digest()[:4], "little")


def generator_of(*keys: int | str) -> torch.Generator:
    """Return a generator that depends on every key, so that any batch can be drawn on its own."""
    return torch.Generator().manual_seed(seed_of(*keys))


def shift_and_flip(
    pixels: Tensor, generator: torch.Generator, *, shift: bool, flip: bool
) -> Tensor:
    """Return the images moved by up to an eighth of their side, half of them mirrored.

    What moves in from outside is black.

    Args:
        pixels: (n, height, width, channels), any dtype.
        generator: where the moves are drawn from.
        shift: move vertically and horizontally.
        flip: mirror left to right, each image with probability 0.5.

    Returns:
        Images of the same shape.
    """
    if not (shift or flip):
        return pixels
    count, height, width, _ = pixels.shape
    margin = (height // 8, width // 8) if shift else (0, 0)
    rows = torch.arange(height).repeat(count, 1)
    columns = torch.arange(width).repeat(count, 1)
    if flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, width - 1 - columns, columns)
    if shift:
        rows = rows + torch.randint(2 * margin[0] + 1, (count, 1), generator=generator)
        columns = columns + torch.randint(2 * margin[1] + 1, (count, 1), generator=generator)
        pixels = torch.nn.functional.pad(pixels, (0, 0, margin[1], margin[1], margin[0], margin[0]))
    images = torch.arange(count)[:, None, None]
    return pixels[images, rows[:, :, None], columns[:, None, :]]


def crop_box(frame: tuple[float, ...], width_px: int, height_px: int) -> Box:
    """Return a random part of an image, by area and aspect ratio.

    Args:
        frame: four draws from [0, 1): area, aspect, left, top.
        width_px: of the source image.
        height_px: of the source image.

    Returns:
        A box within the image. Where area and aspect do not fit, the longer side is cut to the
        image's; torchvision draws again instead.

    Reference:
        Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, arXiv:1409.4842, sec. 6.
    """
    area = (CROP_AREA[0] + frame[0] * (CROP_AREA[1] - CROP_AREA[0])) * width_px * height_px
    low, high = math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])
    aspect = math.exp(low + frame[1] * (high - low))
    width = max(1, min(width_px, round(math.sqrt(area * aspect))))
    height = max(1, min(height_px, round(math.sqrt(area / aspect))))
    left = int(frame[2] * (width_px - width + 1))
    top = int(frame[3] * (height_px - height + 1))
    return (left, top, left + width, top + height)


def centre_box(
    width_px: int, height_px: int, size_px: tuple[int, int], resize_px: int | None
) -> Box:
    """Return the part of an image that its centre crop shows, in source pixels.

    Args:
        width_px: of the source image.
        height_px: of the source image.
        size_px: height and width of the crop.
        resize_px: what the shorter side is resized to before the crop; None: as little as is cut.
    """
    height, width = size_px
    scale = max(width / width_px, height / height_px)
    if resize_px is not None:
        scale = max(scale, resize_px / min(width_px, height_px))
    left = (width_px - width / scale) / 2
    top = (height_px - height / scale) / 2
    left, top = max(0.0, left), max(0.0, top)  # rounding must not leave the image
    return (left, top, width_px - left, height_px - top)


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return `(pixels / 255 - mean) / std` per channel.

    Args:
        pixels: (n, height, width, channels), uint8.
        mean: one value per channel, of pixels in [0, 1].
        std: one value per channel, of pixels in [0, 1].

    Returns:
        (n, channels, height, width), float32, channels-last in memory.
    """
    scale = 1 / (255 * torch.tensor(std, dtype=torch.float64))
    offset = -torch.tensor(mean, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)
    images = pixels.to(torch.float32).mul_(scale.float()).add_(offset.float())
    return images.permute(0, 3, 1, 2)

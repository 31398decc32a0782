"""Labelled images by number: found in class folders, decoded into memory or read when asked for."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from pipeline.errors import DataError
from pipeline.tasks.augmentation import Box, centre_box, crop_box

Progress = Callable[[int, int, str], None]  # done, total, what

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm")
MODES = {1: "L", 3: "RGB"}  # channels -> Pillow's mode
BLOCK = 256  # images that a thread decodes in one go


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """What every image becomes before it is augmented."""

    channels: int
    size_px: tuple[int, int]  # height, width
    resize_px: int | None  # shorter side before the centre crop

    @property
    def image_bytes(self) -> int:
        """The bytes of one image."""
        return self.channels * self.size_px[0] * self.size_px[1]


class Images(ABC):
    """Labelled images by number, in a fixed order."""

    labels: Tensor  # (n,) int64

    @abstractmethod
    def fetch(self, chosen: Tensor, frames: Tensor | None) -> Tensor:
        """Return the chosen images.

        Args:
            chosen: (k,) int64, numbers of images.
            frames: (k, 4) draws from [0, 1) for random crops; None: centre crops.

        Returns:
            (k, height, width, channels), uint8.

        Raises:
            DataError: a file cannot be read; it is named.
        """


class HeldImages(Images):
    """Images in memory."""

    def __init__(self, pixels: Tensor, labels: Tensor, form: Format) -> None:
        """Hold `pixels` (n, height, width, channels) uint8, of any one size."""
        self.pixels = pixels
        self.labels = labels
        self._form = form

    def fetch(self, chosen: Tensor, frames: Tensor | None) -> Tensor:
        """Return the chosen images; see `Images.fetch`."""
        pixels = self.pixels[chosen]
        if frames is None and tuple(pixels.shape[1:3]) == self._form.size_px:
            return pixels
        views = [
            _cut(Image.fromarray(_squeezed(picture)), self._form, _frame(frames, row))
            for row, picture in enumerate(pixels.numpy())
        ]
        return torch.from_numpy(np.stack(views))


class FiledImages(Images):
    """Images that are decoded each time they are asked for."""

    def __init__(self, files: tuple[Path, ...], labels: Tensor, form: Format) -> None:
        """Read from `files`, one per label."""
        self.files = files
        self.labels = labels
        self._form = form

    def fetch(self, chosen: Tensor, frames: Tensor | None) -> Tensor:
        """Return the chosen images; see `Images.fetch`."""
        form = self._form
        views = [
            _cut(open_image(self.files[number], form.channels), form, _frame(frames, row))
            for row, number in enumerate(chosen.tolist())
        ]
        return torch.from_numpy(np.stack(views))


def find_images(folder: Path) -> dict[str, tuple[Path, ...]]:
    """Return the image files of every class folder, both in alphabetical order.

    Raises:
        DataError: no such folder, no class folders in it, or one without images.
    """
    if not folder.is_dir():
        raise DataError(
            f"There is no folder {folder}. `data.source` must hold one folder per split "
            "(`data.train`, `data.test`), each with one folder per class."
        )
    found = {
        place.name: tuple(
            Path(entry.path)
            for entry in sorted(os.scandir(place), key=lambda entry: entry.name)
            if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".")
        )
        for place in sorted(folder.iterdir())
        if place.is_dir() and not place.name.startswith(".")
    }
    if not found:
        raise DataError(f"{folder} holds no class folders: expected {folder}/<class>/<image>.")
    if empty := [name for name, files in found.items() if not files]:
        raise DataError(
            f"No images in {folder / empty[0]} ({len(empty)} of {len(found)} class folders are "
            f"empty). Read are files that end in {', '.join(SUFFIXES)}."
        )
    return found


def load_images(
    classes: dict[str, tuple[Path, ...]],
    form: Format,
    *,
    cropped: bool,
    memory_bytes: int,
    progress: Progress | None = None,
) -> Images:
    """Return the images of all classes, in memory where they fit.

    Images that random crops are taken from must be held in their own size, so they are held only
    where all have the same size; otherwise they are held as their centre crop.

    Args:
        classes: files per class; labels count the classes in this order.
        form: what the images become.
        cropped: random crops will be asked for.
        memory_bytes: the most that decoded images may take.
        progress: called after every block of decoded images.

    Raises:
        DataError: a file cannot be read; it is named.
    """
    files = tuple(file for members in classes.values() for file in members)
    counts = torch.tensor([len(members) for members in classes.values()])
    labels = torch.repeat_interleave(torch.arange(len(classes)), counts)
    size_px: tuple[int, int] | None = form.size_px
    if form.image_bytes * len(files) > memory_bytes:
        return FiledImages(files, labels, form)
    if cropped:
        size_px = common_size(files, form.channels)
        if size_px is None or form.channels * size_px[0] * size_px[1] * len(files) > memory_bytes:
            return FiledImages(files, labels, form)
        stored = Format(channels=form.channels, size_px=size_px, resize_px=None)
    else:
        stored = form
    return HeldImages(_decode_all(files, stored, progress), labels, form)


def common_size(files: tuple[Path, ...], channels: int) -> tuple[int, int] | None:
    """Return the height and width that all images share, None where they differ."""
    first: tuple[int, int] | None = None
    for file in files:
        try:
            with Image.open(file) as image:
                size_px = (image.height, image.width)
        except Exception as error:  # Pillow's decoders share no error class
            raise _unreadable(file, error) from error
        if first not in (None, size_px):
            return None
        first = size_px
    return first


def open_image(file: Path, channels: int) -> Image.Image:
    """Return a decoded image in grey (one channel) or colour (three).

    Raises:
        DataError: not an image, damaged, or of more than 8 bits per grey value.
    """
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"pixels of more than 8 bits (mode {image.mode})")
            # Pillow wants palettes with transparency to go through RGBA.
            opaque = image.convert("RGBA") if "transparency" in image.info else image
            return opaque.convert(MODES[channels])
    except Exception as error:  # Pillow's decoders share no error class
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> DataError:
    return DataError(f"Cannot read the image {file}: {error}. Replace it or delete it.")


def _decode_all(files: tuple[Path, ...], form: Format, progress: Progress | None) -> Tensor:
    pixels = np.empty((len(files), *form.size_px, form.channels), dtype=np.uint8)

    def decode(start: int) -> None:
        for number in range(start, min(start + BLOCK, len(files))):
            pixels[number] = _cut(open_image(files[number], form.channels), form, None)

    # Pillow decodes and resizes without the interpreter's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        starts = range(0, len(files), BLOCK)
        try:
            for start, _ in zip(starts, pool.map(decode, starts), strict=True):
                if progress is not None:
                    progress(min(start + BLOCK, len(files)), len(files), "images decoded")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return torch.from_numpy(pixels)


def _frame(frames: Tensor | None, row: int) -> tuple[float, ...] | None:
    return None if frames is None else tuple(frames[row].tolist())


def _cut(
    image: Image.Image, form: Format, frame: tuple[float, ...] | None
) -> npt.NDArray[np.uint8]:
    """Return the centre crop or the framed part of an image, (height, width, channels)."""
    height, width = form.size_px
    box: Box
    if frame is None:
        box = centre_box(image.width, image.height, form.size_px, form.resize_px)
    else:
        box = crop_box(frame, image.width, image.height)
    # Pillow averages over what a pixel covers (antialiasing), also between whole pixels.
    part = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    return np.asarray(part).reshape(height, width, form.channels)


def _squeezed(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return picture[:, :, 0] if picture.shape[2] == 1 else picture

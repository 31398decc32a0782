"""Training, validation and test batches: the same ones again for the same seed, epoch by epoch."""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.recipe import DataSection
from pipeline.tasks.augmentation import generator_of, normalise, shift_and_flip
from pipeline.tasks.images import (
    MODES,
    FiledImages,
    Format,
    HeldImages,
    Images,
    Progress,
    find_images,
    load_images,
)

# Images float32 (n, channels, height, width), channels-last in memory; labels int64 (n,).
Batch = tuple[Tensor, Tensor]

# Per number of channels, where the recipe gives none: ImageNet's for colour.
MEANS = {1: (0.5,), 3: (0.485, 0.456, 0.406)}
STDS = {1: (0.5,), 3: (0.229, 0.224, 0.225)}
DIGITS_TEST_SHARE = 0.2


@dataclass(frozen=True, kw_only=True, eq=False)
class Data:
    """Three sets of labelled images; the test images are read when they are first asked for."""

    classes: tuple[str, ...]
    section: DataSection
    seed: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pool: Images  # training and validation images
    train: Tensor  # (n,) which of the pool are trained on
    validation: Tensor  # (m,) which are held back
    test_images: int
    files_sha256: str  # of the names of all image files, in order; "" for a bundled set
    open_test: Callable[[], Images]

    @property
    def sizes(self) -> dict[str, int]:
        """The number of images per split: train, validation, test."""
        return {
            "train": len(self.train),
            "validation": len(self.validation),
            "test": self.test_images,
        }

    @property
    def train_steps(self) -> int:
        """The batches of a training epoch: whole ones only, or one where all images are less."""
        return max(1, len(self.train) // self.section.batch)

    @property
    def digest(self) -> str:
        """The SHA-256 of what decides the batches, except the pixels and where they lie."""
        asked = self.section.model_dump(mode="json", exclude={"source", "workers", "memory_bytes"})
        facts = [asked, self.classes, self.seed, self.sizes, self.mean, self.std, self.files_sha256]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def train_batches(self, epoch: int) -> Iterator[Batch]:
        """Return augmented training images in the random order of this epoch.

        Order and augmentation depend on seed, epoch and batch alone: an epoch can be drawn again
        without those before it.

        Raises:
            DataError: a file cannot be read; it is named.
        """
        generator = generator_of("order", self.seed, epoch)
        order = self.train[torch.randperm(len(self.train), generator=generator)]
        order = order[: self.train_steps * self.section.batch]
        return self._batches(self.pool, order, epoch)

    def validation_batches(self) -> Iterator[Batch]:
        """Return the validation images, as they are, in order."""
        return self._batches(self.pool, self.validation)

    def test_batches(self) -> Iterator[Batch]:
        """Return the test images, as they are, in order.

        Raises:
            DataError: a file cannot be read; it is named.
        """
        return self._batches(self._test, torch.arange(self.test_images))

    def calibration(self, count: int, seed: int) -> tuple[Batch, ...]:
        """Return `count` training images, as they are, at random (all, where there are less)."""
        order = torch.randperm(len(self.train), generator=generator_of("calibration", seed))
        return tuple(self._batches(self.pool, self.train[order[:count]]))

    @cached_property
    def _test(self) -> Images:
        return self.open_test()

    def _batches(self, images: Images, order: Tensor, epoch: int | None = None) -> Iterator[Batch]:
        def draw(number: int, chosen: Tensor) -> Tensor:
            if epoch is None:
                return images.fetch(chosen, None)
            return self._augmented(chosen, generator_of("augment", self.seed, epoch, number))

        chunks = torch.split(order, self.section.batch)
        # Memory is quick enough to be read in between; files are read ahead.
        workers = self.section.workers if isinstance(images, FiledImages) else 0
        for chosen, pixels in zip(chunks, _ahead(draw, chunks, workers), strict=True):
            yield normalise(pixels, self.mean, self.std), images.labels[chosen]

    def _augmented(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        augment = self.section.augment
        cropped = "crop" in augment
        frames = torch.rand(len(chosen), 4, generator=generator) if cropped else None
        return shift_and_flip(
            self.pool.fetch(chosen, frames),
            generator,
            shift="shift" in augment,
            flip="flip" in augment,
        )


def load_data(
    section: DataSection,
    input_shape: tuple[int, ...],
    seed: int,
    progress: Progress | None = None,
) -> Data:
    """Return the images that a recipe names, split into training, validation and test images.

    Args:
        section: source, split, normalisation and augmentation.
        input_shape: of one network input, (channels, height, width).
        seed: of the validation split, of the order and of the augmentation.
        progress: called with (done, total, what) while training images are decoded; the test
            images are decoded when they are read.

    Raises:
        DataError: images are missing, unreadable or too few, classes do not agree, or the
            normalisation does not fit the channels.
    """
    channels, height, width = input_shape
    mean, std = _normalisation(section, channels)
    if section.resize is not None and section.resize < max(height, width):
        raise DataError(
            f"data.resize is {section.resize} px, less than the input of {height}x{width} px. "
            "Raise it, or leave it out to crop as little as possible."
        )
    form = Format(channels=channels, size_px=(height, width), resize_px=section.resize)
    found = _digits(form) if section.source == "digits" else _folders(section, form, progress)
    train, validation = _split(found.pool.labels, section.validation_share, seed, found.classes)
    return Data(
        classes=found.classes,
        section=section,
        seed=seed,
        mean=mean,
        std=std,
        pool=found.pool,
        train=train,
        validation=validation,
        test_images=found.test_images,
        files_sha256=found.files_sha256,
        open_test=found.open_test,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """The images of a recipe before they are split and normalised."""

    classes: tuple[str, ...]
    pool: Images  # training and validation images
    test_images: int
    open_test: Callable[[], Images]
    files_sha256: str = ""


def _folders(section: DataSection, form: Format, progress: Progress | None) -> Source:
    root = Path(section.source)
    if not root.is_dir():
        raise DataError(
            f'data.source {section.source!r} is neither "digits" nor a folder. It must hold '
            f"{section.train}/<class>/<image> and {section.test}/<class>/<image>."
        )
    train, test = find_images(root / section.train), find_images(root / section.test)
    for have, lack, names in (
        (section.train, section.test, sorted(train.keys() - test.keys())),
        (section.test, section.train, sorted(test.keys() - train.keys())),
    ):
        if names:
            raise DataError(
                f"{len(names)} of the classes in {root / have} are missing in {root / lack}: "
                f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}. "
                "Both splits need the same class folders."
            )
    load = partial(load_images, form=form, memory_bytes=section.memory_bytes)
    named = [{kind: [f.name for f in files] for kind, files in s.items()} for s in (train, test)]
    return Source(
        classes=tuple(train),
        pool=load(train, cropped="crop" in section.augment, progress=progress),
        test_images=sum(map(len, test.values())),
        open_test=lambda: load(test, cropped=False),
        files_sha256=hashlib.sha256(json.dumps(named).encode()).hexdigest(),
    )


def _digits(form: Format) -> Source:
    """Return scikit-learn's 1,797 handwritten digits of 8x8 pixels, enlarged to the input."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    labels = torch.from_numpy(bunch.target).long()
    small = torch.from_numpy(bunch.images).float()[:, None] * (255 / 16)
    large = torch.nn.functional.interpolate(
        small, form.size_px, mode="bilinear", align_corners=False
    )
    pixels = large.round().byte().permute(0, 2, 3, 1).repeat(1, 1, 1, form.channels)
    classes = tuple(str(name) for name in bunch.target_names)
    train, test = _split(labels, DIGITS_TEST_SHARE, 0, classes)
    images = HeldImages(pixels[test], labels[test], form)
    return Source(
        classes=classes,
        pool=HeldImages(pixels[train], labels[train], form),
        test_images=len(test),
        open_test=lambda: images,
    )


def _normalisation(
    section: DataSection, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if channels not in MODES:
        raise DataError(
            f"The network takes {channels} channels; images give 1 (grey) or 3 (colour). "
            "Set model.input_shape to (channels, height, width)."
        )
    mean = MEANS[channels] if section.mean is None else section.mean
    std = STDS[channels] if section.std is None else section.std
    for key, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise DataError(
                f"data.{key} has {len(values)} values, the network takes {channels} channels. "
                f"Give {channels}, or leave it out."
            )
    if not min(std) > 0:
        raise DataError(f"data.std must be above 0 in every channel; got {std}.")
    return mean, std


def _split(
    labels: Tensor, share: float, seed: int, classes: tuple[str, ...]
) -> tuple[Tensor, Tensor]:
    """Return what stays and what is held back: the same share of every class, at least one image.

    Args:
        labels: (n,).
        share: what is held back, in (0, 1).
        seed: of the choice.
        classes: names, for the error.

    Returns:
        Numbers of images, ascending, int64.

    Raises:
        DataError: a class has one image only, so one side would be left without it.
    """
    generator = generator_of("split", seed)
    stay, held = [], []
    for number, name in enumerate(classes):
        members = (labels == number).nonzero().flatten()
        count = max(1, round(share * len(members)))
        if count >= len(members):
            raise DataError(
                f"Class {name!r} has {len(members)} training image(s): with one held back for "
                "validation the class would be empty. Add images, or remove the class."
            )
        shuffled = members[torch.randperm(len(members), generator=generator)]
        held.append(shuffled[:count])
        stay.append(shuffled[count:])
    return torch.cat(stay).sort().values, torch.cat(held).sort().values


def _ahead(
    draw: Callable[[int, Tensor], Tensor], chunks: Sequence[Tensor], workers: int
) -> Iterator[Tensor]:
    """Yield `draw(number, chunk)` in order, with up to `workers` of them drawn ahead in threads."""
    if workers == 0:
        yield from map(draw, range(len(chunks)), chunks)
        return
    # Threads, not processes: Pillow works without the interpreter's lock, and a fork of a process
    # that runs OpenMP threads may hang.
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Tensor]] = deque()
        try:
            for number, chunk in enumerate(chunks):
                waiting.append(pool.submit(draw, number, chunk))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

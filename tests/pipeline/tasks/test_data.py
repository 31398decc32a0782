import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import DataError
from pipeline.recipe import DataSection
from pipeline.tasks.data import Data, load_data

DIGITS = DataSection(source="digits")
CLASSES = ("ant", "bee", "cat")


def write_images(
    folder: Path, count: int, size: tuple[int, int] = (12, 12), first: int = 0
) -> None:
    """Class c, number i: every pixel is (40 c + i, column, row), so that each image is known."""
    height, width = size
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(first, first + count):
            pixels = np.zeros((height, width, 3), dtype=np.uint8)
            pixels[..., 0] = 40 * number + i
            pixels[..., 1] = np.arange(width)
            pixels[..., 2] = np.arange(height)[:, None]
            Image.fromarray(pixels).save(folder / name / f"{i:03d}.png")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_images(tmp_path / "train", 20)
    write_images(tmp_path / "val", 5, first=30)
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".cache").mkdir()
    return tmp_path


def section(source: Path, **changes: object) -> DataSection:
    taste = {"mean": (0, 0, 0), "std": (1, 1, 1), "validation_share": 0.2, "batch": 8}
    return DataSection.model_validate({"source": str(source), **taste, **changes})


def reds(batches: object) -> list[int]:
    """Return what `write_images` put into the red channel of every image."""
    return [round(255 * float(image[0, 5, 5])) for images, _ in batches for image in images]  # type: ignore[attr-defined]


def test_digits_are_split_evenly_over_the_classes() -> None:
    data = load_data(DIGITS, (1, 32, 32), seed=0)

    assert data.classes == tuple("0123456789")
    assert sum(data.sizes.values()) == 1797
    assert data.sizes["test"] == pytest.approx(0.2 * 1797, abs=10)
    assert data.sizes["validation"] == pytest.approx(0.05 * (1797 - data.sizes["test"]), abs=10)
    for batches in (data.train_batches(0), data.validation_batches(), data.test_batches()):
        labels = torch.cat([labels for _, labels in batches])
        counts = torch.bincount(labels, minlength=10)
        assert labels.dtype == torch.int64
        assert counts.min() > 0.7 * counts.max()


def test_digits_are_enlarged_and_normalised_to_minus_one_to_one() -> None:
    images = torch.cat([images for images, _ in load_data(DIGITS, (1, 32, 24), 0).test_batches()])

    assert images.shape[1:] == (1, 32, 24) and images.dtype == torch.float32
    assert images.min() == -1 and 0.9 < images.max() <= 1


def test_digits_in_colour_have_three_equal_channels() -> None:
    taste = DataSection(source="digits", mean=(0, 0, 0), std=(1, 1, 1))

    images, _ = next(load_data(taste, (3, 16, 16), 0).test_batches())

    assert torch.equal(images[:, 0], images[:, 2])


def test_the_digits_for_testing_do_not_depend_on_the_seed() -> None:
    first, second = (load_data(DIGITS, (1, 8, 8), seed) for seed in (0, 1))

    assert torch.equal(next(first.test_batches())[0], next(second.test_batches())[0])
    assert not torch.equal(first.validation, second.validation)


def test_a_folder_gives_its_images_with_the_number_of_their_class(source: Path) -> None:
    data = load_data(section(source), (3, 12, 12), seed=0)

    assert data.classes == CLASSES
    assert data.sizes == {"train": 48, "validation": 12, "test": 15}
    for images, labels in data.test_batches():
        values = (255 * images[:, 0, 5, 5]).round().long()
        assert torch.equal(values // 40, labels)
    columns = (255 * images[0, 1]).round().long()
    assert columns.tolist() == [list(range(12))] * 12


def test_training_and_validation_share_no_image_and_lose_none(source: Path) -> None:
    data = load_data(section(source), (3, 12, 12), seed=0)

    trained, held = reds(data.train_batches(0)), reds(data.validation_batches())

    assert sorted(trained + held) == sorted(40 * c + i for c in range(3) for i in range(20))
    assert sorted(value // 40 for value in held) == [0] * 4 + [1] * 4 + [2] * 4


def test_only_whole_batches_are_trained_on(source: Path) -> None:
    data = load_data(section(source, batch=20), (3, 12, 12), seed=0)

    assert data.train_steps == 2
    assert [len(labels) for _, labels in data.train_batches(0)] == [20, 20]
    assert [len(labels) for _, labels in data.test_batches()] == [15]


def test_fewer_images_than_a_batch_are_one_batch(source: Path) -> None:
    data = load_data(section(source, batch=500), (3, 12, 12), seed=0)

    assert data.train_steps == 1
    assert [len(labels) for _, labels in data.train_batches(0)] == [48]


def same(first: object, second: object) -> bool:
    pairs = list(zip(first, second, strict=True))  # type: ignore[call-overload]
    return all(torch.equal(a, b) and torch.equal(k, m) for (a, k), (b, m) in pairs)


AUGMENTS = [(), ("flip",), ("shift",), ("crop",), ("crop", "shift", "flip")]


@pytest.mark.parametrize("augment", AUGMENTS)
def test_images_read_ahead_from_files_equal_those_held_in_memory(
    source: Path, augment: tuple[str, ...]
) -> None:
    shape = (3, 8, 10)
    held = load_data(section(source, augment=augment), shape, seed=3)
    filed = load_data(section(source, augment=augment, memory_bytes=1), shape, seed=3)

    assert hasattr(held.pool, "pixels") and not hasattr(filed.pool, "pixels")
    assert same(held.train_batches(1), filed.train_batches(1))
    assert same(held.validation_batches(), filed.validation_batches())
    assert same(held.test_batches(), filed.test_batches())


def test_the_number_of_workers_changes_nothing(source: Path) -> None:
    alone, many = (
        load_data(section(source, augment=("crop",), memory_bytes=1, workers=n), (3, 8, 8), 0)
        for n in (0, 5)
    )

    assert same(alone.train_batches(0), many.train_batches(0))


@pytest.mark.parametrize("augment", AUGMENTS)
def test_an_epoch_can_be_drawn_again_on_its_own(source: Path, augment: tuple[str, ...]) -> None:
    taste = section(source, augment=augment)
    data = load_data(taste, (3, 12, 12), seed=0)
    epochs = [list(data.train_batches(epoch)) for epoch in range(3)]

    assert same(epochs[2], load_data(taste, (3, 12, 12), seed=0).train_batches(2))
    assert not same(epochs[1], epochs[2])
    assert not same(epochs[2], load_data(taste, (3, 12, 12), seed=1).train_batches(2))


def test_random_crops_of_images_of_several_sizes_are_read_from_files(source: Path) -> None:
    write_images(source / "train", 1, size=(30, 20))

    cropped = load_data(section(source, augment=("crop",)), (3, 8, 8), seed=0)
    whole = load_data(section(source), (3, 8, 8), seed=0)

    assert not hasattr(cropped.pool, "pixels") and hasattr(whole.pool, "pixels")
    assert len(list(cropped.train_batches(0))) == cropped.train_steps


def test_calibration_gives_training_images_as_they_are(source: Path) -> None:
    data = load_data(section(source, augment=("crop", "shift")), (3, 12, 12), seed=0)

    batches = data.calibration(20, seed=1)
    found = reds(batches)

    assert [len(labels) for _, labels in batches] == [8, 8, 4]
    assert len(set(found)) == 20
    assert not set(found) & set(reds(data.validation_batches()))
    assert found == reds(data.calibration(20, seed=1)) != reds(data.calibration(20, seed=2))
    assert torch.allclose(255 * batches[0][0][0, 1, 0], torch.arange(12.0), atol=1e-3)
    assert len(reds(data.calibration(10_000, seed=0))) == 48


def test_decoding_tells_how_far_it_is(source: Path) -> None:
    told: list[tuple[int, int, str]] = []

    load_data(section(source), (3, 12, 12), 0, progress=lambda *news: told.append(news))

    assert told[-1][:2] == (60, 60)


def test_grey_palette_and_transparent_images_become_what_the_network_takes(source: Path) -> None:
    ants, grey = source / "train" / "ant", Image.new("L", (12, 12), 30)
    grey.convert("P").save(ants / "palette.png", transparency=bytes(range(256)))
    grey.save(ants / "grey.png", transparency=0)
    grey.convert("RGBA").save(ants / "transparent.png")
    grey.convert("1").save(ants / "black-and-white.bmp")

    colour = load_data(section(source), (3, 12, 12), seed=0)
    single = load_data(section(source, mean=(0,), std=(1,)), (1, 12, 12), seed=0)

    assert colour.sizes["train"] + colour.sizes["validation"] == 64
    assert next(single.train_batches(0))[0].shape == (8, 1, 12, 12)


def test_the_digest_ignores_where_the_images_lie_but_not_the_seed(source: Path) -> None:
    def digest(place: Path, seed: int = 0, **changes: object) -> str:
        return load_data(section(place, **changes), (3, 12, 12), seed).digest

    moved = source.parent / f"{source.name}-moved"
    shutil.copytree(source, moved)

    assert digest(source) == digest(moved) == digest(source, memory_bytes=1)
    assert len({digest(source), digest(source, 1), digest(source, batch=9)}) == 3


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_digest_notices_an_image_in_the_place_of_another(source: Path, split: str) -> None:
    before = load_data(section(source), (3, 12, 12), 0).digest
    image = min((source / split / "ant").glob("*.png"))

    image.rename(image.with_name("other.png"))

    assert load_data(section(source), (3, 12, 12), 0).digest != before


def broken(source: Path, **changes: object) -> Data:
    return load_data(section(source, **changes), (3, 12, 12), seed=0)


def read_all(source: Path, **changes: object) -> int:
    data = broken(source, **changes)
    return len(reds(data.train_batches(0)) + reds(data.validation_batches()))


def test_a_source_that_is_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither \"digits\" nor a folder.*train/<class>"):
        broken(tmp_path / "nowhere")


def test_a_split_that_is_missing_is_an_error(source: Path) -> None:
    with pytest.raises(DataError, match=r"no folder .*testing.*`data.test`"):
        broken(source, test="testing")


def test_a_split_without_class_folders_is_an_error(source: Path) -> None:
    (source / "flat").mkdir()
    (source / "flat" / "1.png").write_bytes(b"")

    with pytest.raises(DataError, match="flat holds no class folders"):
        broken(source, train="flat")


def test_a_class_without_images_is_an_error(source: Path) -> None:
    (source / "train" / "dog").mkdir()

    with pytest.raises(DataError, match=r"No images in .*dog \(1 of 4.*\.png"):
        broken(source)


def test_a_class_that_is_missing_in_the_test_images_is_an_error(source: Path) -> None:
    shutil.rmtree(source / "val" / "bee")

    with pytest.raises(DataError, match=r"1 of the classes in .*train are missing in .*val: bee"):
        broken(source)


def test_a_class_that_is_missing_in_the_training_images_is_an_error(source: Path) -> None:
    shutil.rmtree(source / "train" / "bee")

    with pytest.raises(DataError, match=r"1 of the classes in .*val are missing in .*train: bee"):
        broken(source)


@pytest.mark.parametrize("augment", [(), ("crop",)])
@pytest.mark.parametrize("memory_bytes", [1, 10**9])
def test_an_unreadable_image_is_named(
    source: Path, augment: tuple[str, ...], memory_bytes: int
) -> None:
    (source / "train" / "cat" / "007.png").write_bytes(b"\x89PNG\r\n\x1a\n, and then nothing")

    with pytest.raises(DataError, match=r"Cannot read the image .*cat/007\.png"):
        read_all(source, augment=augment, memory_bytes=memory_bytes)


def test_a_truncated_image_is_named(source: Path) -> None:
    path = source / "train" / "cat" / "007.png"
    path.write_bytes(path.read_bytes()[:60])

    with pytest.raises(DataError, match=r"Cannot read the image .*cat/007\.png"):
        broken(source)


def test_an_image_of_16_bits_is_an_error(source: Path) -> None:
    deep = np.full((12, 12), 40_000, dtype=np.uint16)
    Image.fromarray(deep).save(source / "train" / "cat" / "007.png")

    with pytest.raises(DataError, match=r"007\.png: pixels of more than 8 bits"):
        broken(source)


def test_test_images_are_read_when_they_are_asked_for(source: Path) -> None:
    (source / "val" / "cat" / "030.png").write_bytes(b"damaged")
    data = broken(source)

    assert len(list(data.train_batches(0))) == 6
    with pytest.raises(DataError, match=r"val/cat/030\.png"):
        list(data.test_batches())


def test_a_class_of_one_image_cannot_be_split(source: Path) -> None:
    for path in sorted((source / "train" / "bee").glob("*.png"))[1:]:
        path.unlink()

    with pytest.raises(DataError, match=r"'bee' has 1 training image.*would be empty"):
        broken(source)


@pytest.mark.parametrize(("key", "values"), [("mean", (0.5,)), ("std", (1, 1, 1, 1))])
def test_a_normalisation_of_other_channels_is_an_error(
    source: Path, key: str, values: tuple[float, ...]
) -> None:
    with pytest.raises(DataError, match=rf"data\.{key} has {len(values)} values.*3 channels"):
        broken(source, **{key: values})


def test_a_standard_deviation_of_zero_is_an_error(source: Path) -> None:
    with pytest.raises(DataError, match=r"data\.std must be above 0"):
        broken(source, std=(1, 0, 1))


def test_a_network_of_other_than_one_or_three_channels_is_an_error(source: Path) -> None:
    with pytest.raises(DataError, match=r"takes 4 channels.*model\.input_shape"):
        load_data(section(source), (4, 12, 12), seed=0)


def test_a_resize_below_the_input_is_an_error(source: Path) -> None:
    with pytest.raises(DataError, match=r"data\.resize is 8 px, less than .* 12x12"):
        broken(source, resize=8)

"""A bundle holds what a device needs, and nothing that it reads is trusted."""

import hashlib
import io
import json
import zipfile

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from hardware.bundle import (
    CHANNELS,
    LARGEST,
    MANIFEST,
    TEMPLATE,
    Contents,
    pack,
    read_bundle,
    write_bundle,
)
from hardware.errors import StorageError
from hardware.runtimes.base import EngineSettings
from hardware.runtimes.fake import FakeRuntime
from tests.hardware.templates import residual

CANDIDATES = {
    "stream": (16, 32),
    "inner0": (0, 8, 16, 32),
    "inner1": (0, 16, 32),
    "wide": (32, 64),
}


def parts_of(with_weights=False, **changes):
    template, channels = residual()
    given = {
        "network": "zoo:residual",
        "template": template,
        "channels": channels,
        "candidates": CANDIDATES,
        "settings": EngineSettings(threads=2),
        "batch": 1,
    }
    return pack(Contents(**(given | changes)), with_weights=with_weights)


def written(path, **options):
    manifest, parts = parts_of(**options)
    write_bundle(path, manifest, parts)
    return manifest


def rezipped(path, changes, order=None):
    """Write the bundle anew with some of its parts replaced; None leaves a part out."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()} | changes
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            if content is not None:
                archive.writestr(name, content)


def test_a_bundle_survives_writing_and_reading(tmp_path):
    manifest = written(tmp_path / "b.zip", with_weights=True)
    template, channels = residual()

    bundle = read_bundle(tmp_path / "b.zip")

    assert bundle.manifest == manifest and bundle.manifest.candidates == CANDIDATES
    assert bundle.channels == channels
    assert bundle.template == template
    assert bundle.settings == EngineSettings(threads=2)


def test_equal_bundles_are_equal_files(tmp_path):
    first, again = (written(tmp_path / name) for name in ("a.zip", "b.zip"))

    assert first.digest == again.digest
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_every_setting_is_in_the_digest():
    plain, _ = parts_of()
    others = [
        parts_of(network="other")[0],
        parts_of(settings=EngineSettings())[0],
        parts_of(seed=1)[0],
        parts_of(with_weights=True)[0],
    ]

    assert len({plain.digest, *(other.digest for other in others)}) == 5


def test_without_weights_a_bundle_computes_something_of_the_same_speed(tmp_path):
    manifest = written(tmp_path / "b.zip")
    template, _ = residual()

    bundle = read_bundle(tmp_path / "b.zip")

    # The smallest vector, the bias of the last layer, travels: 10 values are no secret.
    assert "stem.weight" in manifest.drawn and "fc.bias" not in manifest.drawn
    drawn = {t.name: numpy_helper.to_array(t) for t in bundle.template.graph.initializer}
    for tensor in template.graph.initializer:
        before, now = numpy_helper.to_array(tensor), drawn[tensor.name]
        assert (now.shape, now.dtype) == (before.shape, before.dtype)
        assert np.isfinite(now).all() and (now != 0).all()
    engines = [FakeRuntime().build(m, bundle.settings) for m in (template, bundle.template)]
    times = [engine.timer(engine.random_feeds())(1) for engine in engines]
    assert times[0] == times[1]


def test_without_weights_no_weight_is_in_the_file(tmp_path):
    _, parts = parts_of()
    template, _ = residual()
    sent = onnx.load_model_from_string(parts[TEMPLATE])

    for tensor in template.graph.initializer:
        if tensor.name != "fc.bias":
            assert tensor.raw_data not in parts[TEMPLATE]
    assert sum(len(t.raw_data) for t in sent.graph.initializer) == 40


@pytest.mark.parametrize("name", [CHANNELS, TEMPLATE])
def test_a_part_that_was_changed_is_refused(tmp_path, name):
    written(tmp_path / "b.zip")
    rezipped(tmp_path / "b.zip", {name: b"{}"})

    with pytest.raises(StorageError, match=f"{name} in .*its SHA-256 differs"):
        read_bundle(tmp_path / "b.zip")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"../evil.py": b"x"}, r"must hold exactly .*it holds .*evil"),
        ({"/etc/passwd": b"x"}, "must hold exactly"),
        ({TEMPLATE: None}, "must hold exactly"),
    ],
)
def test_other_names_than_a_bundles_own_are_refused(tmp_path, changes, match):
    written(tmp_path / "b.zip")
    rezipped(tmp_path / "b.zip", changes)

    with pytest.raises(StorageError, match=match):
        read_bundle(tmp_path / "b.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["b.zip"]


def test_a_part_that_unpacks_to_more_than_its_limit_is_refused(tmp_path, monkeypatch):
    written(tmp_path / "b.zip")
    monkeypatch.setitem(LARGEST, TEMPLATE, 1000)

    with pytest.raises(StorageError, match=rf"{TEMPLATE} in .* unpacks to \d+ bytes; at most 1000"):
        read_bundle(tmp_path / "b.zip")


def test_a_header_that_lies_about_the_size_is_refused(tmp_path):
    path = tmp_path / "b.zip"
    written(path)
    rezipped(path, {})  # stored, not deflated: sizes are in plain sight
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x01\x02")  # the last entry of the directory
    content[at + 24 : at + 28] = (100).to_bytes(4, "little")
    path.write_bytes(content)

    with pytest.raises(StorageError):
        read_bundle(path)


def test_a_file_that_is_no_zip_is_refused(tmp_path):
    (tmp_path / "b.zip").write_text("<html>not found</html>")

    with pytest.raises(StorageError, match=r"b\.zip is no bundle, or damaged .*Copy it again"):
        read_bundle(tmp_path / "b.zip")


def test_a_bundle_cut_short_is_refused(tmp_path):
    written(tmp_path / "b.zip")
    content = (tmp_path / "b.zip").read_bytes()
    (tmp_path / "b.zip").write_bytes(content[: len(content) // 2])

    with pytest.raises(StorageError, match="no bundle, or damaged"):
        read_bundle(tmp_path / "b.zip")


def test_a_missing_bundle_is_refused(tmp_path):
    with pytest.raises(StorageError, match="Cannot read the bundle"):
        read_bundle(tmp_path / "none.zip")


def forged(path, template=None, **manifest):
    """Write a bundle whose hashes fit although its content is not what `pack` would write."""
    honest, parts = parts_of()
    if template is not None:
        parts[TEMPLATE] = template
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in parts.items()}
    write_bundle(path, honest.model_copy(update={"sha256": hashes, **manifest}), parts)


def test_a_template_that_points_at_other_files_is_refused(tmp_path):
    template, _ = residual()
    tensor = template.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    forged(tmp_path / "b.zip", template.SerializeToString())

    with pytest.raises(StorageError, match="refers to files outside of the bundle"):
        read_bundle(tmp_path / "b.zip")


def test_a_template_of_another_structure_is_refused(tmp_path):
    template, _ = residual(blocks=1)
    forged(tmp_path / "b.zip", template.SerializeToString(), drawn=())

    with pytest.raises(StorageError, match="has the structure"):
        read_bundle(tmp_path / "b.zip")


def test_widths_that_the_network_cannot_have_are_refused(tmp_path):
    forged(tmp_path / "b.zip", candidates={"stream": (16, 1000)})

    with pytest.raises(StorageError, match=r"asks for the widths \(16, 1000\) of stream.*has 32"):
        read_bundle(tmp_path / "b.zip")


def test_a_weight_of_an_absurd_size_is_refused_before_it_is_drawn(tmp_path):
    template, _ = residual()
    template.graph.initializer[0].ClearField("raw_data")
    del template.graph.initializer[0].dims[:]
    template.graph.initializer[0].dims.extend([1 << 20, 1 << 20])
    forged(tmp_path / "b.zip", template.SerializeToString(), drawn=("stem.weight",))

    with pytest.raises(StorageError, match=r"'stem\.weight' .* has 1099511627776 elements"):
        read_bundle(tmp_path / "b.zip")


def test_a_manifest_of_a_newer_espalier_is_refused(tmp_path):
    manifest = written(tmp_path / "b.zip")
    body = json.loads(manifest.as_json()) | {"schema": 99}
    rezipped(tmp_path / "b.zip", {MANIFEST: json.dumps(body).encode()})

    with pytest.raises(StorageError, match=r"bundle\.json in .*has schema 99"):
        read_bundle(tmp_path / "b.zip")


def test_a_bundle_is_written_deflated(tmp_path):
    written(tmp_path / "b.zip")
    content = io.BytesIO((tmp_path / "b.zip").read_bytes())

    with zipfile.ZipFile(content) as archive:
        assert all(i.compress_type == zipfile.ZIP_DEFLATED for i in archive.infolist())

"""What a device needs to measure a network, as one zip file: template, channel map, widths.

A bundle is read as foreign: nothing is extracted, sizes are bounded, every part is checked against
its hash, and an ONNX file that points at other files is refused.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar
from zlib import crc32
from zlib import error as DeflateError  # noqa: N812 - a class under a function's name

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hardware.errors import StorageError
from hardware.graph.channel_map import ChannelMap
from hardware.graph.model import initializers
from hardware.latency.variant import digest_of
from hardware.records import Record, parse_record, write_whole
from hardware.runtimes.base import EngineSettings

MANIFEST, CHANNELS, TEMPLATE = "bundle.json", "channels.json", "template.onnx"
# Largest sizes that are read, bytes, unpacked. Protobuf itself ends at 2 GiB.
LARGEST = {MANIFEST: 1 << 24, CHANNELS: 1 << 28, TEMPLATE: (1 << 31) - 1}
EPOCH = (1980, 1, 1, 0, 0, 0)  # one time stamp, so that equal bundles are equal files
# Smaller constants (bounds of a clip, shapes) decide what a network computes; they always travel.
LEAST_DRAWN = 32
FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})
AnyRecord = TypeVar("AnyRecord", bound=Record)


class Manifest(Record):
    """What a bundle is: settings, widths to try, and the hashes of its parts."""

    SCHEMA: ClassVar[int] = 1
    network: str  # as the recipe names it, for people
    template: str  # digest of the network's structure; tables know networks by it
    precision: str
    threads: int
    batch: int
    seed: int
    candidates: Mapping[str, tuple[int, ...]]  # widths per group that a planner may choose
    drawn: tuple[str, ...]  # weights left out, to be drawn at random: latency depends on none
    sha256: Mapping[str, str]  # of every other part

    @property
    def digest(self) -> str:
        """SHA-256 of the whole bundle: of the manifest, which holds those of all parts."""
        return hashlib.sha256(self.as_json()).hexdigest()

    def as_json(self) -> bytes:
        """Return the manifest as it is written and hashed."""
        body = {"schema": self.SCHEMA, **self.model_dump(mode="json")}
        return json.dumps(body, sort_keys=True, indent=1).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A bundle in memory, checked; the template has all its weights."""

    manifest: Manifest
    template: onnx.ModelProto
    channels: ChannelMap

    @property
    def settings(self) -> EngineSettings:
        """How its engines are built."""
        return EngineSettings(precision=self.manifest.precision, threads=self.manifest.threads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What goes into a bundle."""

    network: str  # its name, for people
    template: onnx.ModelProto  # batch norms folded
    channels: ChannelMap
    candidates: Mapping[str, tuple[int, ...]]  # widths per group that a planner may choose
    settings: EngineSettings  # how engines are built
    batch: int  # images per inference
    seed: int = 0  # of the design of the measurements


def pack(contents: Contents, *, with_weights: bool = False) -> tuple[Manifest, dict[str, bytes]]:
    """Return a bundle's manifest and its other parts by name.

    Args:
        contents: what the device is to measure.
        with_weights: send the weights; else the device draws random ones of the same shapes.
    """
    template, channels = contents.template, contents.channels
    model, drawn = (template, ()) if with_weights else _without_weights(template)
    parts = {
        CHANNELS: json.dumps(
            {"schema": channels.SCHEMA, **channels.model_dump(mode="json")}
        ).encode(),
        TEMPLATE: model.SerializeToString(deterministic=True),
    }
    manifest = Manifest(
        network=contents.network,
        template=digest_of(template),
        precision=contents.settings.precision,
        threads=contents.settings.threads,
        batch=contents.batch,
        seed=contents.seed,
        candidates=dict(contents.candidates),
        drawn=drawn,
        sha256={name: hashlib.sha256(content).hexdigest() for name, content in parts.items()},
    )
    return manifest, parts


def write_bundle(path: Path, manifest: Manifest, parts: Mapping[str, bytes]) -> None:
    """Write a bundle; the file appears whole.

    Raises:
        StorageError: the folder cannot be written.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {MANIFEST: manifest.as_json(), **parts}.items():
            info = zipfile.ZipInfo(name, EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
    write_whole(path, buffer.getvalue())


def read_bundle(path: Path) -> Bundle:
    """Return the bundle in a file, every part checked against the manifest's hash.

    Raises:
        StorageError: no such file, not a bundle, damaged, or larger than a bundle may be.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            parts = {name: _read_part(archive, name, path) for name in _names_in(archive, path)}
    except OSError as error:
        raise StorageError(f"Cannot read the bundle {path}: {error.strerror or error}.") from error
    except (zipfile.BadZipFile, DeflateError, EOFError, RuntimeError, NotImplementedError) as error:
        raise StorageError(
            f"{path} is no bundle, or damaged ({error}). Copy it again, in binary mode."
        ) from error
    manifest = _record(Manifest, parts.pop(MANIFEST), path, MANIFEST)
    for name, content in parts.items():
        if hashlib.sha256(content).hexdigest() != manifest.sha256.get(name):
            raise StorageError(
                f"{name} in {path} is not what the manifest says: its SHA-256 differs. Copy the "
                "bundle again, or write it anew: espalier profile RECIPE --bundle FILE."
            )
    bundle = Bundle(
        manifest=manifest,
        template=_template(parts[TEMPLATE], manifest, path),
        channels=_record(ChannelMap, parts[CHANNELS], path, CHANNELS),
    )
    _check(bundle, path)
    return bundle


def _names_in(archive: zipfile.ZipFile, path: Path) -> list[str]:
    """Return the names of the parts, which must be a bundle's own, each once and of a sane size."""
    infos = archive.infolist()
    if sorted(info.filename for info in infos) != sorted(LARGEST):
        found = ", ".join(repr(info.filename)[:40] for info in infos[:5]) or "nothing"
        raise StorageError(
            f"{path} is no bundle: it must hold exactly {', '.join(LARGEST)}; it holds {found}."
        )
    for info in infos:
        if info.file_size > LARGEST[info.filename]:
            raise StorageError(
                f"{info.filename} in {path} unpacks to {info.file_size} bytes; at most "
                f"{LARGEST[info.filename]} are read."
            )
    return [info.filename for info in infos]


def _read_part(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    # A header may lie about the size: never unpack more than is allowed.
    with archive.open(name) as file:
        content = file.read(LARGEST[name] + 1)
    if len(content) > LARGEST[name]:
        raise StorageError(f"{name} in {path} unpacks to more than {LARGEST[name]} bytes.")
    return content


def _record(kind: type[AnyRecord], content: bytes, path: Path, name: str) -> AnyRecord:
    return parse_record(kind, content, f"{name} in {path}")


def _template(content: bytes, manifest: Manifest, path: Path) -> onnx.ModelProto:
    """Return the template with its weights, those that were left out drawn at random."""
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's own errors share no public base class
        raise StorageError(f"{TEMPLATE} in {path} is no ONNX model: {error}") from error
    if outside := [t.name for t in model.graph.initializer if _is_external(t)]:
        raise StorageError(
            f"{TEMPLATE} in {path} refers to files outside of the bundle for {outside[0]!r}. "
            "A bundle holds everything that it needs; write it anew."
        )
    _draw_weights(model, manifest.drawn, path)
    if (found := digest_of(model)) != manifest.template:
        raise StorageError(
            f"{TEMPLATE} in {path} has the structure {found}, the manifest says "
            f"{manifest.template}. The bundle was written by another version of Espalier: write it "
            "anew with this one."
        )
    return model


def _is_external(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL or len(tensor.external_data) > 0


def _without_weights(template: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Return the template with its larger weights left out, and their names."""
    model = onnx.ModelProto()
    model.CopyFrom(template)
    drawn = []
    for tensor in model.graph.initializer:
        if tensor.data_type in FLOATS and int(np.prod(tensor.dims)) >= LEAST_DRAWN:
            drawn.append(tensor.name)
            for field in ("raw_data", "float_data", "int32_data"):
                tensor.ClearField(field)
    return model, tuple(drawn)


def _draw_weights(model: onnx.ModelProto, names: Sequence[str], path: Path) -> None:
    """Fill in weights that were left out, in place.

    Of such a size that activations neither vanish nor overflow, since both change how fast a
    processor computes; vectors are positive, because a variance may be among them.
    """
    known = initializers(model)
    for name in names:
        if name not in known or known[name].data_type not in FLOATS:
            raise StorageError(f"The manifest in {path} names a weight {name!r} that is not there.")
        tensor = known[name]
        shape = tuple(tensor.dims)
        if (size := int(np.prod(shape))) > LARGEST[TEMPLATE] // 4:
            raise StorageError(f"Weight {name!r} in {path} has {size} elements: too many.")
        generator = np.random.default_rng(crc32(name.encode()))
        if len(shape) > 1:
            values = generator.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        else:
            values = generator.uniform(0.5, 1.5, shape)
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        tensor.CopyFrom(numpy_helper.from_array(values.astype(dtype), name))


def _check(bundle: Bundle, path: Path) -> None:
    """Refuse settings and widths that no engine can have."""
    manifest = bundle.manifest
    full = {group.name: group.width for group in bundle.channels.prunable}
    for name, widths in manifest.candidates.items():
        fits = name in full and bool(widths) and max(widths) == full[name]
        if not fits or list(widths) != sorted(set(widths)) or widths[0] < 0:
            raise StorageError(
                f"{path} asks for the widths {widths} of {name}; the network has "
                f"{full.get(name, 'no such group')}. Write the bundle anew."
            )
    if manifest.threads < 1 or manifest.batch < 1:
        raise StorageError(
            f"{path} asks for {manifest.threads} threads at batch {manifest.batch}; both must be "
            "1 or more."
        )

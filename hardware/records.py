"""Records on disk: JSON that appears whole, forbids unknown keys, and carries its schema number.

And the digests of files that records are compared by.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from hardware.errors import StorageError


class Record(BaseModel):
    """A frozen record that crosses a file boundary."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")
    SCHEMA: ClassVar[int] = 1


AnyRecord = TypeVar("AnyRecord", bound=Record)


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file so that it appears whole or not at all: beside it, then renamed.

    Raises:
        StorageError: the folder is read-only, missing, or the disk is full.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise StorageError(
            f"Cannot write {path}: {error.strerror or error}. "
            "Free space or choose another output folder (`out` in the recipe)."
        ) from error


def save_record(record: Record, path: Path) -> None:
    """Save a record as JSON with its schema number; the file appears whole."""
    body = {"schema": record.SCHEMA, **record.model_dump(mode="json")}
    write_whole(path, json.dumps(body, indent=1) + "\n")


def load_record(kind: type[AnyRecord], path: Path) -> AnyRecord:
    """Return the record in `path`.

    Raises:
        StorageError: no such file, damaged JSON, a newer schema, or keys that do not fit.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(f"Cannot read {path}: {error.strerror or error}.") from error
    return parse_record(kind, content, str(path))


def parse_record(kind: type[AnyRecord], content: bytes, source: str) -> AnyRecord:
    """Return the record that a file's content holds.

    Args:
        kind: the record's class.
        content: of the file.
        source: where it is from, for messages.

    Raises:
        StorageError: damaged JSON, a newer schema, or keys that do not fit.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise StorageError(
            f"{source} is damaged, not JSON ({error}). Delete it to start anew."
        ) from error
    if not isinstance(body, dict):
        raise StorageError(f"{source} holds {type(body).__name__}, not a {kind.__name__} record.")
    schema = body.pop("schema", None)
    if schema != kind.SCHEMA:
        raise StorageError(
            f"{source} has schema {schema}; this version of Espalier reads schema {kind.SCHEMA} of "
            f"{kind.__name__}. Update Espalier, or make the file anew with this version."
        )
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise StorageError(f"{source} is not a valid {kind.__name__}: {error}") from error


def file_digest(*paths: Path) -> str:
    """Return the SHA-256 of the content of files, one after the other.

    Raises:
        StorageError: a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for path in paths:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    except OSError as error:
        raise StorageError(f"Cannot read {path}: {error.strerror or error}.") from error
    return digest.hexdigest()


def model_digest(path: Path) -> str:
    """Return the SHA-256 of a model's file and of the files that it keeps its weights in.

    Weights lie beside the file of an OpenVINO IR, and in whatever files an ONNX model names as its
    external data: a model changes with them, although its own file stays as it is.

    Raises:
        StorageError: a file cannot be read.
    """
    return file_digest(path, *_weight_files(path))


def _weight_files(path: Path) -> tuple[Path, ...]:
    """Return the files beside a model's own file that hold its weights, in order of their names."""
    if path.suffix == ".xml":
        weights = path.with_suffix(".bin")
        return (weights,) if weights.exists() else ()
    if path.suffix != ".onnx":
        return ()
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from onnx.external_data_helper import _get_all_tensors, uses_external_data

    try:
        model = onnx.load(str(path), load_external_data=False)
    except (OSError, DecodeError):
        return ()  # not there, or no ONNX model: whoever reads it says so, with what to do
    names = {
        entry.value
        for tensor in _get_all_tensors(model)
        if uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return tuple(path.parent / name for name in sorted(names))

"""The manifest: from what, with what and on what a delivered engine was made."""

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hardware.device import Device
from hardware.records import Record, file_digest, save_record
from pipeline.records import Plan, Verdict

PACKAGES = (
    "espalier-cnn",
    "torch",
    "torchvision",
    "timm",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "numpy",
    "scipy",
)


class Manifest(Record):
    """Everything needed to make a delivered engine again, or to say why that is not possible."""

    command: str
    recipe: Mapping[str, Any]  # Any: a recipe's values, as resolved
    seed: int
    weights_sha256: str  # of the weights file given in the recipe, "" without one
    network_sha256: str = ""  # of the ONNX file that is the network, with its external data
    data_digest: str  # over the names of the images and what becomes of them, not over pixels
    table: str
    table_sha256: str
    device: Device
    conditions: Mapping[str, str]
    versions: Mapping[str, str]
    plan: Plan
    verdict: Verdict
    files_sha256: Mapping[str, str]  # what was delivered, by path relative to the output folder


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that decide the result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write `manifest.json` into the output folder."""
    save_record(manifest, folder / "manifest.json")


def digests(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Return the SHA-256 of the delivered files among `names` (files, or folders of files)."""
    found: dict[str, str] = {}
    for name in names:
        place = folder / name
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        found |= {str(f.relative_to(folder)): file_digest(f) for f in files if f.is_file()}
    return found

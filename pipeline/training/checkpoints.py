"""Training that survives being killed: the state after the last finished epoch, on disk."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hardware.errors import StorageError
from hardware.records import Record, load_record, save_record, write_whole
from pipeline.errors import TrainingError
from pipeline.records import EpochRecord

RECORD = "training.json"


class Checkpoint(Record):
    """How far a training has come, and what it belongs to. Written last, so it never lies."""

    belongs_to: Mapping[str, str]  # what -> digest
    epochs: tuple[EpochRecord, ...]
    tensors: str  # file beside this one

    @property
    def best(self) -> EpochRecord:
        """The epoch with the highest validation accuracy, the later one of equals."""
        return best_of(self.epochs)


def best_of(epochs: tuple[EpochRecord, ...]) -> EpochRecord:
    """Return the epoch with the highest validation accuracy, the later one of equals."""
    return max(epochs, key=lambda record: (record.val_accuracy_pct, record.epoch))


def save_checkpoint(
    folder: Path,
    belongs_to: Mapping[str, str],
    epochs: tuple[EpochRecord, ...],
    tensors: Mapping[str, Tensor],
) -> None:
    """Write the state after an epoch. A kill at any moment leaves the old one or the new one.

    The tensors go to a file of their own name first; the record that names it makes it count.

    Raises:
        StorageError: the folder is read-only or the disk is full.
    """
    name = f"epoch-{epochs[-1].epoch:04d}.safetensors"
    held = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in tensors.items()
    }
    write_whole(folder / name, save(held))
    checkpoint = Checkpoint(belongs_to=belongs_to, epochs=epochs, tensors=name)
    save_record(checkpoint, folder / RECORD)
    for old in (*folder.glob("epoch-*.safetensors"), *folder.glob(".epoch-*.safetensors.*")):
        if old.name != name:
            old.unlink(missing_ok=True)


def load_checkpoint(
    folder: Path, belongs_to: Mapping[str, str]
) -> tuple[Checkpoint, dict[str, Tensor]] | None:
    """Return the state after the last finished epoch, None where none has finished.

    Raises:
        TrainingError: it belongs to another training; says in what they differ.
        StorageError: a file is damaged or missing.
    """
    if not (folder / RECORD).exists():
        return None
    checkpoint = load_record(Checkpoint, folder / RECORD)
    if checkpoint.belongs_to != belongs_to:
        differing = [
            key for key, digest in belongs_to.items() if checkpoint.belongs_to.get(key) != digest
        ]
        raise TrainingError(
            f"{folder} holds a training of another {', '.join(differing) or 'kind'}. "
            "Delete that folder to train anew, or choose another `out`."
        )
    path = folder / checkpoint.tensors
    try:
        return checkpoint, load(path.read_bytes())
    except OSError as error:
        raise StorageError(
            f"Cannot read {path}: {error.strerror or error}. Delete {folder} to train anew."
        ) from error
    except SafetensorError as error:
        raise StorageError(
            f"{path} is damaged ({error}). Delete {folder} to train anew."
        ) from error


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

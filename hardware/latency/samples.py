"""Raw samples in a few characters of text, so that a table can keep every one of them."""

import base64
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hardware.errors import StorageError
from hardware.records import Record
from hardware.timing import Series


class Samples(Record):
    """Every sample of a variant and of the full network that was timed in turns with it.

    Each text is base64 of zlib of an array in the order of the rounds: little-endian float32
    microseconds, or one byte per round for the marks. Sample `i` came from engine `i % engines`.
    """

    variant: str
    anchor: str
    disturbed: str  # rounds in which something else used the processor
    narrow: str = ""  # of the narrow network, likewise in turns
    engines: int = 1  # of the variant, in turns
    anchors: int = 1  # of the full network, in turns; and of the narrow one

    def variant_us(self) -> npt.NDArray[np.float32]:
        """Return the variant's samples, microseconds; raises StorageError where damaged."""
        return _unpacked(self.variant, "<f4")

    def anchor_us(self) -> npt.NDArray[np.float32]:
        """Return the full network's samples, microseconds; raises StorageError where damaged."""
        return _unpacked(self.anchor, "<f4")

    def narrow_us(self) -> npt.NDArray[np.float32]:
        """Return the narrow network's, none where it was not timed; raises StorageError."""
        return _unpacked(self.narrow, "<f4") if self.narrow else np.empty(0, dtype=np.float32)

    def is_disturbed(self) -> npt.NDArray[np.bool_]:
        """Return which rounds were disturbed; raises StorageError where damaged."""
        return _unpacked(self.disturbed, "u1").astype(bool)


def samples_of(
    variant: Series, anchor: Series, engines: int, anchors: int, narrow: Series | None = None
) -> Samples:
    """Return the samples of series that were timed together.

    Args:
        variant: of the narrowed network.
        anchor: of the full network.
        engines: so many of the variant took turns.
        anchors: so many of the full network took turns.
        narrow: of the narrow network, of which as many did.
    """
    every = [series.tainted for series in (variant, anchor, narrow) if series is not None]
    marks = [any(round_) for round_ in zip(*every, strict=True)]
    return Samples(
        variant=_packed(1000 * np.array(variant.samples_ms), "<f4"),
        anchor=_packed(1000 * np.array(anchor.samples_ms), "<f4"),
        disturbed=_packed(marks, "u1"),
        engines=engines,
        anchors=anchors,
        narrow=_packed(1000 * np.array(narrow.samples_ms), "<f4") if narrow is not None else "",
    )


def _packed(values: Sequence[bool] | npt.NDArray[np.float64], dtype: str) -> str:
    return base64.b64encode(zlib.compress(np.asarray(values).astype(dtype).tobytes(), 9)).decode()


def _unpacked(text: str, dtype: str) -> npt.NDArray[np.float32]:
    try:
        return np.frombuffer(zlib.decompress(base64.b64decode(text, validate=True)), dtype=dtype)
    except (ValueError, zlib.error) as error:
        raise StorageError(
            f"Samples of a table are damaged ({error}). Measure it anew, or leave them alone: "
            "predictions do not read them."
        ) from error

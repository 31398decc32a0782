"""Numbers and names as people read them, on pages and in tables. Nothing here rounds a record."""

import math
from collections.abc import Callable
from typing import Any

from pipeline.records import Form

_SPACE = "\N{NO-BREAK SPACE}"  # a number and its unit stay on one line
UNKNOWN = "unknown"  # what is not a number is said in words
RUNTIME_NAMES = {"ov": "OpenVINO", "ort": "ONNX Runtime", "trt": "TensorRT"}


def ms(value: float) -> str:
    """Return a latency in milliseconds: three or four significant digits."""
    return f"{value:,.{_digits(value)}f}{_SPACE}ms" if math.isfinite(value) else UNKNOWN


def ms_pair(pair: tuple[float, float], between: str) -> str:
    """Return two latencies in milliseconds with one unit and equally many digits."""
    finite = [value for value in pair if math.isfinite(value)]
    digits = _digits(min(finite, default=0.0))
    texts = [f"{value:,.{digits}f}" if math.isfinite(value) else UNKNOWN for value in pair]
    return f"{texts[0]}{_SPACE}{between} {texts[1]}{_SPACE}ms"


def fixed(value: float, digits: int) -> str:
    """Return a number with so many digits behind the point."""
    return f"{value:.{digits}f}" if math.isfinite(value) else UNKNOWN


def us(value: float) -> str:
    """Return a latency in microseconds, without the unit."""
    return f"{value:,.1f}" if math.isfinite(value) else UNKNOWN


def pct(value: float, digits: int = 2) -> str:
    """Return a percentage."""
    return f"{value:.{digits}f}{_SPACE}%" if math.isfinite(value) else UNKNOWN


def share(value: float) -> str:
    """Return a share in [0, 1] as a percentage."""
    return pct(100 * value, 1)


def signed(value: float, digits: int = 2) -> str:
    """Return a number with its sign; the minus is a minus, not a hyphen."""
    if not math.isfinite(value):
        return UNKNOWN
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def times(value: float) -> str:
    """Return a factor, 1.71×."""
    return f"{value:.2f}×" if math.isfinite(value) else UNKNOWN


def number(value: float) -> str:
    """Return a number with three or four significant digits."""
    return f"{value:.4g}" if math.isfinite(value) else UNKNOWN


def tiny(value: float) -> str:
    """Return a relative difference in powers of ten."""
    if not math.isfinite(value):
        return UNKNOWN
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def many(value: float) -> str:
    """Return a large count in thousands, millions or billions (multiply-adds, parameters)."""
    if not math.isfinite(value):
        return UNKNOWN
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            scaled = f"{value / size:.3g}" if abs(value) < 999.5 * size else f"{value / size:,.0f}"
            return f"{scaled}{_SPACE}{letter}"
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Return a memory size."""
    if value >= 2**30:
        return f"{value / 2**30:.1f}{_SPACE}GiB"
    return f"{value / 2**20:.0f}{_SPACE}MiB"


def duration(value: float) -> str:
    """Return seconds as people say them."""
    if not math.isfinite(value):
        return UNKNOWN
    if value < 60:
        return f"{value:.1f}{_SPACE}s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    parts = (
        (f"{hours} h", f"{minutes:02d} min") if hours else (f"{minutes} min", f"{seconds:02d} s")
    )
    return " ".join(parts).replace(" ", _SPACE)


def change(pair: tuple[float, float]) -> str:
    """Return by how much the second number differs from the first, per cent."""
    before, after = pair
    return f"{signed(100 * (after / before - 1), 1)}{_SPACE}%" if before else UNKNOWN


def runtime_name(runtime: str) -> str:
    """Return what people call a runtime."""
    return RUNTIME_NAMES.get(runtime, runtime)


def layer_of(parameter: str) -> str:
    """Return the layer that a parameter belongs to: its name without the last part."""
    return parameter.removesuffix(".weight")


def limit(line: str) -> tuple[bool | None, str]:
    """Return whether a line of a verdict says that its limit holds, and what it says.

    None where the line does not say.
    """
    for prefix, holds in (("ok: ", True), ("MISSED: ", False)):
        if line.startswith(prefix):
            return holds, line.removeprefix(prefix)
    return None, line


def form(found: Form) -> str:
    """Return in which form a network is pruned, why, and what each form can lose."""
    shares = f"the graph can lose {share(found.graph_share)}"
    if found.class_share is not None:
        shares += f", the class {share(found.class_share)}"
    sentence = f"{found.taken.capitalize()} form: {found.reason.rstrip('.')}."
    return f"{sentence} Of the convolution channels {shares}."


def _digits(value: float) -> int:
    return 4 if value < 1 else 3 if value < 10 else 2 if value < 100 else 1


_FORMATS = (ms, ms_pair, us, fixed, pct, share, signed, times, number, tiny, many, size)
FILTERS: dict[str, Callable[..., Any]] = {  # Any: what a filter takes and gives is its own affair
    function.__name__: function
    for function in (*_FORMATS, duration, change, form, runtime_name, layer_of)
}

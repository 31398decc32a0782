"""An ONNX model into a serialized TensorRT engine, and the timing cache that builds rest on."""

import hashlib
import logging
import os
import re
from functools import lru_cache
from pathlib import Path

from hardware.errors import BuildError, StorageError
from hardware.records import write_whole
from hardware.runtimes.base import Vendor
from hardware.runtimes.cuda import compute_capability, this_gpu

log = logging.getLogger(__name__)

PRECISIONS = ("fp32", "tf32", "fp16")  # tf32: float32 whose products are rounded to 10 bits


@lru_cache
def listener(vendor: Vendor) -> Vendor:
    """Return the logger of one vendor package, which keeps what went wrong.

    TensorRT takes the first logger of a process for all its objects, so there is one.
    """
    worst = {vendor.ILogger.Severity.INTERNAL_ERROR, vendor.ILogger.Severity.ERROR}

    class Listener(vendor.ILogger):  # type: ignore[misc]  # the vendor's class is untyped
        def __init__(self) -> None:
            vendor.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Vendor, text: str) -> None:
            if severity in worst:
                self.errors.append(text)

        def complaint(self) -> str:
            """Return what went wrong since the last time, and forget it."""
            said, self.errors = "; ".join(dict.fromkeys(self.errors)), []
            return said or "TensorRT did not say why"

    return Listener()


def is_rtx(vendor: Vendor) -> bool:
    """Tell whether this is TensorRT for RTX: it builds for named chips and times no tactics."""
    return hasattr(vendor, "ComputeCapability")


def capabilities(vendor: Vendor) -> tuple[str, ...]:
    """Return the compute capabilities that TensorRT for RTX can build for, such as "8.9"."""
    numbers = [
        int(match[1])
        for name in vendor.ComputeCapability.__members__
        if (match := re.fullmatch(r"SM(\d+)", name))
    ]
    return tuple(f"{number // 10}.{number % 10}" for number in sorted(numbers))


def unknown_chip(vendor: Vendor, capability: str) -> str | None:
    """Return None where TensorRT for RTX builds for this compute capability, else what it knows."""
    known = capabilities(vendor)
    if capability in known:
        return None
    return (
        f"TensorRT for RTX {vendor.__version__} does not build for compute capability "
        f"{capability}. It knows {', '.join(known)}; for other chips install tensorrt."
    )


def build_plan(
    vendor: Vendor, model: bytes, *, precision: str, detailed: bool, capability: str | None
) -> bytes:
    """Return the serialized engine of an ONNX model.

    Args:
        vendor: `tensorrt` or `tensorrt_rtx`.
        model: serialized; its types are the engine's.
        precision: only decides whether float32 products may be rounded (`tf32`).
        detailed: keep the names of the ONNX nodes behind each layer, for profiling.
        capability: of the chip to build for; None: the GPU of this machine.

    Raises:
        BuildError: TensorRT refused the model or the chip.
    """
    logger = listener(vendor)
    logger.errors.clear()
    try:
        builder = vendor.Builder(logger)
        network = builder.create_network(_strongly_typed(vendor))
        parser = vendor.OnnxParser(network, logger)
        if not parser.parse(model):
            found = [parser.get_error(index) for index in range(parser.num_errors)]
            said = "; ".join(f"{e.node_name() or 'the model'}: {e.desc()}" for e in found)
            raise BuildError(f"TensorRT cannot read the model: {said}")
        config = builder.create_builder_config()
        if detailed:
            config.profiling_verbosity = vendor.ProfilingVerbosity.DETAILED
        if precision != "tf32":
            config.clear_flag(vendor.BuilderFlag.TF32)
        _aim(vendor, config, capability)
        cache = None if is_rtx(vendor) else _use_cache(vendor, config)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise BuildError(f"TensorRT cannot build the model: {logger.complaint()}")
        if cache is not None:
            write_cache(cache, bytes(config.get_timing_cache().serialize()))
    except (RuntimeError, TypeError, ValueError) as error:  # what the bindings raise
        raise BuildError(f"TensorRT failed: {error}; {logger.complaint()}") from error
    return bytes(plan)


def _strongly_typed(vendor: Vendor) -> int:
    """Return the flags of a strongly typed network; newer versions know no others."""
    flag = getattr(vendor.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _aim(vendor: Vendor, config: Vendor, capability: str | None) -> None:
    """Say which chip the engine is for."""
    if not is_rtx(vendor):
        if capability is not None:
            raise BuildError(
                "TensorRT builds for the GPU of the machine that it runs on. To build for compute "
                f"capability {capability} elsewhere, install TensorRT for RTX: "
                "pip install tensorrt-rtx-cu13"
            )
        return
    capability = capability or ".".join(map(str, compute_capability()))
    if (unknown := unknown_chip(vendor, capability)) is not None:
        raise BuildError(unknown)
    config.num_compute_capabilities = 1
    chip = getattr(vendor.ComputeCapability, f"SM{capability.replace('.', '')}")
    if not config.set_compute_capability(chip, 0):
        raise BuildError(f"TensorRT refused {capability}: {listener(vendor).complaint()}")


def _use_cache(vendor: Vendor, config: Vendor) -> Path:
    """Let the build rest on what earlier builds here have timed; return the cache's file."""
    path = cache_path(vendor.__version__, this_gpu().fingerprint)
    held = config.create_timing_cache(read_cache(path))
    if not config.set_timing_cache(held, False):
        log.warning("TensorRT does not take the timing cache %s: it starts anew", path)
        config.set_timing_cache(config.create_timing_cache(b""), False)
    return path


def cache_path(version: str, gpu: str) -> Path:
    """Return where the timing cache of one version on one GPU lies."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "espalier" / f"tensorrt-{version}-{gpu}.timing"


def write_cache(path: Path, content: bytes) -> None:
    """Write a timing cache behind its own SHA-256."""
    write_whole(path, hashlib.sha256(content).digest() + content)


def read_cache(path: Path) -> bytes:
    """Return a timing cache, empty where there is none.

    Raises:
        StorageError: its content is not what was written.
    """
    if not path.exists():
        return b""
    try:
        body = path.read_bytes()
    except OSError as error:
        raise StorageError(f"Cannot read {path}: {error.strerror or error}.") from error
    digest, content = body[:32], body[32:]
    if hashlib.sha256(content).digest() != digest:
        raise StorageError(
            f"The timing cache {path} is damaged: engines built from it would differ from those "
            "before. Delete it."
        )
    return content

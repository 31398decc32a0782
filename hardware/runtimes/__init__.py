"""The runtimes, by name. A vendor's package is imported only when its runtime is asked for."""

from importlib import import_module

from hardware.errors import BuildError, RuntimeMissingError
from hardware.runtimes.base import EngineSettings, Runtime

# name -> "module:class"; adding a runtime is one file and one line here.
RUNTIMES: dict[str, str] = {
    "ort": "hardware.runtimes.ort:OnnxRuntime",
    "ort-cuda": "hardware.runtimes.ort_gpu:OrtCuda",
    "ort-trt": "hardware.runtimes.ort_gpu:OrtTensorRt",
    "ov": "hardware.runtimes.ov:OpenVino",
    "trt": "hardware.runtimes.trt:TensorRt",
    "fake": "hardware.runtimes.fake:FakeRuntime",
}


def get_runtime(name: str) -> Runtime:
    """Return the runtime of that name, ready to build.

    Raises:
        RuntimeMissingError: unknown, or its package is not installed.
    """
    if name not in RUNTIMES:
        raise RuntimeMissingError(
            f"Unknown runtime {name!r}. Known: {', '.join(sorted(RUNTIMES))}."
        )
    runtime = _class_of(name)()
    if (missing := runtime.missing()) is not None:
        raise RuntimeMissingError(missing)
    return runtime


def check_measurable(runtime: Runtime, settings: EngineSettings) -> None:
    """Refuse a runtime with which no latency table can be measured at these settings.

    Nothing is built for it, so that a run can ask before its first slow stage.

    Raises:
        BuildError: it does not tell what each node takes, or does not build in the precision.
    """
    if not runtime.tells_node_times:
        real = sorted(set(RUNTIMES) - {"fake"})
        others = [name for name in real if _class_of(name).tells_node_times]
        raise BuildError(
            f"The runtime {runtime.name} does not tell what each node of a network takes, so no "
            f"latency table can be measured with it. Choose one that does: {', '.join(others)} "
            "(`espalier devices` shows which of them can be used here)."
        )
    runtime.check_precision(settings.precision)


def _class_of(name: str) -> type[Runtime]:
    """Return the class of a runtime; its vendor's package is not imported yet."""
    module, _, kind = RUNTIMES[name].partition(":")
    found: type[Runtime] = getattr(import_module(module), kind)
    return found

"""The runtimes, by name. A vendor's package is imported only when its runtime is asked for."""

from importlib import import_module

from hardware.errors import RuntimeMissingError
from hardware.runtimes.base import Runtime

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
    module, _, kind = RUNTIMES[name].partition(":")
    runtime: Runtime = getattr(import_module(module), kind)()
    if (missing := runtime.missing()) is not None:
        raise RuntimeMissingError(missing)
    return runtime

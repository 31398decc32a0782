"""The part of NVIDIA's driver that timing an engine needs: memory, a stream, events and graphs.

Through ctypes: the driver's library is there wherever a GPU works, its interface is stable, and it
spares the device another package. TensorRT computes in the same context, the GPU's primary one.
"""

import ctypes
import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from hardware.device import Device
from hardware.errors import RunError, RuntimeMissingError
from hardware.runtimes.base import Array, Vendor

LIBRARIES = ("libcuda.so.1", "nvcuda.dll")
NON_BLOCKING, RELAXED_CAPTURE = 1, 2
# CUdevice_attribute of the driver's header.
MULTIPROCESSORS, CAPABILITY_MAJOR, CAPABILITY_MINOR = 16, 75, 76


def gpu_absent() -> str | None:
    """Return None where a GPU can be used, else why not."""
    library = _library()
    if library is None:
        return "no NVIDIA driver is installed"
    count = ctypes.c_int()
    for code in (library.cuInit(0), library.cuDeviceGetCount(ctypes.byref(count))):
        if code:
            return f"the NVIDIA driver says: {_said(library, code)}"
    return None if count.value else "the NVIDIA driver sees no GPU"


def this_gpu() -> Device:
    """Return the first GPU, described by what decides its speed.

    Raises:
        RuntimeMissingError: there is none.
    """
    if (absent := gpu_absent()) is not None:
        raise RuntimeMissingError(f"There is no GPU to describe: {absent}.")
    driver = _Driver()
    name = ctypes.create_string_buffer(256)
    memory, version = ctypes.c_size_t(), ctypes.c_int()
    driver("cuDeviceGetName", name, len(name), driver.device)
    driver("cuDeviceTotalMem_v2", ctypes.byref(memory), driver.device)
    driver("cuDriverGetVersion", ctypes.byref(version))
    major, minor = compute_capability()
    cores = driver.attribute(MULTIPROCESSORS)
    words = name.value.decode(errors="replace").strip()
    return Device(
        name=words,
        processor=words,
        architecture=f"sm{major}{minor}",
        cores=cores,
        threads=cores,
        memory_bytes=memory.value,
        system=f"CUDA driver {version.value // 1000}.{version.value % 1000 // 10}",
        features=(),
    )


def compute_capability() -> tuple[int, int]:
    """Return the first GPU's compute capability, such as (8, 9)."""
    driver = _Driver()
    return driver.attribute(CAPABILITY_MAJOR), driver.attribute(CAPABILITY_MINOR)


class Stream:
    """A queue of work on the first GPU, with two events to time it by."""

    def __init__(self) -> None:
        self.driver = driver = _Driver()
        driver.use()
        stream, start, end = (ctypes.c_void_p() for _ in range(3))
        driver("cuStreamCreate", ctypes.byref(stream), NON_BLOCKING)
        driver("cuEventCreate", ctypes.byref(start), 0)
        driver("cuEventCreate", ctypes.byref(end), 0)
        self.handle, self._events = stream, (start, end)
        undo = [("cuEventDestroy_v2", start), ("cuEventDestroy_v2", end)]
        weakref.finalize(self, _release, driver, [*undo, ("cuStreamDestroy_v2", stream)])

    @property
    def address(self) -> int:
        """What a vendor's package takes for the stream."""
        return self.handle.value or 0

    def synchronize(self) -> None:
        """Wait until everything in the queue is done."""
        self.driver("cuStreamSynchronize", self.handle)

    def milliseconds(self, run: Callable[[], object], calls: int) -> float:
        """Return the GPU's time per call, between an event before the first and one after the last.

        Args:
            run: puts work into the queue; does not wait.
            calls: how often, back to back.
        """
        start, end = self._events
        self.driver("cuEventRecord", start, self.handle)
        for _ in range(calls):
            run()
        self.driver("cuEventRecord", end, self.handle)
        self.driver("cuEventSynchronize", end)
        elapsed = ctypes.c_float()
        self.driver("cuEventElapsedTime", ctypes.byref(elapsed), start, end)
        return elapsed.value / calls

    def capture(self, run: Callable[[], object]) -> Callable[[], None]:
        """Return what launches everything that `run` puts into the queue as one CUDA graph."""
        driver, graph, ready = self.driver, ctypes.c_void_p(), ctypes.c_void_p()
        driver("cuStreamBeginCapture_v2", self.handle, RELAXED_CAPTURE)
        try:
            run()
        finally:
            driver("cuStreamEndCapture", self.handle, ctypes.byref(graph))
        try:
            driver("cuGraphInstantiateWithFlags", ctypes.byref(ready), graph, ctypes.c_uint64(0))
        finally:
            driver("cuGraphDestroy", graph)
        weakref.finalize(self, _release, driver, [("cuGraphExecDestroy", ready)])

        def launch() -> None:
            driver("cuGraphLaunch", ready, self.handle)

        return launch


class Buffer:
    """Memory on the GPU for one array."""

    def __init__(self, shape: Sequence[int], dtype: "np.dtype[np.generic]") -> None:
        self.driver = driver = _Driver()
        driver.use()
        self.shape, self.dtype = tuple(shape), dtype
        self.bytes = max(int(np.prod(shape)) * dtype.itemsize, 1)
        address = ctypes.c_uint64()
        driver("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(self.bytes))
        self.address = address.value
        weakref.finalize(self, _release, driver, [("cuMemFree_v2", address)])

    def write(self, array: Array, stream: Stream) -> None:
        """Copy an array to the GPU and wait for it."""
        held = np.ascontiguousarray(array, dtype=self.dtype)
        source, size = ctypes.c_void_p(held.ctypes.data), ctypes.c_size_t(held.nbytes)
        target = ctypes.c_uint64(self.address)
        self.driver("cuMemcpyHtoDAsync_v2", target, source, size, stream.handle)
        stream.synchronize()

    def read(self, stream: Stream) -> Array:
        """Return a copy of what is on the GPU, after everything in the queue is done."""
        array: Array = np.empty(self.shape, self.dtype)
        target, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        source = ctypes.c_uint64(self.address)
        self.driver("cuMemcpyDtoHAsync_v2", target, source, size, stream.handle)
        stream.synchronize()
        return array


class _Driver:
    """The driver's functions; each one's error becomes ours."""

    def __init__(self) -> None:
        library = _library()
        if library is None:
            raise RuntimeMissingError(f"There is no GPU here: {gpu_absent()}.")
        self.library = library
        self("cuInit", 0)
        self.device = ctypes.c_int()
        self("cuDeviceGet", ctypes.byref(self.device), 0)

    def __call__(self, function: str, *arguments: Vendor) -> None:
        if code := getattr(self.library, function)(*arguments):
            raise RunError(f"The GPU's driver failed in {function}: {_said(self.library, code)}.")

    def use(self) -> None:
        """Make the primary context, in which TensorRT computes, this thread's."""
        self("cuCtxSetCurrent", _primary_context(self.device.value))

    def attribute(self, number: int) -> int:
        """Return an attribute of the device."""
        value = ctypes.c_int()
        self("cuDeviceGetAttribute", ctypes.byref(value), number, self.device)
        return value.value


@lru_cache(maxsize=1)
def _library() -> Vendor:
    """Return the driver's library, None where there is none."""
    for name in LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


@lru_cache
def _primary_context(device: int) -> ctypes.c_void_p:
    """Return the device's primary context, which this process then keeps to its end."""
    context, library = ctypes.c_void_p(), _library()
    if code := library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
        raise RunError(f"The GPU cannot be used: {_said(library, code)}.")
    return context


def _release(driver: _Driver, calls: Sequence[tuple[str, Vendor]]) -> None:
    """Give resources back; at the end of the process the driver may have gone before us."""
    for function, handle in calls:
        getattr(driver.library, function)(handle)


def _said(library: Vendor, code: int) -> str:
    """Return what the driver says about an error."""
    text = ctypes.c_char_p()
    if library.cuGetErrorString(code, ctypes.byref(text)) or text.value is None:
        return f"error {code}"
    return f"{text.value.decode(errors='replace')} (error {code})"

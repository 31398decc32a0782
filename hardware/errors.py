"""Every error that `hardware` raises on purpose. Each message says what happened and what to do."""


class HardwareError(Exception):
    """Root of the errors of this package; a command line ends with exit code 2 on any of them."""


class StorageError(HardwareError):
    """A file cannot be read or written: disk full, folder read-only, or content that is damaged."""


class ModelError(HardwareError):
    """An ONNX file is corrupt, incomplete, or uses what cannot be handled."""


class CarveError(HardwareError):
    """A template cannot be cut to the widths asked for."""


class RuntimeMissingError(HardwareError):
    """A runtime is not installed, unknown, or has no device to run on."""


class BuildError(HardwareError):
    """A runtime refused to build an engine as asked."""


class RunError(HardwareError):
    """An engine failed, or returned something that is not a number, while it ran."""


class DeviceMismatchError(HardwareError):
    """Measurements of different devices, runtimes or settings were about to be mixed."""


class MissingLatencyError(HardwareError):
    """A latency was asked for that nobody has measured on this device."""


class BusyError(HardwareError):
    """Another process measures on this machine."""

"""What runs on the device: carve, build, time and compare. Never imports torch."""

__version__ = "0.1.0"

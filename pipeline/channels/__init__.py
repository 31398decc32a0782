"""Which channels of a network go together: label propagation on its ONNX graph."""

from pipeline.channels.finding import find_groups

__all__ = ["find_groups"]

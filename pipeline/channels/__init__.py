"""Which channels of a network go together: label propagation on its ONNX graph."""

from pipeline.channels.checking import check_carved
from pipeline.channels.finding import find_groups

__all__ = ["check_carved", "find_groups"]

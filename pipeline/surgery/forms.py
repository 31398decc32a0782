"""The two forms of a network: the user's class, and a graph that can be trained."""

from typing import Protocol, runtime_checkable

import onnx
from torch import nn

from hardware.graph.channel_map import ChannelMap, Keep


@runtime_checkable
class GraphBacked(Protocol):
    """A module that is an ONNX graph: carved and exported as such, never narrowed as a class."""

    def carved(self, channels: ChannelMap, keep: Keep) -> nn.Module:
        """Return a module of its own with only the channels that are kept."""

    def to_onnx(self, batch: int = 1) -> onnx.ModelProto:
        """Return the graph with the weights as they are now."""

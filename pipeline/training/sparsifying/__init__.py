"""Training that prepares a network for pruning, towards the widths of its plan."""

from collections.abc import Callable, Mapping

from torch import nn

from hardware.graph.channel_map import ChannelMap, Keep
from pipeline.recipe import SparsifySection
from pipeline.training.sparsifying.admm import Admm
from pipeline.training.sparsifying.scp import SoftMasks
from pipeline.training.sparsifying.targets import Penalty

METHODS: Mapping[str, Callable[[nn.Module, ChannelMap, Keep, SparsifySection], Penalty]] = {
    "admm": Admm,
    "scp": SoftMasks,
}

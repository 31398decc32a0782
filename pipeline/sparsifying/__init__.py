"""Training that prepares a network for pruning, towards the widths of its plan."""

from collections.abc import Callable, Mapping

from torch import nn

from hardware.channels import ChannelMap, Keep
from pipeline.recipe import SparsifySection
from pipeline.sparsifying.admm import Admm
from pipeline.sparsifying.scp import SoftMasks
from pipeline.sparsifying.targets import Sparsifier

METHODS: Mapping[str, Callable[[nn.Module, ChannelMap, Keep, SparsifySection], Sparsifier]] = {
    "admm": Admm,
    "scp": SoftMasks,
}

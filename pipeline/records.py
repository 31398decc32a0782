"""What the stages hand to one another."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hardware.graph.channel_map import ChannelMap
from hardware.records import Record

Array = npt.NDArray[np.float64]
Progress = Callable[[int, int, str], None]
"""Takes how much is done, of how much (0: not known), and a line of text."""
Stages = Callable[[str], AbstractContextManager[Progress]]
"""Names a stage and yields its progress callback."""
Values = Mapping[str, Mapping[int, float]]
"""What each width of each group is worth, higher = better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A torch network and what it takes to build it again."""

    module: nn.Module
    spec: str  # its name in the recipe: "timm:NAME", "path/to/file.py:factory", ...
    arguments: Mapping[str, Any]  # Any: a user's keyword arguments
    input_shape: tuple[int, ...]  # one image, (channels, height, width)

    def example(self, batch: int = 1) -> Tensor:
        """Return a fixed standard-normal input `(batch, channels, height, width)`."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, *self.input_shape, generator=generator)


@dataclass(frozen=True, slots=True, kw_only=True)
class Responses:
    """What one layer reads of a group on calibration images, in summary; float32 on the CPU.

    Where a channel owns several positions (a flatten, a convolution group), it responds with their
    mean; in `contributions` with their sum.
    """

    reader: str  # the layer, or "output of ..." where no layer that reads the group can be watched
    active: Tensor  # (width,) share of values above 0, 0..1
    magnitude: Tensor  # (width,) mean absolute value
    pooled: Tensor  # (images, width) mean of every image
    map_ranks: Tensor  # (width,) mean rank of the channel's maps, over the first images
    covariance: Tensor  # (width, width) over `rows` responses at random places
    contributions: Tensor  # (width, width) mean products of what channels add to outputs
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupView:
    """A pruning group as a criterion or a redundancy measure sees it; all tensors float32, CPU.

    One tensor per coupled layer. Its first axis is the channel of the group; where a channel owns
    several positions, they are laid out behind it.
    """

    name: str
    width: int
    filters: tuple[Tensor, ...]  # (width, in * kh * kw) of every layer that produces the group
    consumers: tuple[Tensor, ...]  # (width, everything that reads it) of the next layers
    norm_scales: tuple[Tensor, ...]  # (width,) batch-norm weights
    norm_shifts: tuple[Tensor, ...]  # (width,) batch-norm biases
    filter_gradients: tuple[Tensor, ...] = ()  # (batches, width, in * kh * kw), where asked for
    norm_scale_gradients: tuple[Tensor, ...] = ()  # (batches, width)
    norm_shift_gradients: tuple[Tensor, ...] = ()  # (batches, width)
    gate_gradients: tuple[Tensor, ...] = ()  # (batches, width) of a factor on what a reader reads
    biases: tuple[Tensor, ...] = ()  # (width,) of the layers that produce it, mean per channel
    responses: tuple[Responses, ...] = ()  # one per layer that reads the group, where asked for
    patterns: Tensor | None = None  # (width, values of an image) what filters look for


class Floor(Record):
    """The least width that redundancy allows a group, and what was measured to say so."""

    group: str
    width: int
    floor: int
    score: float  # of the measure; larger = more redundant
    null: float | None = None  # the score of random filters of this shape, where known
    detail: str = ""  # one line for the report, with the null where there is one


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """One filter that a redundancy loop over all groups takes from one of them."""

    group: str
    score: float  # redundancy of the group just before; 1 = no two filters alike
    width: int  # that the group has afterwards


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanningInputs:
    """What the planner trades: the widths that each group may have, and what each is worth."""

    channels: ChannelMap
    candidates: Mapping[str, tuple[int, ...]]  # per group ascending, the full width last
    values: Values
    floors: tuple[Floor, ...] = ()  # below which no candidate lies, but for 0
    saliency: Mapping[str, Tensor | Array] = field(default_factory=dict)  # (width,), higher = keep
    inapplicable: frozenset[str] = frozenset()  # groups in which the criterion is mere chance


class Choice(Record):
    """The width of one group in a plan, and why."""

    group: str
    full: int
    floor: int
    width: int
    reason: str  # in a few words: "redundancy floor", "saliency", "frozen: ...", ...
    detail: str = ""


class Plan(Record):
    """Which channels stay, what that costs, and how close to the best possible it is."""

    target_ms: float
    predicted_ms: float
    baseline_ms: float  # the full network, predicted the same way
    gap: float  # (bound - value) / |value| of the objective; 0 = proven best
    objective: str
    value: float
    solver_s: float
    measured: bool  # every latency the plan rests on was measured, none interpolated
    choices: tuple[Choice, ...]
    keep: Mapping[str, tuple[int, ...]]  # per group the channels that stay

    @property
    def widths(self) -> dict[str, int]:
        """Width per group."""
        return {choice.group: choice.width for choice in self.choices}


class Turn(Record):
    """One turn of planning and measuring: what a plan was predicted to take, and what it took."""

    predicted_ms: float  # before it was measured
    measured_ms: float
    target_ms: float
    value: float


class FittedPlan(Record):
    """A plan, and the measurements that it was fitted to."""

    plan: Plan
    floors: tuple[Floor, ...]
    loop: tuple[Turn, ...]  # empty where nothing was measured
    warning: str | None = None  # where the criterion chose by chance among many channels


class Form(Record):
    """In which of its two forms a network is pruned, and what each of them can lose."""

    taken: Literal["class", "graph"]
    reason: str  # why this one, in one line
    graph_share: float  # of the convolution output channels: what the graph can lose
    class_share: float | None = None  # what the user's class can lose; None: not tried, or no class


class EpochRecord(Record):
    """One epoch of training, as measured."""

    epoch: int
    learning_rate: float
    train_loss: float
    val_loss: float
    val_accuracy_pct: float
    seconds: float


class Verdict(Record):
    """What was promised and what was measured on the delivered engine."""

    passed: bool
    reasons: tuple[str, ...]  # one line per limit: what was measured, what was allowed
    runtime: str
    precision: str
    batch: int
    threads: int
    baseline_ms: float
    baseline_interval_ms: tuple[float, float]
    target_ms: float
    measured_ms: float
    measured_interval_ms: tuple[float, float]
    predicted_ms: float
    prediction_error_pct: float
    speedup: float
    speedup_interval: tuple[float, float]
    baseline_accuracy_pct: float
    accuracy_pct: float  # of the delivered engine on the test images
    torch_accuracy_pct: float
    test_images: int
    parity: float  # largest relative difference engine against torch
    proof_error: float  # largest relative difference removed against masked
    parameters: tuple[int, int]  # before, after
    macs: tuple[int, int]
    engine: str
    report: str
    form: Form | None = None  # None: written before there were two

"""ADMM: drive the filters that the plan has no room for towards zero, then hold them there.

Minimise the loss of the weights W, subject to each group having no more non-zero channels than the
plan gives it. With Z the nearest such weights to W + U and U what they are apart so far,

    W:  train with the penalty  rho / 2 * ||W - Z + U||^2
    Z:  projection of W + U: of every group the channels of largest L2 norm stay, the others are 0
    U:  U + W - Z

every `update_epochs`, and rho grows by `rho_growth` each time (multi-rho). With several `steps` the
widths fall in equal ratios (progressive). Each step ends with a hard projection of W, and the last
`masked_share` of its epochs train with what was taken away held at zero (masked retraining).

Reference:
    Zhang et al., "StructADMM", 2018, arXiv:1807.11091; Ye et al., "Progressive Weight Pruning of
    DNNs using ADMM", 2018. Status: the three steps, the filter-wise projection, rho = 0.001 with a
    factor of 1.3 every 20 of 200 epochs, and masked retraining are verified in public code of the
    authors, the progression in a review. Ours: a channel is its filters in all coupled layers
    together with its batch norms, because a batch norm undoes the size of a filter; the target is
    the plan's; one cosine of the learning rate over the whole stage in place of one per update;
    a progression in equal ratios without a search, and a larger rho for fewer epochs: W must come
    near Z between two updates, or U grows until it brings back what was to go.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hardware.graph.channel_map import ChannelMap, Keep
from pipeline.recipe import SparsifySection
from pipeline.training.sparsifying.targets import (
    Penalty,
    Target,
    channel_norms,
    emptied_parameters,
    largest,
    mask_of,
    parameters_of,
    targets_of,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Where in the stage an epoch is."""

    step: int  # from 0
    place: int  # epochs since the step began
    penalised: int  # epochs of the step under the penalty; the rest is masked

    @property
    def is_masked(self) -> bool:
        """Whether what was taken away is held at zero, and nothing is penalised."""
        return self.place >= self.penalised


def phase_of(epoch: int, section: SparsifySection) -> Phase:
    """Return the phase of an epoch, counted from 0."""
    steps = min(section.steps, max(section.epochs, 1))
    starts = [section.epochs * step // steps for step in range(steps + 1)]
    step = max(number for number in range(steps) if starts[number] <= epoch)
    length = starts[step + 1] - starts[step]
    masked = min(length - 1, round(length * section.masked_share))
    return Phase(step=step, place=epoch - starts[step], penalised=length - masked)


def project(
    tensors: Mapping[str, Tensor], targets: Mapping[Target, int], emptied: tuple[str, ...]
) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """Return the nearest tensors that have no more channels than allowed, and which those are.

    Args:
        tensors: by parameter; not changed.
        targets: how many channels each group may have.
        emptied: parameters that become zero.
    """
    kept = {
        target.group: largest(channel_norms(tensors, target.made, target.full), width)
        for target, width in targets.items()
    }
    found = dict(tensors)
    for target in targets:
        for part in target.made:
            tensor = found[part.parameter]
            found[part.parameter] = tensor * mask_of(tensor, part, kept[target.group])
    return found | {name: torch.zeros_like(tensors[name]) for name in emptied}, kept


class Admm(Penalty):
    """The state of the method: Z, U, rho, and what is gone for good."""

    def __init__(
        self, module: nn.Module, channels: ChannelMap, keep: Keep, section: SparsifySection
    ) -> None:
        self.section, self.plan = section, keep
        self.parameters = parameters_of(module)
        self.targets = targets_of(self.parameters, channels, keep)
        self.emptied = emptied_parameters(self.parameters, channels, keep)
        self.rho, self.is_penalising = section.rho, False
        made = [part.parameter for target in self.targets for part in target.made]
        self.names = tuple(dict.fromkeys((*made, *self.emptied)))
        self.reach = self._reach()
        self.near: dict[str, Tensor] = {}
        self.dual: dict[str, Tensor] = {}
        self.cut_steps = 0  # whose widths the weights have been cut to
        self.kept: dict[str, tuple[int, ...]] = {}
        self.masks: dict[str, Tensor] = {}

    def begin(self, epoch: int) -> None:
        """Cut to the last step's widths, start a step, or update Z and U, as the epoch demands."""
        phase = phase_of(epoch, self.section)
        due = phase.step + phase.is_masked
        if self.cut_steps < due:
            self._cut(due)
        self.is_penalising = not phase.is_masked
        if phase.place == 0:
            self.rho = self.section.rho
            self.dual = {name: torch.zeros_like(self.parameters[name]) for name in self.names}
            self.near = self._projected(phase.step + 1)
        elif self.is_penalising and phase.place % self.section.update_epochs == 0:
            self.near = self._projected(phase.step + 1)
            for name, dual in self.dual.items():
                dual += (self.parameters[name].detach() - self.near[name]) * self.reach[name]
            self.rho *= self.section.rho_growth

    def loss(self) -> Tensor | None:
        """Return rho / 2 times the squared distance to Z - U."""
        if not self.is_penalising or not self.names:
            return None
        distances = [
            (self.reach[name] * (self.parameters[name] - self.near[name] + self.dual[name]))
            .square()
            .sum()
            for name in self.names
        ]
        return self.rho / 2 * torch.stack(distances).sum()

    @torch.no_grad()
    def after_step(self) -> None:
        """Hold what is gone at zero."""
        for name, mask in self.masks.items():
            self.parameters[name].mul_(mask)

    def finish(self) -> dict[str, tuple[int, ...]]:
        """Cut to the plan's widths, and return the channels that stay."""
        if self.cut_steps < self._steps:
            self._cut(self._steps)
        return {**self.plan, **self.kept}

    def facts(self) -> dict[str, object]:
        """Return the widths that are trained towards."""
        return {"plan": {name: len(units) for name, units in self.plan.items()}}

    def state(self) -> dict[str, Tensor]:
        """Return Z, U, rho and the channels that are left."""
        return {
            "rho": torch.tensor(self.rho, dtype=torch.float64),
            "cut_steps": torch.tensor(self.cut_steps),
            **{f"near.{name}": value for name, value in self.near.items()},
            **{f"dual.{name}": value for name, value in self.dual.items()},
            **{f"kept.{name}": torch.tensor(units) for name, units in self.kept.items()},
        }

    def resume(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from `state`."""
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "rho":
                self.rho = float(value)
            elif kind == "cut_steps":
                self.cut_steps = int(value)
            elif kind == "kept":
                self.kept[rest] = tuple(value.tolist())
            else:
                held = self.near if kind == "near" else self.dual
                held[rest] = torch.empty_like(self.parameters[rest]).copy_(value).detach()
        self.masks = self._masks()

    @property
    def _steps(self) -> int:
        return min(self.section.steps, max(self.section.epochs, 1))

    def _widths(self, step: int) -> dict[Target, int]:
        return {target: target.width_at(step, self._steps) for target in self.targets}

    def _summed(self) -> dict[str, Tensor]:
        """Return W + U."""
        return {
            name: self.parameters[name].detach() + self.dual.get(name, 0.0) for name in self.names
        }

    def _projected(self, step: int) -> dict[str, Tensor]:
        """Return Z: branches are emptied from the last step on only."""
        emptied = self.emptied if step == self._steps else ()
        return project(self._summed(), self._widths(step), emptied)[0]

    def _cut(self, step: int) -> None:
        """Set to zero, for good, what has no room at a step's widths."""
        self.kept = project(self._summed(), self._widths(step), ())[1]
        self.cut_steps, self.dual, self.near = step, {}, {}
        self.masks = self._masks()
        self.after_step()

    def _masks(self) -> dict[str, Tensor]:
        """Return a factor per parameter that makes or reads what is gone."""
        found: dict[str, Tensor] = {}
        for target in self.targets if self.kept else ():
            for part in (*target.made, *target.read):
                mask = mask_of(self.parameters[part.parameter], part, self.kept[target.group])
                found[part.parameter] = mask * found.get(part.parameter, 1.0)
        if self.cut_steps == self._steps:
            found |= {name: torch.zeros_like(self.parameters[name]) for name in self.emptied}
        return found

    def _reach(self) -> dict[str, Tensor]:
        """Return 1 where a parameter belongs to a target, 0 where the penalty is to leave it."""
        found = {name: torch.zeros_like(self.parameters[name]) for name in self.names}
        for target in self.targets:
            for part in target.made:
                tensor = found[part.parameter]
                found[part.parameter] = (tensor + 1 - mask_of(tensor, part, ())).clamp(max=1)
        return found | {name: torch.ones_like(self.parameters[name]) for name in self.emptied}

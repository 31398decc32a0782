"""Soft channel pruning: let batch norms learn to silence the channels the plan has no room for.

Behind a batch norm a channel is about N(beta, gamma^2), so a ReLU silences it with probability

    p = Phi(-beta / |gamma|)

Every channel of a group that is to become narrower is multiplied by a soft mask

    m = sigmoid(k * (tau - p))

where tau lies between the channels that the plan has room for and the others, by their p, and k
grows: in the end m is nearly 1 or 0. The mask is differentiable in beta and gamma, so the loss
decides which channels pass; `pressure` times the mean of 1 - p over the others pushes those out.

Reference:
    Kang and Han, "Operation-Aware Soft Channel Pruning using Differentiable Masks" (SCP), ICML
    2020, arXiv:2007.03938. Status: that batch norm and ReLU are judged together by the probability
    of deactivation, and soft differentiable masks learned with the weights, are in the abstract;
    p, the mask and its growing slope are reconstructions. Ours: tau from the plan's widths, the
    pressure on the others alone, one mask for all batch norms of coupled layers (p is their mean),
    emptied branches fading in a straight line, and the fine-tuning that follows.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hardware.graph.channel_map import ChannelMap, Keep, ParameterSlice
from pipeline.recipe import SparsifySection
from pipeline.training.sparsifying.targets import (
    Penalty,
    Target,
    emptied_parameters,
    largest,
    parameters_of,
    targets_of,
)

LEAST_SCALE = 1e-4  # of |gamma|: below it a channel is its shift


def silenced(scale: Tensor, shift: Tensor) -> Tensor:
    """Return how likely a ReLU behind a batch norm gives 0: Phi(-shift / |scale|), `(channels,)`.

    Differentiable in both.
    """
    found: Tensor = torch.special.ndtr(-shift / scale.abs().clamp_min(LEAST_SCALE))
    return found


def soft_mask(chances: Tensor, width: int, slope: float) -> Tensor:
    """Return the mask `(channels,)` that separates the `width` least likely silenced ones."""
    ordered = chances.detach().sort().values
    between = (ordered[width - 1] + ordered[width]) / 2
    return torch.sigmoid(slope * (between - chances))


class SoftMasks(Penalty):
    """The masks of a module, at work from the first run to `finish`."""

    def __init__(
        self, module: nn.Module, channels: ChannelMap, keep: Keep, section: SparsifySection
    ) -> None:
        self.section, self.plan = section, keep
        parameters = parameters_of(module)
        self.norms = _norms_of(module)
        found = targets_of(parameters, channels, keep)
        self.layers = {target: self._layers(target) for target in found}
        self.targets = tuple(target for target in found if self.layers[target])
        emptied = {n.rpartition(".")[0] for n in emptied_parameters(parameters, channels, keep)}
        inside = {
            part.parameter.rpartition(".")[0]
            for group in channels.groups
            if keep.get(group.name) == ()
            for part in group.slices
            if part.role == "norm"
        }
        self.fading = tuple(n for n in self.norms if n in emptied and n not in inside)
        self.slope, self.fade = section.sharpness[0], 1.0
        self.masks: dict[str, Tensor] = {}  # of this run, by group
        self.handles = [module.register_forward_pre_hook(self._refresh)]
        for name, norm in self.norms.items():
            if name in self.fading or any(name in self.layers[t] for t in self.targets):
                self.handles.append(norm.register_forward_hook(self._masking(name)))

    def begin(self, epoch: int) -> None:
        """Make the masks steeper, and emptied branches fainter: at the last epoch they are gone."""
        share = epoch / max(self.section.epochs - 1, 1)
        low, high = self.section.sharpness
        self.slope = low * (high / low) ** share
        self.fade = 1 - (epoch + 1) / self.section.epochs

    def loss(self) -> Tensor | None:
        """Return the pressure on the channels that the plan has no room for."""
        chances = {target: self.chances(target) for target in self.targets}
        passing = [
            (1 - chance)[torch.argsort(chance.detach(), stable=True)[target.width :]]
            for target, chance in chances.items()
        ]
        return self.section.pressure * torch.cat(passing).mean() if passing else None

    def finish(self) -> dict[str, tuple[int, ...]]:
        """Put the masks into the batch norms, and return the channels that stay."""
        with torch.no_grad():
            kept = {t.group: largest(-self.chances(t), t.width) for t in self.targets}
            self._refresh()
            factors = {name: self._factor(name) for name in self._hooked()}
            for name, factor in factors.items():
                for values in (self.norms[name].weight, self.norms[name].bias):
                    values.mul_(factor)
        for handle in self.handles:
            handle.remove()
        return {**self.plan, **kept}

    def facts(self) -> dict[str, object]:
        """Return the widths that the masks leave."""
        return {"plan": {name: len(units) for name, units in self.plan.items()}}

    def state(self) -> dict[str, Tensor]:
        """Return slope and fading."""
        return {
            name: torch.tensor(value, dtype=torch.float64)
            for name, value in (("slope", self.slope), ("fade", self.fade))
        }

    def resume(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from `state`."""
        self.slope, self.fade = float(tensors["slope"]), float(tensors["fade"])

    def chances(self, target: Target) -> Tensor:
        """Return how likely each channel of a group is silenced, the mean over its batch norms."""
        total = torch.zeros((), device=next(iter(self.norms.values())).weight.device)
        for name, part in self.layers[target].items():
            norm = self.norms[name]
            chance = silenced(norm.weight, norm.bias)
            units = torch.tensor(part.units, device=chance.device)
            owned = units >= 0
            sums = chance.new_zeros(target.full).index_add(0, units[owned], chance[owned])
            counts = torch.bincount(units[owned], minlength=target.full).clamp_min(1)
            total = total + sums / counts
        return total / len(self.layers[target])

    def _layers(self, target: Target) -> dict[str, ParameterSlice]:
        """Return the batch norms of a group, each with what its channels belong to."""
        return {
            name: part
            for part in target.made
            for name, _, last in [part.parameter.rpartition(".")]
            if part.role == "norm" and last == "weight" and name in self.norms
        }

    def _hooked(self) -> Sequence[str]:
        masked = [name for target in self.targets for name in self.layers[target]]
        return tuple(dict.fromkeys((*masked, *self.fading)))

    def _refresh(self, *_: object) -> None:
        """Take the masks anew: called before every run of the network."""
        self.masks = {
            target.group: soft_mask(self.chances(target), target.width, self.slope)
            for target in self.targets
        }

    def _factor(self, name: str) -> Tensor:
        """Return what the channels of a batch norm are multiplied by, `(channels,)`."""
        factor = torch.ones_like(self.norms[name].weight)
        if name in self.fading:
            factor = factor * self.fade
        for target in self.targets:
            if name in self.layers[target]:
                units = torch.tensor(self.layers[target][name].units, device=factor.device)
                mask = self.masks[target.group][units.clamp_min(0)]
                factor = factor * torch.where(units >= 0, mask, 1.0)
        return factor

    def _masking(self, name: str) -> Callable[[nn.Module, object, Tensor], Tensor]:
        def multiply(_: nn.Module, __: object, output: Tensor) -> Tensor:
            factor = self._factor(name).to(output.dtype)
            return output * factor.reshape(-1, *[1] * (output.ndim - 2))

        return multiply


def _norms_of(module: nn.Module) -> Mapping[str, _BatchNorm]:
    """Return the batch norms with a scale and a shift, by name."""
    return {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, _BatchNorm) and part.affine
    }

"""Pruning groups as criteria and redundancy measures see them: weights, channel by channel."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from hardware.graph.channel_map import ChannelMap, Group, ParameterSlice
from pipeline.errors import PipelineError
from pipeline.evidence.needs import GRADIENTS, PATTERNS, RESPONSES
from pipeline.evidence.patterns import collect_patterns
from pipeline.evidence.responses import collect_responses
from pipeline.processor import laid_out, memory_format
from pipeline.records import GroupView, Network, Responses
from pipeline.tasks.evaluate import evaluating
from pipeline.tasks.losses import classification_loss

FILTER_ROLES = ("filter", "depthwise")


def group_views(
    network: Network,
    channels: ChannelMap,
    batches: Sequence[tuple[Tensor, Tensor]] | None = None,
    needs: Collection[str] = (GRADIENTS,),
) -> tuple[GroupView, ...]:
    """Return a view of every prunable group: its filters, its readers, its batch norms.

    Depthwise filters count among `filters`: a channel runs through them, so they go with it. Where
    a channel of the group owns several positions of an axis, filters and consumers lay them out
    behind the channel (padded with zeros where channels own unequally many), and a batch norm
    becomes one tensor per position.

    Args:
        network: the trained network; neither its mode nor its gradients change.
        channels: which slices of which parameters go together.
        batches: pairs of images `(batch, channels, height, width)` and labels `(batch,)`; with
            them the views hold what `needs` names.
        needs: what to collect on the images. `gradients`: of the mean cross entropy of every
            batch, taken in eval mode; memory: one copy of the viewed parameters per batch.
            `responses`: what the layers that read a group receive; see `collect_responses`.
            `patterns`: what filters look for, without images; see `collect_patterns`.

    Returns:
        One view per prunable group, in the order of the channel map; float32 on the CPU.

    Raises:
        PipelineError: the map belongs to another network, the network returns no logits, or its
            loss is not a number.
    """
    tensors = _tensors_of(network.module)
    _check_map(channels, tensors)
    # Constants of the graph that the network does not hold were never learned: nothing to see.
    used = sorted(
        {s.parameter for g in channels.prunable for s in g.slices if s.parameter in tensors}
    )
    wanted = set(needs) if batches else set()
    gradients = _gradients(network.module, used, batches or ()) if GRADIENTS in wanted else {}
    responses = (
        collect_responses(network.module, channels, batches or ()) if RESPONSES in wanted else {}
    )
    patterns: Mapping[str, Tensor] = {}
    if PATTERNS in needs:
        patterns = collect_patterns(network.module, channels, network.input_shape)
    return tuple(
        replace(
            _view(group, tensors, gradients, responses.get(group.name, ())),
            patterns=patterns.get(group.name),
        )
        for group in channels.prunable
    )


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(module.named_buffers(remove_duplicate=False))}


def _check_map(channels: ChannelMap, tensors: Mapping[str, Tensor]) -> None:
    """Raise where a slice does not fit the tensor that it names."""
    slices = [s for group in channels.prunable for s in group.slices]
    if slices and not any(s.parameter in tensors for s in slices):
        raise PipelineError(
            f"The channel map names {slices[0].parameter} and {len(slices) - 1} more slices, and "
            "the network has none of them. The map is another network's: analyse this one again."
        )
    for s in slices:
        if s.parameter not in tensors:
            continue
        shape = tuple(tensors[s.parameter].shape)
        if s.axis >= len(shape) or shape[s.axis] != len(s.units):
            raise PipelineError(
                f"{s.parameter} has shape {shape}, but the channel map has {len(s.units)} "
                f"positions along its axis {s.axis}. The map is another network's: analyse this "
                "one again."
            )


def _view(
    group: Group,
    tensors: Mapping[str, Tensor],
    gradients: Mapping[str, Sequence[Tensor]],
    responses: tuple[Responses, ...],
) -> GroupView:
    known = [s for s in group.slices if s.parameter in tensors]
    filters = [s for s in known if s.role in FILTER_ROLES]
    consumers = [s for s in known if s.role == "input"]
    norms = [s for s in known if s.role == "norm"]
    scales = [s for s in norms if s.parameter.rpartition(".")[2] == "weight"]
    shifts = [s for s in norms if s.parameter.rpartition(".")[2] == "bias"]

    def rows(slices: Sequence[ParameterSlice]) -> tuple[Tensor, ...]:
        return tuple(_by_channel(tensors[s.parameter], s, group.width) for s in slices)

    def row_gradients(slices: Sequence[ParameterSlice]) -> tuple[Tensor, ...]:
        return tuple(
            torch.stack([_by_channel(g, s, group.width) for g in gradients[s.parameter]])
            for s in slices
            if gradients
        )

    def gate_gradient(part: ParameterSlice) -> Tensor:
        """Return the gradient by a factor on what is read: a factor on the columns that read it."""
        changes = [tensors[part.parameter].detach() * g for g in gradients[part.parameter]]
        return torch.stack([_by_channel(c, part, group.width).sum(dim=1) for c in changes])

    return GroupView(
        name=group.name,
        width=group.width,
        filters=rows(filters),
        consumers=rows(consumers),
        norm_scales=_split_positions(rows(scales)),
        norm_shifts=_split_positions(rows(shifts)),
        filter_gradients=row_gradients(filters),
        norm_scale_gradients=_split_positions(row_gradients(scales)),
        norm_shift_gradients=_split_positions(row_gradients(shifts)),
        gate_gradients=tuple(gate_gradient(s) for s in consumers if gradients),
        biases=tuple(row.mean(dim=1) for row in rows([s for s in known if s.role == "bias"])),
        responses=responses,
    )


def _by_channel(tensor: Tensor, part: ParameterSlice, width: int) -> Tensor:
    """Return a group's slice of a tensor, `(width, positions per channel * everything else)`."""
    flat = tensor.detach().to("cpu", torch.float32).movedim(part.axis, 0)
    flat = flat.reshape(len(part.units), -1)
    owners = torch.tensor(part.units)
    counts = torch.bincount(owners[owners >= 0], minlength=width)
    owned = flat[owners.argsort(stable=True)[len(owners) - int(counts.sum()) :]]
    if bool((counts == counts[0]).all()):
        return owned.reshape(width, -1)
    rows = [positions.reshape(-1) for positions in torch.split(owned, counts.tolist())]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _split_positions(rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return one tensor `(..., width)` per position that a channel owns."""
    return tuple(column for row in rows for column in row.unbind(dim=-1))


def _gradients(
    module: nn.Module, names: Sequence[str], batches: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, list[Tensor]]:
    """Return per parameter its gradient on every batch; `.grad` of the module stays untouched."""
    tensors = _tensors_of(module)
    learned = [name for name in names if isinstance(tensors[name], nn.Parameter)]
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    layout = memory_format(module, next(iter(tensors.values())).device)
    with evaluating(module), _gradients_allowed(module):
        wanted = [tensors[name].requires_grad_(True) for name in learned]
        for images, labels in batches:
            loss = classification_loss(module(laid_out(images, layout)), labels, "mean")
            if not torch.isfinite(loss):
                raise PipelineError(
                    f"The loss on calibration images is {loss.item()}, so it has no gradient. "
                    "Check the weights, and data.mean and data.std in the recipe."
                )
            grads = torch.autograd.grad(loss, wanted, allow_unused=True)
            for name, tensor, grad in zip(learned, wanted, grads, strict=True):
                found[name].append(torch.zeros_like(tensor) if grad is None else grad)
            for name in set(names) - set(learned):
                found[name].append(torch.zeros_like(tensors[name]))
    return found


@contextmanager
def _gradients_allowed(module: nn.Module) -> Iterator[None]:
    """Let the body switch gradients on; every `requires_grad` is put back in the end."""
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

"""Torch surgery on one module: cut parameters along their axes and correct what layers say."""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode

from hardware.graph.channel_map import Branch, ChannelMap, Keep
from pipeline.errors import SurgeryError, first_line

Cuts = Mapping[str, Mapping[int, tuple[int, ...]]]
"""Per parameter and axis the positions that stay, ascending."""


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer, tied ones under each of their names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def emptied_branches(channels: ChannelMap, keep: Keep) -> tuple[Branch, ...]:
    """Return the branches that `keep` empties, after checking that `keep` makes sense.

    Raises:
        SurgeryError: channels out of range or not ascending, a frozen group that is cut, or a group
            at width 0 whose branch is not emptied as a whole.
    """
    empty = {name for name, units in keep.items() if not units}
    branches = tuple(b for b in channels.branches if b.groups and empty.issuperset(b.groups))
    covered = {name for branch in branches for name in branch.groups}
    if stray := sorted(empty - covered):
        raise SurgeryError(
            f"Group {stray[0]} cannot have width 0: only all groups of a residual branch together "
            f"can. Branches: {', '.join(b.name for b in channels.branches[:8]) or 'none'}."
        )
    for name, units in keep.items():
        group = channels.group(name)
        if any(b <= a for a, b in itertools.pairwise(units)) or not all(
            0 <= unit < group.width for unit in units
        ):
            raise SurgeryError(
                f"The channels to keep of group {name} must ascend within 0..{group.width - 1}; "
                f"got {units}."
            )
        if group.frozen is not None and 0 < len(units) < group.width:
            raise SurgeryError(
                f"Group {name} may not be pruned: {group.frozen}. Keep all {group.width} channels."
            )
    return branches


def find_cuts(channels: ChannelMap, keep: Keep) -> Cuts:
    """Return what stays of every parameter that loses positions.

    A parameter may be cut along several axes, and along one axis by several groups (a
    concatenation). Groups that `keep` empties cut nothing: their layers are replaced as a whole.
    """
    removed: dict[str, dict[int, set[int]]] = {}
    lengths: dict[tuple[str, int], int] = {}
    for name, units in keep.items():
        if not units:
            continue
        kept = set(units)
        for part in channels.group(name).slices:
            gone = {p for p, unit in enumerate(part.units) if unit >= 0 and unit not in kept}
            removed.setdefault(part.parameter, {}).setdefault(part.axis, set()).update(gone)
            lengths[part.parameter, part.axis] = len(part.units)
    return {
        parameter: {
            axis: tuple(p for p in range(lengths[parameter, axis]) if p not in gone)
            for axis, gone in axes.items()
            if gone
        }
        for parameter, axes in removed.items()
        if any(axes.values())
    }


def narrow(module: nn.Module, cuts: Cuts) -> None:
    """Cut the parameters and buffers of a module in place; layers say their new sizes.

    Parameters stay the same objects, so tied ones stay tied; dtype, device, `requires_grad` and
    memory format are kept.

    Raises:
        SurgeryError: a cut does not fit its parameter, or a layer cannot have the new size.
    """
    tensors = named_tensors(module)
    known = [name for name in cuts if name in tensors]
    if cuts and not known:
        raise SurgeryError(
            f"The channel map names {next(iter(cuts))!r}, and nothing that is in this "
            f"{type(module).__name__}: it was made for another network."
        )
    merged: dict[int, dict[int, set[int]]] = {}  # tied parameters: what every name keeps
    for name in known:
        for axis, kept in cuts[name].items():
            tensor = tensors[name]
            if axis >= tensor.ndim or (kept and kept[-1] >= tensor.shape[axis]):
                raise SurgeryError(
                    f"{name} has shape {tuple(tensor.shape)}; the channel map keeps position "
                    f"{kept[-1]} of its axis {axis}: it was made for another network."
                )
            axes = merged.setdefault(id(tensor), {})
            axes[axis] = axes.get(axis, set(kept)) & set(kept)
    parts = {
        name: _parts_left(name, layer, merged[id(layer.weight)][0])
        for name, layer in module.named_modules()
        if _parts(layer) > 1 and 0 in merged.get(id(layer.weight), {})
    }
    for tensor in {id(tensor): tensor for tensor in tensors.values()}.values():
        if id(tensor) in merged:
            _cut(tensor, merged[id(tensor)])
    fit_attributes(module, parts)


def _cut(tensor: Tensor, axes: Mapping[int, set[int]]) -> None:
    data = tensor.data
    is_channels_last = (
        data.ndim == 4
        and not data.is_contiguous()
        and data.is_contiguous(memory_format=torch.channels_last)
    )
    for axis, kept in axes.items():
        data = data.index_select(axis, torch.tensor(sorted(kept), device=data.device))
    tensor.grad = None
    tensor.data = data.contiguous(memory_format=torch.channels_last) if is_channels_last else data


def parts_of(module: nn.Module) -> dict[str, int]:
    """Return the conv_groups of convolutions and the groups of group norms, by path."""
    return {
        name: _parts(layer)
        for name, layer in module.named_modules()
        if isinstance(layer, (_ConvNd, nn.GroupNorm))
    }


def _parts(layer: nn.Module) -> int:
    """Return into how many parts a layer divides its channels; 1 where it has no weight."""
    if isinstance(layer, _ConvNd):
        return int(layer.groups)
    if isinstance(layer, nn.GroupNorm) and layer.affine:
        return int(layer.num_groups)
    return 1


def _parts_left(name: str, layer: nn.Module, kept: set[int]) -> int:
    """Return how many parts of a divided layer still have channels; all must have equally many.

    A depthwise convolution loses parts as a whole; elsewhere every part may become narrower.
    """
    assert isinstance(layer.weight, Tensor)
    size = layer.weight.shape[0] // _parts(layer)
    left = Counter(position // size for position in kept)
    if len(set(left.values())) > 1:
        raise SurgeryError(
            f"{name} ({type(layer).__name__}): its {_parts(layer)} groups would keep different "
            f"numbers of channels, from {min(left.values())} to {max(left.values())}."
        )
    return len(left)


def fit_attributes(module: nn.Module, parts: Mapping[str, int]) -> None:
    """Make every layer inside a module say the sizes that its parameters have.

    Args:
        module: changed in place.
        parts: conv_groups or norm groups by path, of the layers where they change.

    Raises:
        SurgeryError: the sizes contradict one another.
    """
    for name, number in parts.items():
        layer = module.get_submodule(name)
        setattr(layer, "num_groups" if isinstance(layer, nn.GroupNorm) else "groups", number)
    for name, layer in module.named_modules():
        for kinds, fit in FITS:
            if isinstance(layer, kinds):
                try:
                    fit(layer)
                except ValueError as error:
                    raise SurgeryError(f"{name} ({type(layer).__name__}): {error}") from error
                break


def _fit_conv(layer: _ConvNd) -> None:
    own, other = layer.weight.shape[:2]
    _divide(own, layer.groups)
    if isinstance(layer, _ConvTransposeNd):
        layer.in_channels, layer.out_channels = own, other * layer.groups
    else:
        layer.in_channels, layer.out_channels = other * layer.groups, own


def _divide(channels: int, parts: int) -> None:
    if channels % parts:
        raise ValueError(f"{channels} channels do not divide into {parts} groups")


def _fit_linear(layer: nn.Linear) -> None:
    layer.out_features, layer.in_features = layer.weight.shape


def _fit_norm(layer: _NormBase) -> None:
    for tensor in (layer.weight, layer.running_mean):
        if tensor is not None:
            layer.num_features = tensor.shape[0]


def _fit_group_norm(layer: nn.GroupNorm) -> None:
    if layer.affine:
        layer.num_channels = layer.weight.shape[0]
        _divide(layer.num_channels, layer.num_groups)


def _fit_layer_norm(layer: nn.LayerNorm) -> None:
    if layer.elementwise_affine:
        layer.normalized_shape = tuple(layer.weight.shape)


def _fit_prelu(layer: nn.PReLU) -> None:
    layer.num_parameters = layer.weight.shape[0]


# Any: each function takes the layer type beside it.
FITS: tuple[tuple[type[nn.Module], Callable[[Any], None]], ...] = (
    (_ConvNd, _fit_conv),
    (nn.Linear, _fit_linear),
    (_NormBase, _fit_norm),
    (nn.GroupNorm, _fit_group_norm),
    (nn.LayerNorm, _fit_layer_norm),
    (nn.PReLU, _fit_prelu),
)


def run_once(module: nn.Module, example: Tensor) -> object:
    """Return the output of a narrowed module, and let layers without parameters learn their size.

    Raises:
        SurgeryError: its `forward` fails; the message names the layer and its input shapes.
    """
    running: list[tuple[str, nn.Module, object]] = []

    def enter(name: str) -> Callable[[nn.Module, tuple[object, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[object, ...]) -> None:
            running.append((name, layer, inputs))
            if (
                isinstance(layer, _InstanceNorm)
                and layer.weight is None
                and isinstance(inputs[0], Tensor)
            ):
                layer.num_features = inputs[0].shape[1]

        return hook

    def leave(layer: nn.Module, inputs: object, outputs: object) -> None:
        running.pop()

    handles = []
    for name, layer in module.named_modules():
        handles += [
            layer.register_forward_pre_hook(enter(name)),
            layer.register_forward_hook(leave),
        ]
    try:
        with torch.no_grad(), SizesOnly() if example.is_meta else nullcontext():
            output: object = module(example)
    except Exception as error:  # the user's forward may raise anything
        name, layer, inputs = running[-1] if running else ("", module, (example,))
        raise SurgeryError(
            f"{name or 'The network'} ({type(layer).__name__}) refuses its input "
            f"{shapes_of(inputs)} after surgery: {first_line(error)}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return output


def shapes_of(values: object) -> str:
    """Return the shapes of the tensors in nested tuples, in words."""
    if isinstance(values, Tensor):
        return str(tuple(values.shape))
    if isinstance(values, (tuple, list)):
        return ", ".join(shapes_of(value) for value in values)
    return type(values).__name__


class SizesOnly(TorchFunctionMode):
    """Batch norms that compute nothing: to be entered while a network runs on the meta device.

    There torch takes a batch norm apart into a dozen operations in Python, which is half of the
    time of a run. Its output has the size of its input; only its parameters must fit.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],  # Any: every function of torch comes by
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run a function of torch, other than a batch norm."""
        if func is functional.batch_norm:
            return _sized(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _sized(
    images: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: object,
    **__: object,
) -> Tensor:
    """Return the output of a batch norm on the meta device."""
    for tensor in (running_mean, running_var, weight, bias):
        if tensor is not None and tensor.numel() != images.shape[1]:
            raise RuntimeError(f"a batch norm of {tensor.numel()} channels reads {images.shape[1]}")
    return torch.empty_like(images)

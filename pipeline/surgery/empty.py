"""Empty residual branches: layers become zeros of the right shape, so that `forward` still runs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from hardware.graph.channel_map import Branch
from hardware.records import Record
from pipeline.errors import SurgeryError
from pipeline.surgery.narrow import named_tensors, run_once

# Zero in these would divide by zero: variances, and the direction of a normalised weight.
UNTOUCHED = ("running_var", "num_batches_tracked", "weight_v", "weight.original1")


class ZerosRule(Record):
    """How the shape of the zeros follows from the input's shape.

    like: the same shape. linear: `channels` on the last axis. conv and transposed: the size that
    such a convolution gives. ceil: the input's size over the stride, rounded up (padding "same").
    """

    kind: Literal["like", "linear", "conv", "transposed", "ceil"]
    branch: str
    channels: int = 0
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the zeros for an input of that shape."""
        if self.kind == "like":
            return shape
        if self.kind == "linear":
            return (*shape[:-1], self.channels)
        sizes = shape[-len(self.strides) :]
        lead = shape[: -len(self.strides) - 1]
        return (*lead, self.channels, *(self._size(axis, size) for axis, size in enumerate(sizes)))

    def _size(self, axis: int, size: int) -> int:
        stride = self.strides[axis]
        if self.kind == "ceil":
            return -(-size // stride)
        reach = self.dilations[axis] * (self.kernel[axis] - 1)
        if self.kind == "conv":
            return (size + 2 * self.padding[axis] - reach - 1) // stride + 1
        return (size - 1) * stride - 2 * self.padding[axis] + reach + self.output_padding[axis] + 1


class Zeros(nn.Module):
    """Takes the place of a layer in an emptied branch; has no parameters, returns zeros.

    Fresh zeros on every call: what follows may write into them (`out += shortcut`).
    """

    def __init__(self, rule: ZerosRule) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, inputs: Tensor) -> Tensor:
        """Return zeros of the shape that the layer's output had."""
        shape = self.rule.shape(tuple(inputs.shape))
        return torch.zeros(shape, dtype=inputs.dtype, device=inputs.device)

    def extra_repr(self) -> str:
        """Return what the layer was, for `print(network)`."""
        return f"{self.rule.kind}, channels={self.rule.channels}, branch={self.rule.branch}"


NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)  # some hold their activation as a child
Shapes = tuple[tuple[int, ...], tuple[int, ...]]  # of the input, of the output


def observe(
    module: nn.Module, branches: Iterable[Branch], example: Tensor
) -> dict[str, list[Shapes]]:
    """Return the input and output shapes of every call of the layers that own the branches."""
    seen: dict[str, list[Shapes]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def hook(_: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            if len(inputs) != 1 or not isinstance(output, Tensor):
                return
            if isinstance(inputs[0], Tensor):
                seen.setdefault(name, []).append((tuple(inputs[0].shape), tuple(output.shape)))

        return hook

    owners = _owners(module, branches)
    handles = [module.get_submodule(name).register_forward_hook(watch(name)) for name in owners]
    try:
        if owners:
            run_once(module, example)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def empty(
    module: nn.Module, branches: Iterable[Branch], seen: Mapping[str, list[Shapes]]
) -> tuple[str, ...]:
    """Replace the layers of dead branches by zeros; return the parameters that are zeroed instead.

    A parameter that no single layer owns (a layer scale held by the block) stays, at zero, and is
    not trained any more.

    Args:
        module: changed in place; what is not emptied is narrowed already.
        branches: to be emptied.
        seen: what `observe` saw before the module was narrowed.

    Raises:
        SurgeryError: a convolution gives an output size that no rule explains.
    """
    branches = tuple(branches)
    replaced: dict[str, nn.Module] = {}
    for owner, branch in _owners(module, branches).items():
        rule = _rule(owner, module.get_submodule(owner), branch, seen.get(owner, []))
        if rule is not None:
            replaced[owner] = Zeros(rule)
    tensors = named_tensors(module)
    zeroed = tuple(
        parameter
        for parameter in dict.fromkeys(name for branch in branches for name in branch.parameters)
        if parameter in tensors
        and not parameter.endswith(UNTOUCHED)
        and _owner(module, parameter) not in replaced
    )
    set_zero(module, zeroed)
    replace_layers(module, replaced)
    return zeroed


def replace_layers(module: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put layers at the given paths; a layer that a module holds twice is replaced twice."""
    for path, layer in layers.items():
        former = module.get_submodule(path)
        for name, found in list(module.named_modules(remove_duplicate=False)):
            if found is former:
                parent, _, last = name.rpartition(".")
                setattr(module.get_submodule(parent), last, layer)


def set_zero(module: nn.Module, parameters: Iterable[str]) -> None:
    """Set parameters to zero and exempt them from training."""
    tensors = named_tensors(module)
    for name in parameters:
        tensors[name].data.zero_()
        tensors[name].requires_grad_(False)


def zeros_of(module: nn.Module) -> dict[str, Zeros]:
    """Return the emptied layers of a module by path."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, Zeros)}


def fit_zeros(module: nn.Module, example: Tensor, sizes: Mapping[int, set[int]]) -> None:
    """Let branches that an earlier round emptied follow the widths of this round, in place.

    What an emptied branch adds is zero at any width, so the right width is the one that its join
    accepts. The join that fails is that of the branch that ran last.

    Args:
        module: narrowed already.
        example: one input.
        sizes: per former number of channels the numbers that this round makes of it.

    Raises:
        SurgeryError: `forward` fails whatever the width.
    """
    former: dict[str, dict[str, int]] = {}
    for path, layer in zeros_of(module).items():
        former.setdefault(layer.rule.branch, {})[path] = layer.rule.channels
    untried = {
        branch: sorted({new for size in set(paths.values()) for new in sizes.get(size, ())})
        for branch, paths in former.items()
    }
    first_error: SurgeryError | None = None
    while True:
        try:
            ran: list[str] = []
            with _watching(module, ran):
                run_once(module, example)
            return
        except SurgeryError as error:
            first_error = first_error or error
            if not ran or not untried[ran[-1]]:
                raise first_error from error
        branch = ran[-1]
        width = untried[branch].pop()
        for path, channels in former[branch].items():
            if width in sizes.get(channels, ()):
                zeros = zeros_of(module)[path]
                zeros.rule = zeros.rule.model_copy(update={"channels": width})


@contextmanager
def _watching(module: nn.Module, ran: list[str]) -> Iterator[None]:
    """Note the branch of every emptied layer that runs."""

    def watch(branch: str) -> Callable[[nn.Module, object], None]:
        return lambda _, __: ran.append(branch)

    handles = [
        layer.register_forward_pre_hook(watch(layer.rule.branch))
        for layer in zeros_of(module).values()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _owners(module: nn.Module, branches: Iterable[Branch]) -> dict[str, str]:
    """Return the layers that own the parameters of branches, each with its branch's name."""
    return {
        owner: branch.name
        for branch in branches
        for parameter in branch.parameters
        if (owner := _owner(module, parameter)) is not None
    }


def _owner(module: nn.Module, parameter: str) -> str | None:
    """Return the path of the layer that owns a parameter; None where no single layer does."""
    path = parameter.rpartition(".")[0].partition(".parametrizations.")[0]
    try:
        layer = module.get_submodule(path)
    except AttributeError:
        return None
    is_leaf = not any(name != "parametrizations" for name, _ in layer.named_children())
    return path if path and (is_leaf or isinstance(layer, NORMS)) else None


def _rule(name: str, layer: nn.Module, branch: str, calls: list[Shapes]) -> ZerosRule | None:
    """Return how zeros replace a layer; None where its calls do not look like a layer's."""
    if not calls:
        return None
    if isinstance(layer, nn.Linear):
        return ZerosRule(kind="linear", branch=branch, channels=layer.out_features)
    if not isinstance(layer, _ConvNd):
        is_like = all(taken == given for taken, given in calls)
        return ZerosRule(kind="like", branch=branch) if is_like else None
    for rule in _conv_rules(layer, branch):
        spatial = len(rule.strides)
        if all(rule.shape(taken)[-spatial:] == given[-spatial:] for taken, given in calls):
            return rule
    raise SurgeryError(
        f"{name} ({type(layer).__name__}) turns {calls[0][0]} into {calls[0][1]}, and no rule of "
        f"convolutions explains that size. Its branch {branch} cannot be emptied."
    )


def _conv_rules(layer: _ConvNd, branch: str) -> tuple[ZerosRule, ...]:
    padding = layer.padding if not isinstance(layer.padding, str) else (0,) * len(layer.stride)
    is_transposed = isinstance(layer, _ConvTransposeNd)
    exact = ZerosRule(
        kind="transposed" if is_transposed else "conv",
        branch=branch,
        channels=layer.out_channels,
        kernel=tuple(layer.kernel_size),
        strides=tuple(layer.stride),
        padding=tuple(padding),
        dilations=tuple(layer.dilation),
        output_padding=tuple(layer.output_padding) if is_transposed else (),
    )
    ceil = ZerosRule(
        kind="ceil", branch=branch, channels=layer.out_channels, strides=tuple(layer.stride)
    )
    return (exact, ceil)

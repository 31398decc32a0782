"""The proof of surgery: removing channels computes what masking them computes."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from hardware.graph.channel_map import ChannelMap, Keep
from pipeline.errors import ProofError, SurgeryError, first_line
from pipeline.records import Network
from pipeline.surgery.mask import masked
from pipeline.surgery.narrow import emptied_branches, named_tensors
from pipeline.surgery.remove import each, failing, joined, prune

TOLERANCE = 1e-6  # in float64, where faithful surgery reaches some 1e-13
DRAWS = 4  # of random weights, before a proof that says nothing is refused
NEVER_RANDOM = "num_batches_tracked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What a proof covered: how far removed and masked differ, and what was not compared."""

    error: float  # largest |removed - masked| / largest |masked|, float64
    exact: tuple[str, ...]  # groups whose removal was compared with masking
    structure_only: tuple[str, ...]  # groups whose operators mix channels: only shapes compared


def prove(network: Network, channels: ChannelMap, keep: Keep) -> float:
    """Return how far removing differs from masking, as `examine` measures it.

    Raises:
        ProofError: they differ by more than 1e-6, or nothing could be compared.
        SurgeryError: the network cannot be narrowed so.
    """
    return examine(network, channels, keep).error


def examine(network: Network, channels: ChannelMap, keep: Keep) -> Proof:
    """Compare removing with masking on random weights, in float64, on a random batch of two.

    Random weights and norm statistics, because trained ones hide mistakes (a shift that is zero, a
    scale that is one). Operators that mix channels (LayerNorm) make masking another function than
    removing; their groups are pruned in a separate run that compares output shapes only.

    Returns:
        The proof; its error is of the order of 1e-13 where surgery is right.

    Raises:
        ProofError: the difference exceeds 1e-6 (the message names the guilty groups), or silencing
            changes no output, so that the comparison would say nothing.
        SurgeryError: the network cannot be narrowed so.
    """
    cut = {n: units for n, units in keep.items() if len(units) < channels.group(n).width}
    loose = tuple(n for n, units in cut.items() if units and channels.group(n).mixes is not None)
    strict = {name: units for name, units in cut.items() if name not in loose}
    if loose:
        full, batch = first_draw(network)
        _compare_shapes(full, prune(full, channels, keep), batch)
    error = _prove_strictly(network, channels, strict) if strict else 0.0
    return Proof(error=error, exact=tuple(strict), structure_only=loose)


def _prove_strictly(network: Network, channels: ChannelMap, keep: Keep) -> float:
    for full, batch in _draws(network):
        error = difference(full, channels, keep, batch)
        if error is None:
            continue
        if error <= TOLERANCE:
            return error
        guilty = ", ".join(find_guilty(full, channels, _parts(channels, keep), batch))
        raise ProofError(
            f"Removing channels is not the same as masking them: relative difference {error:.2g}, "
            f"allowed {TOLERANCE:g}. Guilty: {guilty or 'none alone, only all together'}. "
            "Exclude these groups to go on, and report the network as a fault of the analysis."
        )
    raise ProofError(
        f"The proof says nothing: silencing {', '.join(list(keep)[:5])} changes no output, with "
        f"{DRAWS} draws of random weights. The channel map does not name what reads these channels."
    )


def first_draw(network: Network) -> tuple[Network, Tensor]:
    """Return the network with random weights in float64, and a random batch of two."""
    return next(_draws(network))


def _draws(network: Network) -> Iterator[tuple[Network, Tensor]]:
    """Yield the network with random weights, each time others, and a random batch of two."""
    for seed in range(DRAWS):
        generator = torch.Generator().manual_seed(seed + 1)
        batch = torch.randn(2, *network.input_shape, generator=generator, dtype=torch.float64)
        yield replace(network, module=randomised(network, seed)), batch


def difference(network: Network, channels: ChannelMap, keep: Keep, batch: Tensor) -> float | None:
    """Return largest |removed - masked| / largest |masked|; None where masking changes nothing.

    Raises:
        ProofError: outputs are zero or not finite, or their shapes differ.
        SurgeryError: the network cannot be narrowed so.
    """
    pruned = prune(network, channels, keep)
    with torch.no_grad():
        plain, removed = outputs_of(network.module(batch)), outputs_of(pruned.module(batch))
        with masked(network.module, channels, keep):
            silenced = outputs_of(network.module(batch))
    _refuse_other_shapes(removed, silenced)
    largest = max((float(output.abs().max()) for output in silenced), default=0.0)
    if not 0 < largest < float("inf"):
        raise ProofError(
            f"The proof says nothing: the largest output of the masked network is {largest}. "
            f"Nothing of the input {tuple(batch.shape)} arrives at the output."
        )
    if all(torch.equal(a, b) for a, b in zip(plain, silenced, strict=True)):
        return None
    return max(float((a - b).abs().max()) for a, b in zip(removed, silenced, strict=True)) / largest


def find_guilty(
    network: Network, channels: ChannelMap, parts: Mapping[str, Keep], batch: Tensor
) -> dict[str, str]:
    """Return the parts of a choice whose removal differs from masking, each with how far."""

    def fails(names: Sequence[str]) -> str | None:
        try:
            error = difference(network, channels, joined(parts, names), batch)
        except (ProofError, SurgeryError) as failure:
            return first_line(failure)
        if error is None or error <= TOLERANCE:
            return None
        return f"removing differs from masking by {error:.2g} of the output"

    return failing(tuple(parts), fails)


def _parts(channels: ChannelMap, keep: Keep) -> dict[str, Keep]:
    """Return what can be removed alone: every group, and every emptied branch as a whole."""
    branches = emptied_branches(channels, keep)
    parts: dict[str, Keep] = {b.name: dict.fromkeys(b.groups, ()) for b in branches}
    return parts | each({name: units for name, units in keep.items() if units})


def _compare_shapes(full: Network, pruned: Network, batch: Tensor) -> None:
    with torch.no_grad():
        _refuse_other_shapes(outputs_of(pruned.module(batch)), outputs_of(full.module(batch)))


def _refuse_other_shapes(removed: Sequence[Tensor], full: Sequence[Tensor]) -> None:
    given, expected = ([tuple(output.shape) for output in some] for some in (removed, full))
    if given != expected:
        raise ProofError(f"The pruned network returns shapes {given}, the full one {expected}.")


def outputs_of(output: object) -> tuple[Tensor, ...]:
    """Return the tensors in what a network returns: a tensor, or nested tuples, lists and dicts."""
    if isinstance(output, Tensor):
        return (output,)
    if isinstance(output, Mapping):
        return tuple(tensor for value in output.values() for tensor in outputs_of(value))
    if isinstance(output, (tuple, list)):
        return tuple(tensor for value in output for tensor in outputs_of(value))
    return ()


def randomised(network: Network, seed: int = 0) -> nn.Module:
    """Return a float64 CPU copy of a network's module with random parameters, evaluation mode.

    Trained parameters hide mistakes of surgery (a shift that is zero, two filters that are alike),
    so every parameter and every norm statistic is drawn anew. Then each convolution, linear layer
    and batch norm is scaled, in the order in which they run, so that its output has unit variance
    on a random batch: activations neither vanish nor explode in networks of any depth. The batch
    norms matter where weights are computed, as those of experts that are mixed image by image.

    Args:
        network: stays as it is.
        seed: of the generator that draws everything.

    Reference:
        Mishkin and Matas, "All you need is a good init", ICLR 2016, arXiv:1511.06422: the scaling,
        here in one pass instead of iterated.
    """
    generator = torch.Generator().manual_seed(seed)
    module = copy.deepcopy(network.module).cpu().double().eval()
    fan_ins = {id(layer.weight): _fan_in(layer) for layer in _scalable(module)}
    parameters = {id(parameter) for parameter in module.parameters()}
    with torch.no_grad():
        for name, tensor in named_tensors(module).items():
            if not tensor.is_floating_point() or name.endswith(NEVER_RANDOM):
                continue
            if id(tensor) in fan_ins:
                _normal(tensor, generator).div_(fan_ins[id(tensor)] ** 0.5)
            elif name.endswith(("running_mean", "bias")):
                _normal(tensor, generator).mul_(0.3)
            elif sum(extent > 1 for extent in tensor.shape) > 1:  # a weight of a layer of its own
                _normal(tensor, generator).div_((tensor.numel() / tensor.shape[0]) ** 0.5)
            elif name.endswith("running_var") or id(tensor) in parameters:
                tensor.uniform_(0.5, 1.5, generator=generator)
        _scale(module, network.example(batch=2).double())
    return module


def _normal(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return tensor.normal_(generator=generator)


def _scalable(module: nn.Module) -> list[_ConvNd | nn.Linear]:
    # A weight that is computed (a parametrisation) is no parameter, and stays as it is drawn.
    return [
        layer
        for layer in module.modules()
        if isinstance(layer, (_ConvNd, nn.Linear)) and "weight" in layer._parameters
    ]


def _fan_in(layer: _ConvNd | nn.Linear) -> int:
    weight = layer.weight
    per_filter = weight.numel() // weight.shape[0]
    if isinstance(layer, _ConvTransposeNd):
        return max(1, weight.numel() // weight.shape[1])
    return max(1, per_filter)


def _scale(module: nn.Module, batch: Tensor) -> None:
    scaled: set[int] = set()

    def hook(layer: nn.Module, _: object, output: object) -> Tensor | None:
        assert isinstance(layer, (_ConvNd, nn.Linear, _BatchNorm))
        if not isinstance(output, Tensor) or id(layer.weight) in scaled:
            return None
        scaled.add(id(layer.weight))
        size = float(output.std()) if output.numel() > 1 else float(output.abs().sum())
        if not 0 < size < float("inf"):
            return None
        layer.weight.div_(size)
        if layer.bias is not None:
            layer.bias.div_(size)
        return output / size

    norms = [n for n in module.modules() if isinstance(n, _BatchNorm) and n.affine]
    unhook: list[Callable[[], None]] = [
        layer.register_forward_hook(hook).remove for layer in [*_scalable(module), *norms]
    ]
    try:
        module(batch)
    finally:
        for remove in unhook:
            remove()

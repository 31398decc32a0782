"""Remove channels from the user's own class, and prove that nothing else changed."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hardware.channels import ChannelMap, Keep
from pipeline.emptying import empty, fit_zeros, observe
from pipeline.errors import ProofError, SurgeryError, first_line
from pipeline.masking import masked
from pipeline.narrowing import Cuts, emptied_branches, find_cuts, named_tensors, narrow, run_once
from pipeline.randomizing import randomised
from pipeline.records import Network

TOLERANCE = 1e-6  # of a proof in float64, where faithful surgery reaches some 1e-13


def prune(network: Network, channels: ChannelMap, keep: Keep) -> Network:
    """Return a copy of a network with only the units in `keep`; class and `forward` are the user's.

    Layers of emptied branches are replaced by zeros without parameters, so that an unchanged
    `out += shortcut` adds nothing.

    Args:
        network: stays as it is.
        channels: its channel map.
        keep: per group the units that stay, ascending; groups that are not named stay whole, ()
            empties the branch that a group belongs to.

    Raises:
        SurgeryError: `keep` or the map do not fit, or `forward` cannot run at the new widths.
    """
    branches = emptied_branches(channels, keep)
    module = copy.deepcopy(network.module)
    tensors = named_tensors(module)
    example = _example(network, tensors)
    seen = observe(module, branches, example)
    cuts = find_cuts(channels, keep)
    sizes = _sizes(tensors, cuts)
    narrow(module, cuts)
    empty(module, branches, seen)
    fit_zeros(module, example, sizes)
    return replace(network, module=module)


def _example(network: Network, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return an input with the dtype and on the device of the network."""
    floating = (tensor for tensor in tensors.values() if tensor.is_floating_point())
    return network.example().to(next(floating, torch.empty(0)))


def _sizes(tensors: Mapping[str, Tensor], cuts: Cuts) -> dict[int, set[int]]:
    """Return per former length of an axis the lengths that the cuts make of it."""
    sizes: dict[int, set[int]] = {}
    for name, axes in cuts.items():
        for axis, kept in axes.items():
            if name in tensors and axis < tensors[name].ndim:
                sizes.setdefault(tensors[name].shape[axis], set()).add(len(kept))
    return sizes


def fit_to_class(network: Network, channels: ChannelMap) -> ChannelMap:
    """Return the channel map with the groups frozen that the class's `forward` cannot narrow.

    The narrowed class runs without numbers (on torch's meta device; on the CPU where its `forward`
    cannot run there). Where it fails, the groups are halved until the guilty ones are found; of
    groups that fail only together the later ones are frozen. Branches that cannot be emptied are
    dropped.
    """
    bare = _without_numbers(network)
    reasons: dict[str, str] = {}
    keep: dict[str, tuple[int, ...]] = {}
    for pattern in (_all_but_first, _half):
        widths = {g.name: g.width for g in channels.prunable if g.width > 1}
        keep = {name: pattern(width) for name, width in widths.items() if name not in reasons}
        reasons |= _failing(tuple(keep), _trial(bare, channels, {n: {n: keep[n]} for n in keep}))
    keep = {name: units for name, units in keep.items() if name not in reasons}
    emptied: dict[str, Keep] = {b.name: dict.fromkeys(b.groups, ()) for b in channels.branches}
    failing = _failing(tuple(emptied), _trial(bare, channels, emptied, keep))
    groups = tuple(
        group.model_copy(update={"frozen": f"the class's forward fixes this size: {reason}"})
        if (reason := reasons.get(group.name)) is not None
        else group
        for group in channels.groups
    )
    branches = tuple(branch for branch in channels.branches if branch.name not in failing)
    return channels.model_copy(update={"groups": groups, "branches": branches})


def _trial(
    network: Network, channels: ChannelMap, parts: Mapping[str, Keep], rest: Keep | None = None
) -> Callable[[Sequence[str]], str | None]:
    """Return a function that prunes the named parts at once and says what failed, if anything."""

    def fails(names: Sequence[str]) -> str | None:
        try:
            prune(network, channels, {**(rest or {}), **_joined(parts, names)})
        except SurgeryError as error:
            return first_line(error)
        return None

    return fails


def _joined(parts: Mapping[str, Keep], names: Sequence[str]) -> Keep:
    return {group: units for name in names for group, units in parts[name].items()}


def _half(width: int) -> tuple[int, ...]:
    return tuple(range(max(1, width // 2)))


def _all_but_first(width: int) -> tuple[int, ...]:
    return tuple(range(1, width))


def _without_numbers(network: Network) -> Network:
    """Return the network on the meta device where it runs there, else a copy on the CPU."""
    bare = replace(network, module=copy.deepcopy(network.module).to("meta"))
    try:
        run_once(bare.module, network.example().to("meta"))
    except SurgeryError:
        return replace(network, module=copy.deepcopy(network.module).cpu())
    return bare


def _failing(names: Sequence[str], fails: Callable[[Sequence[str]], str | None]) -> dict[str, str]:
    """Return names that must be left out, each with the reason, so that the others pass together.

    Halves what fails; a half is tried together with everything accepted before it, so that names
    that fail only jointly are found too.
    """
    accepted: list[str] = []
    failing: dict[str, str] = {}

    def settle(some: Sequence[str]) -> None:
        if not some:
            return
        if (reason := fails([*accepted, *some])) is None:
            accepted.extend(some)
        elif len(some) == 1:
            failing[some[0]] = reason
        else:
            settle(some[: len(some) // 2])
            settle(some[len(some) // 2 :])

    settle(names)
    return failing


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


def examine(network: Network, channels: ChannelMap, keep: Keep, seed: int = 0) -> Proof:
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
    full = replace(network, module=randomised(network, seed))
    generator = torch.Generator().manual_seed(seed + 1)
    batch = torch.randn(2, *network.input_shape, generator=generator, dtype=torch.float64)
    if loose:
        _compare_shapes(full, prune(full, channels, keep), batch)
    error = _difference(full, channels, strict, batch) if strict else 0.0
    if not error <= TOLERANCE:
        raise ProofError(
            f"Removing channels is not the same as masking them: relative difference {error:.2g}, "
            f"allowed {TOLERANCE:g}. Guilty: {', '.join(_guilty(full, channels, strict, batch))}. "
            "Exclude these groups to go on, and report the network as a fault of the analysis."
        )
    return Proof(error=error, exact=tuple(strict), structure_only=loose)


def _difference(network: Network, channels: ChannelMap, keep: Keep, batch: Tensor) -> float:
    """Return largest |removed - masked| / largest |masked|, both computed in `batch`'s dtype.

    Raises:
        ProofError: masking changes nothing, outputs are not finite, or shapes differ.
    """
    pruned = prune(network, channels, keep)
    with torch.no_grad():
        plain, removed = outputs_of(network.module(batch)), outputs_of(pruned.module(batch))
        with masked(network.module, channels, keep):
            silenced = outputs_of(network.module(batch))
    _refuse_other_shapes(removed, silenced)
    largest = max(float(output.abs().max()) for output in silenced)
    if not 0 < largest < float("inf"):
        raise ProofError(
            f"The proof says nothing: the largest output of the masked network is {largest}. "
            f"Nothing of the input {tuple(batch.shape)} arrives at the output."
        )
    if all(torch.equal(a, b) for a, b in zip(plain, silenced, strict=True)):
        raise ProofError(
            f"The proof says nothing: silencing {', '.join(list(keep)[:5])} changes no output. "
            "The channel map does not name what reads these channels."
        )
    return max(float((a - b).abs().max()) for a, b in zip(removed, silenced, strict=True)) / largest


def _guilty(network: Network, channels: ChannelMap, keep: Keep, batch: Tensor) -> list[str]:
    """Return the groups and emptied branches whose removal alone, or jointly, differs."""
    branches = emptied_branches(channels, keep)
    parts: dict[str, Keep] = {b.name: dict.fromkeys(b.groups, ()) for b in branches}
    parts |= {name: {name: units} for name, units in keep.items() if units}

    def fails(names: Sequence[str]) -> str | None:
        try:
            error = _difference(network, channels, _joined(parts, names), batch)
        except (ProofError, SurgeryError) as failure:
            return first_line(failure)
        return None if error <= TOLERANCE else f"{error:.2g}"

    return list(_failing(tuple(parts), fails)) or sorted(parts)


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

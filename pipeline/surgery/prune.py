"""Pruning: what the user's class can lose, its removal, and the proof that nothing else changed."""

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from hardware.graph.channel_map import ChannelMap, Keep
from pipeline.errors import SurgeryError, first_line
from pipeline.records import Network
from pipeline.surgery.forms import GraphBacked
from pipeline.surgery.narrow import run_once
from pipeline.surgery.proof import Proof, examine, find_guilty, first_draw, prove
from pipeline.surgery.remove import each, failing, joined, prune

__all__ = ["Proof", "examine", "fit_to_class", "prove", "prune"]

PATTERNS = 6  # of widths, to find out what a class's forward can lose


def fit_to_class(network: Network, channels: ChannelMap) -> ChannelMap:
    """Return the channel map with the groups frozen that the class's `forward` cannot narrow.

    The narrowed class runs without numbers (on torch's meta device; on the CPU where its `forward`
    cannot run there), at several patterns of widths, then once with numbers, against masking.
    Where that fails, the groups are halved until the guilty ones are found; of groups that fail
    only together the later ones are frozen. Branches that cannot be emptied are dropped. A network
    in graph form has no class that could refuse.

    Args:
        network: stays as it is.
        channels: its channel map, as the analysis of its graph gives it.
    """
    if isinstance(network.module, GraphBacked):
        return channels
    bare = _without_numbers(network)
    reasons: dict[str, str] = {}
    widths = {g.name: g.width for g in channels.prunable if g.width > 1}
    for number in range(PATTERNS):
        keep = {n: _pattern(w, n, number) for n, w in widths.items() if n not in reasons}
        found = failing(tuple(keep), _trial(bare, channels, each(keep)))
        reasons |= {
            name: f"the class's forward fixes this size: {why}" for name, why in found.items()
        }
    half = {n: _pattern(w, n, 1) for n, w in widths.items() if n not in reasons}
    exact = {n: units for n, units in half.items() if channels.group(n).mixes is None}
    full, batch = first_draw(network)
    found = find_guilty(full, channels, each(exact), batch)
    reasons |= {
        name: f"the class computes otherwise without it: {why}" for name, why in found.items()
    }
    half = {name: units for name, units in half.items() if name not in reasons}
    emptied: dict[str, Keep] = {b.name: dict.fromkeys(b.groups, ()) for b in channels.branches}
    kept_branches = failing(tuple(emptied), _trial(bare, channels, emptied, half))
    groups = tuple(
        group.model_copy(update={"frozen": reasons[group.name]}) if group.name in reasons else group
        for group in channels.groups
    )
    branches = tuple(branch for branch in channels.branches if branch.name not in kept_branches)
    return channels.model_copy(update={"groups": groups, "branches": branches})


def _pattern(width: int, name: str, number: int) -> tuple[int, ...]:
    """Return which units of a group stay in one trial.

    All but one, half, then as many as chance has it, so that groups of equal width come to differ.
    """
    if number == 0:
        return tuple(range(1, width))
    if number == 1:
        return tuple(range(width // 2))
    source = random.Random(f"{name} {number}")
    return tuple(sorted(source.sample(range(width), source.randint(1, width))))


def _without_numbers(network: Network) -> Network:
    """Return the network on the meta device where it runs there, else a copy on the CPU."""
    bare = replace(network, module=copy.deepcopy(network.module).to("meta"))
    try:
        run_once(bare.module, network.example().to("meta"))
    except SurgeryError:
        return replace(network, module=copy.deepcopy(network.module).cpu())
    return bare


def _trial(
    network: Network, channels: ChannelMap, parts: Mapping[str, Keep], rest: Keep | None = None
) -> Callable[[Sequence[str]], str | None]:
    """Return a function that prunes the named parts at once and says what failed, if anything."""

    def fails(names: Sequence[str]) -> str | None:
        try:
            prune(network, channels, {**(rest or {}), **joined(parts, names)})
        except SurgeryError as error:
            return first_line(error)
        return None

    return fails

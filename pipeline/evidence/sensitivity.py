"""Measured sensitivity: how much the loss rises when one group is narrowed, per width."""

import copy
import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hardware.errors import StorageError
from hardware.graph.channel_map import Branch, ChannelMap, Keep
from hardware.records import Record, load_record, save_record
from pipeline.errors import PipelineError
from pipeline.evidence.recalibrate import following, observing
from pipeline.evidence.replay import Tape, record, replay
from pipeline.processor import has_bf16
from pipeline.records import Array, Network, Progress
from pipeline.surgery.mask import masked
from pipeline.tasks.evaluate import evaluating
from pipeline.tasks.losses import classification_loss

log = logging.getLogger(__name__)

Batches = Sequence[tuple[Tensor, Tensor]]
Candidates = Mapping[str, tuple[int, ...]]

SAVE_EVERY_S = 10.0
FULL = "full"


class LossTable(Record):
    """Sums of the loss over each batch, per probe; the probes of one network on the same images."""

    key: str  # of weights, images and saliency: what the numbers depend on
    sums: dict[str, tuple[float, ...]]  # per probe one entry per batch done so far


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One change of the network whose damage is measured."""

    name: str
    keep: Keep
    changed: tuple[str, ...]  # parameters that masking changes


@dataclass(frozen=True, slots=True, kw_only=True)
class Measuring:
    """What every probe is measured with."""

    module: nn.Module
    channels: ChannelMap
    batches: Batches
    cache: Path | None
    progress: Progress | None
    bf16: bool


def measure_damage(
    network: Network,
    channels: ChannelMap,
    saliency: Mapping[str, Tensor],
    candidates: Candidates,
    batches: Batches,
    progress: Progress | None = None,
    cache: Path | None = None,
) -> dict[str, dict[int, float]]:
    """Return how much the mean loss rises with one group at one width, the rest at full width.

    The channels of highest saliency stay, the others are masked, and the statistics of the batch
    norms behind them follow, as they will when the pruned network is recalibrated; see `following`.
    A branch is emptied with all its groups at once, and each of them carries an equal part of
    that damage at width 0, so that the parts add up. Runs in bf16 where the processor computes in
    it, on a copy of the network, and computes only the parts from the first masked one on.

    Args:
        network: trained; not changed.
        channels: its channel map.
        saliency: per group `(width,)`, higher = keep.
        candidates: ascending widths per group.
        batches: images `(batch, channels, height, width)` and labels `(batch,)`.
        progress: called with runs done, runs in all, and what was measured; a run is one probe on
            one batch.
        cache: a file that keeps what was measured, and is continued after a kill; measurements of
            another network, other images or another saliency are replaced.

    Returns:
        Per group and candidate width the rise of the mean cross entropy, nats; 0 at full width,
        below 0 where the loss falls.

    Raises:
        PipelineError: no images, the network returns no logits, or its loss is not a number.
        StorageError: the cache cannot be written.
    """
    if not batches:
        raise PipelineError("There are no calibration images: raise plan.calibration_images.")
    probes = _probes(channels, saliency, candidates)
    place = next(network.module.parameters(), torch.empty(0)).device
    bf16 = has_bf16(place)
    key = _key(network.module, channels, saliency, batches, bf16)
    measuring = Measuring(
        module=network.module,
        channels=channels,
        batches=batches,
        cache=cache,
        progress=progress,
        bf16=bf16,
    )
    table = _fill(measuring, probes, _load(cache, key) or LossTable(key=key, sums={}))
    images = sum(len(labels) for _, labels in batches)
    loss = {probe.name: sum(table.sums[probe.name]) / images for probe in probes}
    log.info("loss %.4f; %d probes on %d images", loss[FULL], len(probes) - 1, images)
    return _shared_out(channels, candidates, {name: x - loss[FULL] for name, x in loss.items()})


def most_salient(saliency: Tensor | Array, width: int) -> tuple[int, ...]:
    """Return the `width` channels of highest saliency, ascending; among equals the first ones.

    Damage is measured with this choice, and a plan keeps the same one.

    Args:
        saliency: of every channel of a group, higher = keep.
        width: how many stay.
    """
    order = np.argsort(-np.asarray(saliency, dtype=np.float64), kind="stable")
    return tuple(sorted(int(channel) for channel in order[:width]))


def _probes(
    channels: ChannelMap, saliency: Mapping[str, Tensor], candidates: Candidates
) -> list[Probe]:
    """Return the full network, every group at every narrower width, and every branch emptied."""
    probes = [Probe(name=FULL, keep={}, changed=())]
    for name, widths in candidates.items():
        group = channels.group(name)
        probes += [
            Probe(
                name=f"{name}@{width}",
                keep={name: most_salient(saliency[name], width)},
                changed=group.consumers,
            )
            for width in widths
            if 0 < width < group.width
        ]
    probes += [
        Probe(
            name=_emptied(branch),
            keep=dict.fromkeys(branch.groups, ()),
            changed=branch.parameters + tuple(_consumers(channels, branch)),
        )
        for branch in _branches(channels, candidates)
    ]
    return probes


def _emptied(branch: Branch) -> str:
    return f"emptied {branch.name}"


def _consumers(channels: ChannelMap, branch: Branch) -> list[str]:
    return [name for group in branch.groups for name in channels.group(group).consumers]


def _branches(channels: ChannelMap, candidates: Candidates) -> list[Branch]:
    """Return the branches that the candidates allow to empty, inner ones before outer ones."""
    found = [
        branch
        for branch in channels.branches
        if branch.groups and all(0 in candidates.get(group, ()) for group in branch.groups)
    ]
    return sorted(found, key=lambda branch: len(branch.groups))


def _shared_out(
    channels: ChannelMap, candidates: Candidates, damage: Mapping[str, float]
) -> dict[str, dict[int, float]]:
    """Return damage per group and width; what emptying a branch does is split over its groups.

    Of a branch inside another one, the outer one's further groups carry what is left.
    """
    found = {
        group: {w: 0.0 if w == widths[-1] else damage.get(f"{group}@{w}", 0.0) for w in widths}
        for group, widths in candidates.items()
    }
    carried: dict[str, float] = {}
    for branch in _branches(channels, candidates):
        rest = [group for group in branch.groups if group not in carried]
        left = damage[_emptied(branch)] - sum(carried.get(group, 0.0) for group in branch.groups)
        carried.update({group: left / len(rest) for group in rest})
    for group, part in carried.items():
        found[group][0] = part
    return found


def _fill(measuring: Measuring, probes: Sequence[Probe], table: LossTable) -> LossTable:
    """Return the table with every probe measured on every batch; saved every few seconds."""
    sums = {name: list(line) for name, line in table.sums.items()}
    for probe in probes:
        sums.setdefault(probe.name, [])
    saved = time.monotonic()

    def current() -> LossTable:
        return LossTable(key=table.key, sums={name: tuple(line) for name, line in sums.items()})

    cache, progress = measuring.cache, measuring.progress
    trial = copy.deepcopy(measuring.module).to(memory_format=torch.channels_last)
    with evaluating(trial), torch.no_grad():
        for number, (images, labels) in enumerate(measuring.batches):
            todo = [probe for probe in probes if len(sums[probe.name]) <= number]
            if not todo:
                continue
            run = _BatchRun(trial, images, labels, measuring.bf16)
            for probe in todo:
                with masked(trial, measuring.channels, probe.keep):
                    sums[probe.name].append(run.loss(probe))
                if progress is not None:
                    done = sum(len(sums[one.name]) for one in probes)
                    progress(done, len(probes) * len(measuring.batches), probe.name)
                if cache is not None and time.monotonic() - saved > SAVE_EVERY_S:
                    save_record(current(), cache)
                    saved = time.monotonic()
    if cache is not None:
        save_record(current(), cache)
    return current()


class _BatchRun:
    """One batch, recorded once on the full network and replayed for every probe."""

    def __init__(self, module: nn.Module, images: Tensor, labels: Tensor, bf16: bool) -> None:
        self.module, self.bf16 = module, bf16
        self.place = next(module.parameters(), images).device
        self.images = images.to(self.place, memory_format=torch.channels_last)
        self.labels = labels.to(self.place)
        with self._autocast(), observing(module) as self.moments:
            self.tape: Tape = record(module, self.images)

    def loss(self, probe: Probe) -> float:
        with self._autocast(), following(self.module, self.moments):
            outputs = replay(self.module, self.tape, self.images, probe.changed)
        loss = classification_loss(outputs, self.labels, "sum")
        if probe.name == FULL and not torch.isfinite(loss):
            raise PipelineError(
                f"The network's loss on calibration images is {loss.item()}. Check its weights, "
                "and data.mean and data.std in the recipe."
            )
        return float(loss)

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.place.type, dtype=torch.bfloat16, enabled=self.bf16)


def _load(cache: Path | None, key: str) -> LossTable | None:
    if cache is None or not cache.exists():
        return None
    try:
        table = load_record(LossTable, cache)
    except StorageError as error:
        log.warning("%s Its measurements are made again.", error)
        return None
    return table if table.key == key else None


def _key(
    module: nn.Module,
    channels: ChannelMap,
    saliency: Mapping[str, Tensor],
    batches: Batches,
    bf16: bool,
) -> str:
    """Return a hash of everything that a loss depends on, except the width."""
    digest = hashlib.sha256(f"{channels.model_dump_json()} bf16={bf16} norms follow".encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    for group, scores in sorted(saliency.items()):
        digest.update(f"{group} {torch.argsort(-scores, stable=True).tolist()}".encode())
    for images, labels in batches:
        digest.update(f"{tuple(images.shape)}".encode())
        digest.update(_bytes(images))
        digest.update(_bytes(labels))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

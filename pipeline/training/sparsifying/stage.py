"""Train a network towards the widths of its plan, before surgery."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hardware.graph.channel_map import ChannelMap, Keep
from pipeline.recipe import SparsifySection
from pipeline.records import EpochRecord, Network
from pipeline.tasks.data import Data
from pipeline.training.sparsifying import METHODS
from pipeline.training.sparsifying.targets import Sparsifier
from pipeline.training.step import repeatable
from pipeline.training.training import Progress, Training, silent


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparsified:
    """A network that is ready to be pruned, and which of its units are to stay."""

    network: Network
    keep: Keep  # as wide as the plan's choice
    epochs: tuple[EpochRecord, ...]


def sparsify(
    network: Network,
    teacher: Network,
    channels: ChannelMap,
    keep: Keep,
    data: Data,
    section: SparsifySection,
    folder: Path,
    seed: int,
    progress: Progress | None = None,
) -> Sparsified:
    """Return the network after its last epoch of sparsifying, and the choice that it made.

    The widths are the plan's; which units stay is what the training found, where it could. After
    every epoch the state goes to `folder`; the same call continues there after a kill.

    Args:
        network: to be pruned; left as it is.
        teacher: whose outputs are learned too.
        channels: the channel map of `network`.
        keep: the plan's choice; of each group as many units stay as it names.
        data: training and validation images.
        section: which method, and how; not "none".
        folder: for the state, of this training alone.
        seed: of dropout; order and augmentation follow the seed of `data`.
        progress: told after every step.

    Raises:
        TrainingError: the loss is not a number, or `folder` belongs to another training.
        StorageError: `folder` cannot be written, or is damaged.
    """
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def pull(module: nn.Module) -> Sparsifier:
        return METHODS[section.method](module, channels, keep, section)

    with repeatable(place):
        training = Training(network, teacher, data, section, folder, seed, place, pull)
        epochs = training.resume()
        while len(epochs) < section.epochs:
            epochs = (*epochs, training.run_epoch(epochs, progress or silent))
            training.save(epochs)
        assert isinstance(training.pull, Sparsifier)  # made by `pull`
        kept = training.pull.finish()
    return Sparsified(network=training.last(), keep=kept, epochs=epochs)

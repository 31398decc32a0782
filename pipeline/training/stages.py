"""The trainings of a run: sparsifying before surgery, fine-tuning after it."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from hardware.graph.channel_map import ChannelMap, Keep
from pipeline.evidence.recalibrate import recalibrate_module
from pipeline.recipe import FinetuneSection, SparsifySection
from pipeline.records import EpochRecord, Network
from pipeline.training.sparsifying import METHODS
from pipeline.training.sparsifying.targets import Penalty
from pipeline.training.step import repeatable
from pipeline.training.training import Training, TrainingJob

RECALIBRATION_IMAGES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparsified:
    """A network that is ready to be pruned, and which of its channels are to stay."""

    network: Network
    keep: Keep  # as wide as the plan's choice
    epochs: tuple[EpochRecord, ...]


def finetune(job: TrainingJob, section: FinetuneSection) -> tuple[Network, tuple[EpochRecord, ...]]:
    """Return the network with the weights of its best epoch, and what was measured per epoch.

    The best epoch is that of the highest accuracy on the validation images, the later of equals.
    After every epoch the state goes to the job's folder; the same call continues there after a
    kill, with the same result bit for bit on the same machine with as many threads.

    Args:
        job: what is trained; after pruning the original network is its teacher. A copy is
            returned, float32, in evaluation mode.
        section: how; with 0 epochs the network is recalibrated only.

    Raises:
        TrainingError: the loss is not a number, the outputs do not fit the classes, or the folder
            belongs to another training.
        StorageError: the folder cannot be written, or is damaged.
    """
    data = job.data
    with repeatable(place := _device()):
        training = Training(job, section, place)
        epochs = training.resume()
        if not epochs and section.recalibrate:
            steps = min(data.train_steps, math.ceil(RECALIBRATION_IMAGES / data.section.batch))
            with training.precision():
                recalibrate_module(
                    training.module, data.calibration(steps * data.section.batch, job.seed)
                )
        epochs = _train_on(training, epochs)
    return training.best(epochs), epochs


def sparsify(
    job: TrainingJob, section: SparsifySection, channels: ChannelMap, keep: Keep
) -> Sparsified:
    """Return the network after its last epoch of sparsifying, and the choice that it made.

    The widths are the plan's; which channels stay is what the training found, where it could.
    After every epoch the state goes to the job's folder; the same call continues there after a
    kill.

    Args:
        job: what is trained, to be pruned afterwards.
        section: which method, and how; not "none".
        channels: the channel map of the network.
        keep: the plan's choice; of each group as many channels stay as it names.

    Raises:
        TrainingError: the loss is not a number, or the folder belongs to another training.
        StorageError: the folder cannot be written, or is damaged.
    """

    def penalty(module: nn.Module) -> Penalty:
        return METHODS[section.method](module, channels, keep, section)

    with repeatable(place := _device()):
        training = Training(job, section, place, penalty)
        epochs = _train_on(training, training.resume())
        kept = training.penalty.finish()
    return Sparsified(network=training.last(), keep=kept, epochs=epochs)


def _train_on(training: Training, epochs: tuple[EpochRecord, ...]) -> tuple[EpochRecord, ...]:
    """Run the epochs that are missing, each saved, and return all of them."""
    while len(epochs) < training.section.epochs:
        epochs = (*epochs, training.run_epoch(epochs))
        training.save(epochs)
    return epochs


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

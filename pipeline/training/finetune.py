"""Train a network: after pruning with the original network as its teacher, or from scratch."""

import math
from pathlib import Path

import torch

from pipeline.evidence.recalibrate import recalibrate_module
from pipeline.recipe import FinetuneSection
from pipeline.records import EpochRecord, Network
from pipeline.tasks.data import Data
from pipeline.training.step import repeatable
from pipeline.training.training import Progress, Training, silent

RECALIBRATION_IMAGES = 4096


def finetune(
    student: Network,
    teacher: Network | None,
    data: Data,
    section: FinetuneSection,
    folder: Path,
    seed: int,
    progress: Progress | None = None,
) -> tuple[Network, tuple[EpochRecord, ...]]:
    """Return the student with the weights of its best epoch, and what was measured per epoch.

    The best epoch is that of the highest accuracy on the validation images, the later of equals.
    After every epoch the state goes to `folder`; the same call continues there after a kill, with
    the same result bit for bit on the same machine with as many threads.

    Args:
        student: what is trained; left as it is; a copy is returned, float32, in evaluation mode.
        teacher: whose outputs are learned too; None: labels alone.
        data: training and validation images.
        section: how; with 0 epochs the student is recalibrated only.
        folder: for the state, of this training alone.
        seed: of dropout; order and augmentation follow the seed of `data`.
        progress: told after every step.

    Raises:
        TrainingError: the loss is not a number, the outputs do not fit the classes, or `folder`
            belongs to another training.
        StorageError: `folder` cannot be written, or is damaged.
    """
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with repeatable(place):
        training = Training(student, teacher, data, section, folder, seed, place)
        epochs = training.resume()
        if not epochs and section.recalibrate:
            steps = min(data.train_steps, math.ceil(RECALIBRATION_IMAGES / data.section.batch))
            with training.precision():
                recalibrate_module(
                    training.module, data.calibration(steps * data.section.batch, seed)
                )
        while len(epochs) < section.epochs:
            epochs = (*epochs, training.run_epoch(epochs, progress or silent))
            training.save(epochs)
    return training.best(epochs), epochs

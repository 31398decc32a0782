"""What one training step is made of: rate, loss, optimizer, precision."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.recipe import TrainingSection


def learning_rate_at(step: int, steps: int, warmup_steps: int, peak: float) -> float:
    """Return the learning rate of one step: a straight line up to the peak, half a cosine to 0.

    Args:
        step: from 0.
        steps: in all.
        warmup_steps: until the peak.
        peak: the highest rate.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    share = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * share))


def distillation_loss(
    logits: Tensor, labels: Tensor, taught: Tensor | None, section: TrainingSection
) -> Tensor:
    """Return the mean loss: cross-entropy to the labels, and divergence from the teacher.

    Args:
        logits: (n, classes), float32.
        labels: (n,).
        taught: the teacher's logits (n, classes), None without a teacher.
        section: `distill` (the teacher's weight), `temperature`, `label_smoothing`.

    Reference:
        Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, sec. 2.
    """
    own = functional.cross_entropy(logits, labels, label_smoothing=section.label_smoothing)
    if taught is None or section.distill == 0:
        return own
    heat = section.temperature
    apart = functional.kl_div(
        functional.log_softmax(logits / heat, dim=1),
        functional.log_softmax(taught / heat, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - section.distill) * own + section.distill * heat**2 * apart


def make_optimizer(module: nn.Module, section: TrainingSection) -> torch.optim.SGD:
    """Return SGD with Nesterov momentum; norms and biases do not decay.

    The momentum starts at zero in each parameter's own memory layout, as it does after a resume:
    another layout may round differently.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": section.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=section.learning_rate,
        momentum=section.momentum,
        nesterov=section.momentum > 0,
    )
    if section.momentum > 0:
        for parameter in trained:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


@contextmanager
def repeatable(place: torch.device) -> Iterator[None]:
    """Let a caller seed torch's global generator and choose repeatable kernels, then undo both."""
    devices = [torch.cuda.current_device()] if place.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        torch.backends.cudnn.flags(benchmark=False, deterministic=True),
    ):
        yield

"""How well a network or an engine classifies images."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from hardware.errors import RunError
from hardware.runtimes.base import Engine
from pipeline.errors import DataError, TrainingError
from pipeline.records import Network

Predict = Callable[[Tensor], Tensor]  # images (n, channels, height, width) -> logits (n, classes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What was found on a set of labelled images."""

    accuracy_pct: float  # top-1
    loss: float  # mean cross-entropy, nats
    images: int


def accuracy(
    predict: Predict,
    batches: Iterable[tuple[Tensor, Tensor]],
    progress: Callable[[int, int, str], None] | None = None,
    total: int = 0,
) -> Score:
    """Return accuracy and loss over all batches.

    Args:
        predict: from images to logits.
        batches: images (n, channels, height, width) and labels (n,).
        progress: called with (images done, total, what is known so far) after every batch.
        total: images in all, for `progress`; 0: not known, and the images done are given instead.

    Raises:
        DataError: there are no images.
        TrainingError: outputs that are not numbers, or that do not fit the labels.
    """
    images, correct, loss = 0, 0, 0.0
    for inputs, labels in batches:
        logits = predict(inputs).float()
        _check(logits, labels)
        images += len(labels)
        correct += int((logits.argmax(dim=1) == labels).sum())
        loss += float(functional.cross_entropy(logits.double(), labels, reduction="sum"))
        if progress is not None:
            progress(images, max(total, images), f"accuracy {100 * correct / images:.2f} %")
    if images == 0:
        raise DataError("There are no images to evaluate on.")
    return Score(accuracy_pct=100 * correct / images, loss=loss / images, images=images)


def torch_predictor(network: Network) -> Predict:
    """Return a function that runs the network in evaluation mode; logits come back to the CPU."""
    module = network.module

    def predict(images: Tensor) -> Tensor:
        place = next(module.parameters(), images).device
        with evaluating(module), torch.inference_mode():
            return module(images.to(place)).cpu()  # type: ignore[no-any-return]  # a user's module

    return predict


def engine_predictor(engine: Engine) -> Predict:
    """Return a function that runs any number of images through an engine of one fixed batch.

    The last part of a batch is filled up by repeating its last image; what that gives is dropped.

    Raises:
        RunError: the engine has several inputs or outputs, takes other images, or returns what is
            not a number. Raised by the returned function too.
    """
    if len(engine.inputs) != 1:
        raise RunError(f"An engine that classifies has one input; this has {list(engine.inputs)}.")
    [(name, shape)] = engine.inputs.items()
    batch = shape[0]

    def predict(images: Tensor) -> Tensor:
        if tuple(images.shape[1:]) != tuple(shape[1:]):
            raise RunError(
                f"The engine takes images of shape {tuple(shape[1:])}; "
                f"got {tuple(images.shape[1:])}."
            )
        found = []
        for part in torch.split(images, batch):
            missing = batch - len(part)
            filled = torch.cat([part, part[-1:].expand(missing, -1, -1, -1)]) if missing else part
            outputs = engine.run({name: np.ascontiguousarray(filled.numpy(), dtype=np.float32)})
            if len(outputs) != 1:
                raise RunError(
                    f"An engine that classifies has one output; this has {list(outputs)}."
                )
            [logits] = outputs.values()
            if not np.isfinite(logits).all():
                raise RunError(
                    "The engine returned NaN or infinity. Check the weights, or build it in "
                    "another precision."
                )
            found.append(torch.from_numpy(np.array(logits[: len(part)], dtype=np.float32)))
        return torch.cat(found)

    return predict


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode; every submodule gets its own mode back afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def require_classes(network: Network, classes: Sequence[str]) -> None:
    """Raise DataError where a network does not give one number per class of the images."""
    with evaluating(network.module), torch.inference_mode():
        outputs = network.module(network.example())
    found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    if found != (1, len(classes)):
        raise DataError(
            f"{network.spec} gives outputs of shape {found}, not (1, {len(classes)}), per image; "
            f"the images have the {len(classes)} classes {', '.join(classes[:3])}, ... Set the "
            "number of classes in model.arguments, or name other images in data.source."
        )


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or len(logits) != len(labels) or int(labels.max()) >= logits.shape[1]:
        raise TrainingError(
            f"The network gives outputs of shape {tuple(logits.shape)} for {len(labels)} images "
            f"with labels up to {int(labels.max())}: expected (images, classes). "
            "Set the number of classes in model.arguments."
        )
    if not bool(logits.isfinite().all()):
        raise TrainingError(
            "The network's outputs are NaN or infinite. Check its weights, and data.mean and "
            "data.std in the recipe."
        )

"""One training, resumable after every epoch: what pruned networks and sparse ones share."""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.errors import TrainingError
from pipeline.processor import has_bf16
from pipeline.recipe import TrainingSection
from pipeline.records import EpochRecord, Network
from pipeline.tasks.augmentation import seed_of
from pipeline.tasks.data import Batch, Data
from pipeline.tasks.evaluate import accuracy, torch_predictor
from pipeline.training.checkpoints import best_of, digest_of, load_checkpoint, save_checkpoint
from pipeline.training.step import distillation_loss, learning_rate_at, make_optimizer

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]  # steps done, steps in all, what is known so far


class Pull:
    """What a training does besides learning: nothing, unless a subclass says so."""

    def begin(self, epoch: int) -> None:
        """Get ready for an epoch, counted from 0."""

    def penalty(self) -> Tensor | None:
        """Return what is added to the loss of this step, None for nothing."""
        return None

    def after_step(self) -> None:
        """Change what the optimizer has just changed."""

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that a resumed training needs."""
        return {}

    def take_up(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `state` returned."""

    def facts(self) -> dict[str, object]:
        """Return what decides the result, besides the section: a resumed training must agree."""
        return {}


class Training:
    """What changes from step to step of one training, and how it is saved."""

    def __init__(
        self,
        student: Network,
        teacher: Network | None,
        data: Data,
        section: TrainingSection,
        folder: Path,
        seed: int,
        place: torch.device,
        pull: Callable[[nn.Module], Pull] | None = None,
    ) -> None:
        self.student, self.data, self.section = student, data, section
        self.folder, self.seed, self.place = folder, seed, place
        taught = teacher is not None and section.distill > 0
        self.teacher = _placed(teacher.module, place).eval() if teacher and taught else None
        self.module = _placed(student.module, place)
        self.bf16 = section.bf16 and has_bf16(place)
        if section.bf16 and not self.bf16:
            log.info("This %s has no bf16 instructions: training in float32.", place.type)
        self.optimizer = make_optimizer(self.module, section)
        self.best_state = _copied(self.module)
        self.pull = pull(self.module) if pull else Pull()
        self.belongs_to = _belongs_to(
            student, teacher if taught else None, data, section, seed, self.pull.facts()
        )

    def precision(self) -> AbstractContextManager[object]:
        """Return the context that forward passes run in."""
        if not self.bf16:
            return nullcontext()
        return torch.autocast(self.place.type, dtype=torch.bfloat16)

    def resume(self) -> tuple[EpochRecord, ...]:
        """Take up the state in the folder; return the epochs that are finished."""
        found = load_checkpoint(self.folder, self.belongs_to)
        if found is None:
            return ()
        checkpoint, tensors = found
        now, best = _part(tensors, "student."), _part(tensors, "best.")
        self.module.load_state_dict(now)
        self.best_state = best or now
        for name, buffer in self._momentum().items():
            buffer.copy_(tensors[name])
        self.pull.take_up(_part(tensors, "pull."))
        log.info("Training continues after epoch %d, from %s.", len(checkpoint.epochs), self.folder)
        return checkpoint.epochs

    def save(self, epochs: tuple[EpochRecord, ...]) -> None:
        """Write the state after the last of `epochs`, and keep the weights where it is the best."""
        tensors = {f"student.{name}": value for name, value in self.module.state_dict().items()}
        tensors |= self._momentum()
        tensors |= {f"pull.{name}": value for name, value in self.pull.state().items()}
        if best_of(epochs) == epochs[-1]:
            self.best_state = _copied(self.module)
        else:
            tensors |= {f"best.{name}": value for name, value in self.best_state.items()}
        save_checkpoint(self.folder, self.belongs_to, epochs, tensors)

    def best(self, epochs: tuple[EpochRecord, ...]) -> Network:
        """Return the student with the weights of its best epoch."""
        if epochs:
            self.module.load_state_dict(self.best_state)
        return self.last()

    def last(self) -> Network:
        """Return the student with the weights that it has now."""
        module = self.module.to("cpu").to(memory_format=torch.contiguous_format)
        return replace(self.student, module=module.eval())

    def run_epoch(self, before: tuple[EpochRecord, ...], progress: Progress) -> EpochRecord:
        """Train for one epoch and return what was measured."""
        epoch, steps = len(before), self.data.train_steps
        start_ns = time.perf_counter_ns()
        # For dropout. The caller's generator gets its own state back, see `repeatable`.
        torch.manual_seed(seed_of("dropout", self.seed, epoch))
        self.module.train()
        self.pull.begin(epoch)
        known = f", validation {before[-1].val_accuracy_pct:.2f} %" if before else ""
        total, rates = 0.0, []
        for step, batch in enumerate(self.data.train_batches(epoch)):
            rates.append(self._set_rate(epoch * steps + step))
            loss = self._step(batch)
            if not math.isfinite(loss):
                raise self._not_a_number(epoch, step, rates[-1])
            total += loss
            text = f"epoch {epoch + 1}/{self.section.epochs}, loss {loss:.3f}{known}"
            progress(epoch * steps + step + 1, self.section.epochs * steps, text)
        score = accuracy(
            torch_predictor(replace(self.student, module=self.module)),
            self.data.validation_batches(),
        )
        record = EpochRecord(
            epoch=epoch + 1,  # people count from 1
            learning_rate=max(rates),
            train_loss=total / steps,
            val_loss=score.loss,
            val_accuracy_pct=score.accuracy_pct,
            seconds=(time.perf_counter_ns() - start_ns) / 1e9,
        )
        log.info(
            "Epoch %d/%d: loss %.4f, validation %.2f %%, %.1f s.",
            epoch + 1, self.section.epochs, record.train_loss, score.accuracy_pct, record.seconds,
        )  # fmt: skip
        return record

    def _momentum(self) -> dict[str, Tensor]:
        return {
            f"momentum.{name}": self.optimizer.state[parameter]["momentum_buffer"]
            for name, parameter in self.module.named_parameters()
            if parameter in self.optimizer.state
        }

    def _set_rate(self, step: int) -> float:
        steps = self.data.train_steps
        rate = learning_rate_at(
            step,
            self.section.epochs * steps,
            round(min(self.section.warmup_epochs, self.section.epochs) * steps),
            self.section.learning_rate,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _step(self, batch: Batch) -> float:
        """Learn from one batch and return its loss; NaN, with nothing learned, where not finite."""
        images, labels = (part.to(self.place, non_blocking=True) for part in batch)
        taught: Tensor | None = None
        with self.precision():
            if self.teacher is not None:
                with torch.inference_mode():
                    taught = self._logits(self.teacher, images, "teacher")
            logits = self._logits(self.module, images, "network")
        # What inference mode made can be learned from only as a copy.
        taught = None if taught is None else taught.clone()
        loss = distillation_loss(logits, labels, taught, self.section)
        if (penalty := self.pull.penalty()) is not None:
            loss = loss + penalty
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.section.clip_norm)
        found = loss.item()
        if not (math.isfinite(found) and math.isfinite(norm.item())):
            return math.nan
        self.optimizer.step()
        self.pull.after_step()
        return found

    def _logits(self, module: nn.Module, images: Tensor, role: str) -> Tensor:
        """Return the outputs (n, classes) in float32."""
        outputs = module(images)
        expected = (len(images), len(self.data.classes))
        if not isinstance(outputs, Tensor) or tuple(outputs.shape) != expected:
            found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise TrainingError(
                f"The {role} returns {found}; needed is {expected}, a number per image and class. "
                "Set the number of classes in model.arguments."
            )
        return outputs.float()

    def _not_a_number(self, epoch: int, step: int, rate: float) -> TrainingError:
        section = self.section
        return TrainingError(
            f"The loss or its gradient is not a finite number in epoch {epoch + 1} of "
            f"{section.epochs}, step {step + 1} of {self.data.train_steps}, at learning rate "
            f"{rate:.3g}. Lower {section.NAME}.learning_rate (now {section.learning_rate:g}), "
            f"raise {section.NAME}.warmup_epochs (now {section.warmup_epochs:g}), or check that "
            "images and weights are finite."
        )


def _placed(module: nn.Module, place: torch.device) -> nn.Module:
    """Return a float32 copy on the device, channels last."""
    copy = deepcopy(module).to(place, torch.float32)
    return copy.to(memory_format=torch.channels_last)


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _belongs_to(
    student: Network,
    teacher: Network | None,
    data: Data,
    section: TrainingSection,
    seed: int,
    also: Mapping[str, object],
) -> dict[str, str]:
    """Return digests of all that decides the result of a training."""
    state = student.module.state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    facts = {
        "architecture": [student.spec, dict(student.arguments), student.input_shape, shapes],
        f"{section.NAME} section": section.model_dump(mode="json"),
        **also,
    }
    digests = {
        key: hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()
        for key, value in facts.items()
    }
    return digests | {
        "starting weights": digest_of(state),
        "teacher": digest_of(teacher.module.state_dict()) if teacher else "",
        "data": data.digest,
        "seed": str(seed),
    }


def silent(done: int, total: int, text: str) -> None:
    """Tell nobody."""

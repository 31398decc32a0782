"""One training, resumable after every epoch: what fine-tuning and sparsifying share."""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.errors import TrainingError
from pipeline.processor import has_bf16, laid_out, memory_format
from pipeline.recipe import TrainingSection
from pipeline.records import EpochRecord, Network
from pipeline.tasks.augmentation import seed_of
from pipeline.tasks.data import Batch, Data
from pipeline.tasks.evaluate import accuracy, torch_predictor
from pipeline.training.checkpoints import best_of, digest_of, load_checkpoint, save_checkpoint
from pipeline.training.sparsifying.targets import Penalty
from pipeline.training.step import distillation_loss, learning_rate_at, make_optimizer

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]  # steps done, steps in all, what is known so far


def silent(done: int, total: int, text: str) -> None:
    """Show nothing of the progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """What is trained, on what, and where its state goes."""

    network: Network  # left as it is: a copy is trained
    teacher: Network | None = None  # whose outputs are learned too; None: labels alone
    data: Data  # training and validation images
    folder: Path  # for the state after every epoch, of this training alone
    seed: int  # of dropout; order and augmentation follow the seed of `data`
    progress: Progress = silent  # called after every step


class Training:
    """What changes from step to step of one training, and how it is saved."""

    def __init__(
        self,
        job: TrainingJob,
        section: TrainingSection,
        place: torch.device,
        penalty: Callable[[nn.Module], Penalty] = lambda _: Penalty(),
    ) -> None:
        """Get ready to train from the first epoch.

        Args:
            job: what is trained.
            section: how it is trained.
            place: where it is trained.
            penalty: makes the penalty of the copy that is trained.
        """
        self.job, self.section, self.place = job, section, place
        self.data, self.layout = job.data, memory_format(job.network.module, place)
        teacher = job.teacher if section.distill > 0 else None
        self.teacher = _placed(teacher.module, place, self.layout).eval() if teacher else None
        self.module = _placed(job.network.module, place, self.layout)
        self.bf16 = section.bf16 and has_bf16(place)
        if section.bf16 and not self.bf16:
            log.info("This %s has no bf16 instructions: training in float32.", place.type)
        self.optimizer = make_optimizer(self.module, section)
        self.best_state = _copied(self.module)
        self.penalty = penalty(self.module)
        self.belongs_to = _belongs_to(job, teacher, section, self.penalty.facts())

    def precision(self) -> AbstractContextManager[object]:
        """Return the context that forward passes run in."""
        if not self.bf16:
            return nullcontext()
        return torch.autocast(self.place.type, dtype=torch.bfloat16)

    def resume(self) -> tuple[EpochRecord, ...]:
        """Continue from the state in the folder; return the epochs that are finished."""
        found = load_checkpoint(self.job.folder, self.belongs_to)
        if found is None:
            return ()
        checkpoint, tensors = found
        now, best = _part(tensors, "student."), _part(tensors, "best.")
        self.module.load_state_dict(now)
        self.best_state = best or now
        for name, buffer in self._momentum().items():
            buffer.copy_(tensors[name])
        self.penalty.resume(_part(tensors, "penalty."))
        log.info(
            "Training continues after epoch %d, from %s.", len(checkpoint.epochs), self.job.folder
        )
        return checkpoint.epochs

    def save(self, epochs: tuple[EpochRecord, ...]) -> None:
        """Write the state after the last of `epochs`, and keep the weights where it is the best."""
        tensors = {f"student.{name}": value for name, value in self.module.state_dict().items()}
        tensors |= self._momentum()
        tensors |= {f"penalty.{name}": value for name, value in self.penalty.state().items()}
        if best_of(epochs) == epochs[-1]:
            self.best_state = _copied(self.module)
        else:
            tensors |= {f"best.{name}": value for name, value in self.best_state.items()}
        save_checkpoint(self.job.folder, self.belongs_to, epochs, tensors)

    def best(self, epochs: tuple[EpochRecord, ...]) -> Network:
        """Return the network with the weights of its best epoch."""
        if epochs:
            self.module.load_state_dict(self.best_state)
        return self.last()

    def last(self) -> Network:
        """Return the network with the weights that it has now."""
        module = self.module.to("cpu").to(memory_format=torch.contiguous_format)
        return replace(self.job.network, module=module.eval())

    def run_epoch(self, before: tuple[EpochRecord, ...]) -> EpochRecord:
        """Train for one epoch and return what was measured."""
        epoch, steps = len(before), self.data.train_steps
        start_ns = time.perf_counter_ns()
        # For dropout. The caller's generator gets its own state back, see `repeatable`.
        torch.manual_seed(seed_of("dropout", self.job.seed, epoch))
        self.module.train()
        self.penalty.begin(epoch)
        known = f", validation {before[-1].val_accuracy_pct:.2f} %" if before else ""
        total, rates = 0.0, []
        for step, batch in enumerate(self.data.train_batches(epoch)):
            rates.append(self._set_rate(epoch * steps + step))
            loss = self._step(batch)
            if not math.isfinite(loss):
                raise self._not_a_number(epoch, step, rates[-1])
            total += loss
            text = f"epoch {epoch + 1}/{self.section.epochs}, loss {loss:.3f}{known}"
            self.job.progress(epoch * steps + step + 1, self.section.epochs * steps, text)
        score = accuracy(
            torch_predictor(replace(self.job.network, module=self.module)),
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
        images = laid_out(images, self.layout)
        taught: Tensor | None = None
        with self.precision():
            if self.teacher is not None:
                with torch.inference_mode():
                    taught = self._logits(self.teacher, images, "teacher")
            logits = self._logits(self.module, images, "network")
        # What inference mode made can be learned from only as a copy.
        taught = None if taught is None else taught.clone()
        loss = distillation_loss(logits, labels, taught, self.section)
        if (penalty := self.penalty.loss()) is not None:
            loss = loss + penalty
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.section.clip_norm)
        found = loss.item()
        if not (math.isfinite(found) and math.isfinite(norm.item())):
            return math.nan
        self.optimizer.step()
        self.penalty.after_step()
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


def _placed(module: nn.Module, place: torch.device, layout: torch.memory_format) -> nn.Module:
    """Return a float32 copy on the device, in a memory layout."""
    return deepcopy(module).to(place, torch.float32).to(memory_format=layout)


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _belongs_to(
    job: TrainingJob,
    teacher: Network | None,
    section: TrainingSection,
    also: Mapping[str, object],
) -> dict[str, str]:
    """Return digests of all that decides the result of a training."""
    network, state = job.network, job.network.module.state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    facts = {
        "architecture": [network.spec, dict(network.arguments), network.input_shape, shapes],
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
        "data": job.data.digest,
        "seed": str(job.seed),
    }

import logging
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pipeline.training.checkpoints
import pipeline.training.training
from hardware.errors import StorageError
from pipeline.errors import TrainingError
from pipeline.recipe import DataSection, FinetuneSection
from pipeline.records import EpochRecord, Network
from pipeline.tasks.data import Data, load_data
from pipeline.tasks.evaluate import accuracy, torch_predictor
from pipeline.training.stages import finetune
from pipeline.training.training import TrainingJob

SHAPE = (1, 16, 16)
SECTION = FinetuneSection(epochs=4, learning_rate=0.1, warmup_epochs=0.5, bf16=False)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small only wait for one another's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def digits() -> Data:
    return load_data(DataSection(source="digits", augment=("shift",), batch=120), SHAPE, seed=5)


def small_network(seed: int = 0, width: int = 8) -> Network:
    """Return a network with all that a resume must bring back: norms, momentum, dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(16 * 16, 10),
        )
    return Network(module=module, spec="tests:small", arguments={"width": width}, input_shape=SHAPE)


def train(folder: Path, **changes: object) -> tuple[Network, tuple[EpochRecord, ...]]:
    """Run the one training of this file, or one with other arguments."""
    section = changes.pop("section", SECTION)
    arguments = {
        "network": small_network(),
        "teacher": small_network(seed=9),
        "data": digits(),
        "folder": folder,
        "seed": 3,
        **changes,
    }
    return finetune(TrainingJob(**arguments), section)  # type: ignore[arg-type]


def equal(first: Network, second: Network) -> bool:
    a, b = first.module.state_dict(), second.module.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_time(epochs: tuple[EpochRecord, ...]) -> list[EpochRecord]:
    return [record.model_copy(update={"seconds": 0.0}) for record in epochs]


def test_a_network_learns_the_digits_from_scratch(tmp_path: Path) -> None:
    data = digits()
    before = accuracy(torch_predictor(small_network()), data.validation_batches())

    trained, epochs = train(tmp_path, teacher=None, data=data)

    after = accuracy(torch_predictor(trained), data.validation_batches())
    assert before.accuracy_pct < 30 and after.accuracy_pct > 85
    assert [record.epoch for record in epochs] == [1, 2, 3, 4]
    assert epochs[-1].train_loss < epochs[0].train_loss
    assert not trained.module.training
    assert all(p.is_contiguous() for p in trained.module.parameters())


def test_a_student_that_learns_from_a_teacher_alone_agrees_with_it(tmp_path: Path) -> None:
    data = digits()
    teacher, _ = train(tmp_path / "teacher", teacher=None, data=data)
    section = SECTION.model_copy(update={"distill": 1.0})

    student, _ = train(tmp_path / "student", teacher=teacher, data=data, section=section)

    images = torch.cat([images for images, _ in data.validation_batches()])
    answers = [torch_predictor(network)(images).argmax(1) for network in (teacher, student)]
    assert (answers[0] == answers[1]).float().mean() > 0.85


def test_student_teacher_and_the_global_generator_are_left_as_they_are(tmp_path: Path) -> None:
    student, teacher = small_network(), small_network(seed=9)
    student.module.train()
    copies = deepcopy(student), deepcopy(teacher)
    torch.manual_seed(1)
    state = torch.get_rng_state()

    train(tmp_path, network=student, teacher=teacher)

    assert equal(student, copies[0]) and equal(teacher, copies[1])
    assert student.module.training and teacher.module.training
    assert torch.equal(torch.get_rng_state(), state)


def test_the_same_seed_gives_the_same_network_and_another_seed_another(tmp_path: Path) -> None:
    first, records = train(tmp_path / "1")
    second, again = train(tmp_path / "2")
    third, _ = train(tmp_path / "3", seed=4)

    assert equal(first, second) and without_time(records) == without_time(again)
    assert not equal(first, third)


def test_the_best_epoch_is_returned_not_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = accuracy
    accuracies = iter([50.0, 70.0, 70.0, 60.0])  # what validation would have found
    seen: list[dict[str, Tensor]] = []

    def validate(predict: Callable[[Tensor], Tensor], batches: object) -> object:
        [module] = [cell.cell_contents for cell in predict.__closure__ or ()]
        seen.append({name: value.clone() for name, value in module.state_dict().items()})
        return replace(found(predict, batches), accuracy_pct=next(accuracies))  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline.training.training, "accuracy", validate)

    best, epochs = train(tmp_path)

    assert [record.val_accuracy_pct for record in epochs] == [50, 70, 70, 60]
    state = best.module.state_dict()
    assert all(torch.equal(state[name], seen[2][name]) for name in state)
    # A finished training is read back: nothing is trained again.
    again, _ = train(tmp_path)
    assert len(seen) == 4 and equal(again, best)


def test_no_epochs_recalibrate_only(tmp_path: Path) -> None:
    section = SECTION.model_copy(update={"epochs": 0})

    same, epochs = train(tmp_path, section=section)

    start = small_network().module
    assert epochs == () and not list(tmp_path.iterdir())
    assert torch.equal(same.module[0].weight, start[0].weight)
    assert not torch.equal(same.module[1].running_mean, start[1].running_mean)


def test_progress_counts_steps_and_tells_loss_and_validation(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []

    _, epochs = train(tmp_path, progress=lambda *news: seen.append(news))

    steps = digits().train_steps
    assert [done for done, _, _ in seen] == list(range(1, 4 * steps + 1))
    assert {total for _, total, _ in seen} == {4 * steps}
    assert seen[0][2].startswith("epoch 1/4, loss ")
    assert seen[-1][2].endswith(f"validation {epochs[2].val_accuracy_pct:.2f} %")


@pytest.mark.parametrize("change", [{"learning_rate": 1e30}, {"learning_rate": 1e18}])
def test_a_loss_that_is_not_a_number_says_where_and_what_to_change(
    tmp_path: Path, change: dict[str, float]
) -> None:
    section = SECTION.model_copy(update={**change, "clip_norm": 1e30})

    with pytest.raises(
        TrainingError,
        match=r"in epoch \d of 4, step \d+ of 11, at learning rate .*Lower finetune\.learning_rate",
    ):
        train(tmp_path, section=section)


def test_weights_that_are_not_numbers_are_found_at_the_first_step(tmp_path: Path) -> None:
    student = small_network()
    student.module[0].weight.data[0] = math.nan

    with pytest.raises(TrainingError, match="epoch 1 of 4, step 1 of 11"):
        train(tmp_path, network=student)
    assert not list(tmp_path.iterdir())


def test_outputs_that_do_not_fit_the_classes_are_an_error(tmp_path: Path) -> None:
    student = small_network()
    student.module[8] = nn.Linear(256, 12)

    with pytest.raises(TrainingError, match=r"network returns \(120, 12\); needed is \(120, 10\)"):
        train(tmp_path, network=student)


def test_a_processor_without_bf16_trains_in_float32_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pipeline.training.training, "has_bf16", lambda place: False)
    section = SECTION.model_copy(update={"bf16": True, "epochs": 1})

    with caplog.at_level(logging.INFO, logger="pipeline.training.training"):
        train(tmp_path, section=section)

    assert "no bf16 instructions: training in float32" in caplog.text


def test_bf16_computes_in_bf16_and_keeps_weights_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        pipeline.training.training, "has_bf16", lambda place: True
    )  # emulated, if need be
    student = small_network()
    types: set[torch.dtype] = set()
    student.module.append(Spy(types))
    section = SECTION.model_copy(update={"bf16": True, "epochs": 1})

    trained, epochs = train(tmp_path, network=student, section=section)

    assert types == {torch.bfloat16, torch.float32}  # training, validation
    assert {p.dtype for p in trained.module.parameters()} == {torch.float32}
    assert epochs[0].val_accuracy_pct > 30


class Spy(nn.Module):
    """Notes the type of what passes through."""

    def __init__(self, types: set[torch.dtype]) -> None:
        super().__init__()
        self.types = types

    def forward(self, x: Tensor) -> Tensor:
        self.types.add(x.dtype)
        return x

    def __deepcopy__(self, memo: object) -> "Spy":
        return Spy(self.types)


# --- what a kill leaves ---------------------------------------------------------------------------


def killed_at(step: int) -> Callable[[int, int, str], None]:
    def progress(done: int, total: int, text: str) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return progress


def run_and_kill(folder: Path, moment: str) -> None:
    """Run the training in a process of its own that kills itself, see `__main__` below."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, __file__, str(folder), moment]
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert outcome.returncode == -signal.SIGKILL, outcome.stderr


def test_a_training_killed_at_any_step_continues_to_the_same_result(tmp_path: Path) -> None:
    step = random.SystemRandom().randint(12, 44)  # after the first epoch of 11 steps
    whole, records = train(tmp_path / "whole")

    run_and_kill(tmp_path / "killed", str(step))
    finished = (step - 1) // 11
    left = sorted(path.name for path in (tmp_path / "killed").iterdir())
    seen: list[int] = []
    continued, again = train(
        tmp_path / "killed", progress=lambda done, total, text: seen.append(done)
    )

    assert left == [f"epoch-{finished:04d}.safetensors", "training.json"], f"killed at {step}"
    assert seen[0] == 11 * finished + 1, f"killed at step {step}"
    assert equal(whole, continued), f"killed at step {step}"
    assert without_time(records) == without_time(again)


def test_a_training_killed_while_it_saves_continues_to_the_same_result(tmp_path: Path) -> None:
    whole, records = train(tmp_path / "whole")

    run_and_kill(tmp_path / "killed", "saving")
    left = sorted(path.name for path in (tmp_path / "killed").iterdir())
    continued, again = train(tmp_path / "killed")

    # The tensors of the third epoch were there, its record was not.
    assert left == ["epoch-0002.safetensors", "epoch-0003.safetensors", "training.json"]
    assert equal(whole, continued) and without_time(records) == without_time(again)
    assert len(list((tmp_path / "killed").iterdir())) == 2


def test_an_interrupt_passes_through_and_keeps_the_finished_epochs(tmp_path: Path) -> None:
    def interrupt(done: int, total: int, text: str) -> None:
        if done == 25:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", progress=interrupt)
    seen: list[int] = []
    continued, _ = train(tmp_path / "stopped", progress=lambda done, total, text: seen.append(done))

    assert seen[0] == 23  # two epochs of 11 steps were finished
    assert equal(continued, train(tmp_path / "whole")[0])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    train(folder, section=SECTION.model_copy(update={"epochs": 1}))
    return folder


ONE = SECTION.model_copy(update={"epochs": 1})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"network": small_network(width=4)}, "architecture, starting weights"),
        ({"network": small_network(seed=1)}, "starting weights"),
        ({"teacher": small_network(seed=1)}, "teacher"),
        ({"teacher": None}, "teacher"),
        ({"section": ONE.model_copy(update={"momentum": 0.8})}, "finetune section"),
        ({"seed": 4}, "seed"),
    ],
)
def test_the_state_of_another_training_is_refused(
    finished: Path, change: dict[str, object], named: str
) -> None:
    message = f"training of another {named}\\. Delete that folder .* another `out`"
    with pytest.raises(TrainingError, match=message):
        train(finished, **{"section": ONE, **change})


def test_the_state_of_a_training_on_other_data_is_refused(finished: Path) -> None:
    other = load_data(DataSection(source="digits", batch=60), SHAPE, seed=5)

    with pytest.raises(TrainingError, match="training of another data"):
        train(finished, section=ONE, data=other)


@pytest.mark.parametrize("damage", [b"", b"\x10\0\0\0\0\0\0\0{}", None])
def test_a_damaged_state_is_an_error(tmp_path: Path, damage: bytes | None) -> None:
    train(tmp_path, section=ONE)
    [tensors] = tmp_path.glob("*.safetensors")
    tensors.unlink() if damage is None else tensors.write_bytes(damage)

    with pytest.raises(StorageError, match=r"epoch-0001\.safetensors.*Delete .* to train anew"):
        train(tmp_path, section=ONE)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")

    with pytest.raises(StorageError, match=r"Cannot write .*file/state/epoch-0001"):
        train(tmp_path / "file" / "state", section=ONE)


def kill_while_saving(folder: Path) -> None:
    save = pipeline.training.checkpoints.save_record

    def save_twice(record: pipeline.training.checkpoints.Checkpoint, path: Path) -> None:
        if len(record.epochs) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        save(record, path)

    pipeline.training.checkpoints.save_record = save_twice  # type: ignore[assignment]
    train(folder)


if __name__ == "__main__":
    if sys.argv[2] == "saving":
        kill_while_saving(Path(sys.argv[1]))
    else:
        train(Path(sys.argv[1]), progress=killed_at(int(sys.argv[2])))

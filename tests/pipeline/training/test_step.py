import math

import pytest
import torch
from torch import nn

from pipeline.recipe import FinetuneSection
from pipeline.training.step import distillation_loss, learning_rate_at, make_optimizer, repeatable


def test_the_rate_rises_in_a_line_and_falls_in_half_a_cosine() -> None:
    rates = [learning_rate_at(step, 12, 4, 0.8) for step in range(12)]

    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == pytest.approx(0.8)  # cos(0)
    assert rates[8] == pytest.approx(0.4)  # half of the way: cos(pi / 2)
    assert rates[10] == pytest.approx(0.4 * (1 - math.sqrt(0.5)))  # cos(3 pi / 4)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_a_warmup_as_long_as_the_training_only_rises() -> None:
    assert [learning_rate_at(step, 2, 2, 1.0) for step in range(2)] == [0.5, 1.0]


LOGITS = torch.tensor([[math.log(3), 0.0]])  # probabilities 3/4, 1/4
LABELS = torch.tensor([0])


def test_without_a_teacher_the_loss_is_the_cross_entropy() -> None:
    section = FinetuneSection(distill=0.7)

    assert distillation_loss(LOGITS, LABELS, None, section).item() == pytest.approx(math.log(4 / 3))


def test_label_smoothing_mixes_in_the_mean_over_the_classes() -> None:
    section = FinetuneSection(label_smoothing=0.2)

    expected = 0.9 * math.log(4 / 3) + 0.1 * math.log(4)
    assert distillation_loss(LOGITS, LABELS, None, section).item() == pytest.approx(expected)


def test_a_teacher_that_agrees_adds_nothing() -> None:
    section = FinetuneSection(distill=0.75)

    loss = distillation_loss(LOGITS, LABELS, LOGITS + 5, section)  # logits are up to a constant

    assert loss.item() == pytest.approx(0.25 * math.log(4 / 3))


def test_the_divergence_is_taken_at_the_temperature_and_scaled_by_its_square() -> None:
    section = FinetuneSection(distill=1.0, temperature=2.0)
    taught = torch.tensor([[math.log(9), 0.0]])  # at temperature 2: probabilities 3/4, 1/4
    logits = torch.zeros(1, 2)  # 1/2, 1/2

    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    loss = distillation_loss(logits, LABELS, taught, section)
    assert loss.item() == pytest.approx(4 * divergence)


def test_the_loss_is_a_mean_over_the_images() -> None:
    section = FinetuneSection(distill=0.5)
    once = distillation_loss(LOGITS, LABELS, -LOGITS, section)

    twice = distillation_loss(LOGITS.repeat(2, 1), LABELS.repeat(2), -LOGITS.repeat(2, 1), section)

    assert twice.item() == pytest.approx(once.item())


def test_norms_and_biases_do_not_decay() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
    section = FinetuneSection(learning_rate=0.1, weight_decay=0.5, momentum=0.9)
    optimizer = make_optimizer(module, section)
    before = {name: value.clone() for name, value in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)

    optimizer.step()

    # Nesterov's first step without a gradient: rate * decay * (1 + momentum) of the weight.
    share = {name: 1 - 0.1 * 0.5 * 1.9 if "weight" in name else 1.0 for name in before}
    share["1.weight"] = 1.0
    for name, value in module.named_parameters():
        torch.testing.assert_close(value.data, before[name] * share[name])


def test_frozen_parameters_are_not_trained() -> None:
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)

    optimizer = make_optimizer(module, FinetuneSection())

    assert [p.shape for group in optimizer.param_groups for p in group["params"]] == [(2, 2)]


def test_a_seed_set_within_does_not_reach_the_caller() -> None:
    state = torch.get_rng_state()

    with repeatable(torch.device("cpu")):
        torch.manual_seed(123)

    assert torch.equal(torch.get_rng_state(), state)

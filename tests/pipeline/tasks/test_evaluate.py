import math

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from hardware.errors import RunError
from hardware.runtimes import get_runtime
from hardware.runtimes.base import Engine, EngineSettings
from pipeline.errors import DataError, TrainingError
from pipeline.records import Network
from pipeline.tasks.evaluate import accuracy, engine_predictor, evaluating, torch_predictor

SHAPE = (2, 3, 3)
WEIGHT = np.random.default_rng(0).standard_normal((18, 4)).astype(np.float32)


def flat_network(weight: np.ndarray = WEIGHT) -> Network:
    linear = nn.Linear(18, 4, bias=False)
    linear.weight.data = torch.from_numpy(weight.T.copy())
    module = nn.Sequential(nn.Dropout(0.5), nn.Flatten(), linear)
    return Network(module=module, spec="tests:flat", arguments={}, input_shape=SHAPE)


def engine_of(batch: int, weight: np.ndarray = WEIGHT, outputs: int = 1) -> Engine:
    """Return ONNX Runtime's engine of `flatten(x) @ weight`, for batches of exactly this size."""
    nodes = [helper.make_node("Reshape", ["input", "shape"], ["flat"])]
    nodes += [helper.make_node("MatMul", ["flat", "weight"], [f"out{i}"]) for i in range(outputs)]
    graph = helper.make_graph(
        nodes,
        "flat",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, *SHAPE])],
        [
            helper.make_tensor_value_info(f"out{i}", TensorProto.FLOAT, [batch, 4])
            for i in range(outputs)
        ],
        [
            numpy_helper.from_array(weight, "weight"),
            numpy_helper.from_array(np.array([batch, 18], dtype=np.int64), "shape"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return get_runtime("ort").build(model, EngineSettings(threads=1))


def images_of(count: int) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def test_accuracy_and_loss_are_means_over_all_images() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [0.0, math.log(3)]])
    batches = [(logits[:2], torch.tensor([1, 0])), (logits[2:], torch.tensor([0]))]

    score = accuracy(lambda images: images, batches)

    # Probabilities of the true class: 1/2 (a tie goes to class 0), 3/4, 1/4.
    assert score.images == 3
    assert score.accuracy_pct == pytest.approx(100 / 3)
    assert score.loss == pytest.approx((math.log(2) + math.log(4 / 3) + math.log(4)) / 3)


def test_progress_counts_images() -> None:
    told: list[tuple[int, int, str]] = []
    batches = [(torch.eye(2), torch.tensor([0, 1])), (torch.eye(2)[:1], torch.tensor([1]))]

    accuracy(lambda x: x, batches, progress=lambda *news: told.append(news), total=3)

    assert told == [(2, 3, "accuracy 100.00 %"), (3, 3, "accuracy 66.67 %")]


def test_no_images_are_an_error() -> None:
    with pytest.raises(DataError, match="no images to evaluate"):
        accuracy(lambda images: images, [])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_numbers_are_an_error(value: float) -> None:
    with pytest.raises(TrainingError, match="NaN or infinite"):
        accuracy(lambda images: images * value, [(torch.ones(1, 2), torch.tensor([0]))])


@pytest.mark.parametrize("shape", [(1, 2), (1, 3, 1), (2, 3)])
def test_outputs_that_do_not_fit_the_labels_are_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(TrainingError, match=r"outputs of shape .* labels up to 2"):
        accuracy(lambda images: torch.zeros(shape), [(torch.ones(1), torch.tensor([2]))])


def test_a_network_is_evaluated_without_dropout_and_gets_its_mode_back() -> None:
    network = flat_network()
    network.module.train()
    network.module[1].eval()
    images = images_of(5)

    logits = torch_predictor(network)(images)

    torch.testing.assert_close(logits, images.flatten(1) @ torch.from_numpy(WEIGHT))
    assert [part.training for part in network.module] == [True, False, True]


def test_modes_come_back_after_an_error() -> None:
    module = nn.Sequential(nn.ReLU())

    with pytest.raises(KeyboardInterrupt), evaluating(module):
        raise KeyboardInterrupt

    assert module.training and module[0].training


@pytest.mark.runtime
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("count", [1, 4, 7])
def test_an_engine_of_any_batch_answers_for_every_image(batch: int, count: int) -> None:
    images = images_of(count)

    logits = engine_predictor(engine_of(batch))(images)

    torch.testing.assert_close(logits, torch_predictor(flat_network())(images))


@pytest.mark.runtime
def test_an_engine_reads_images_that_lie_channels_last() -> None:
    images = images_of(4)

    logits = engine_predictor(engine_of(4))(images.to(memory_format=torch.channels_last))

    torch.testing.assert_close(logits, images.flatten(1) @ torch.from_numpy(WEIGHT))


@pytest.mark.runtime
def test_an_engine_that_returns_nan_is_an_error() -> None:
    predict = engine_predictor(engine_of(1, WEIGHT * np.nan))

    with pytest.raises(RunError, match="returned NaN or infinity"):
        predict(images_of(1))


@pytest.mark.runtime
def test_images_of_another_shape_than_the_engine_takes_are_an_error() -> None:
    predict = engine_predictor(engine_of(1))

    with pytest.raises(RunError, match=r"takes images of shape \(2, 3, 3\); got \(2, 4, 4\)"):
        predict(torch.zeros(1, 2, 4, 4))


@pytest.mark.runtime
def test_an_engine_with_two_outputs_is_an_error() -> None:
    predict = engine_predictor(engine_of(1, outputs=2))

    with pytest.raises(RunError, match=r"has one output; this has \['out0', 'out1'\]"):
        predict(images_of(1))

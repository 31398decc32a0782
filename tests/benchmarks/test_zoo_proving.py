import onnx
import pytest
import torch

from benchmarks.zoo import proving
from benchmarks.zoo.proving import Evidence, difference, prove
from benchmarks.zoo.standardised import spread
from hardware.graph.channel_map import ChannelMap
from hardware.graph.model import shapes
from pipeline.channels.find import find_groups
from pipeline.errors import NetworkError, ProofError
from pipeline.networks.export import export_graph
from pipeline.records import Network
from tests import nets


def _case(name: str) -> tuple[Network, onnx.ModelProto, ChannelMap]:
    network = Network(
        module=nets.build(name), spec=name, arguments={}, input_shape=nets.INPUT_SHAPE
    )
    graph = export_graph(network)
    return network, graph, find_groups(graph)


def test_removing_is_masking_to_the_precision_of_float64() -> None:
    evidence = prove(*_case("residual"))

    assert evidence.precision == "float64"
    assert evidence.proof_error is not None and evidence.proof_error < 1e-13
    assert evidence.ort_parity < 1e-5 and evidence.export_error < 1e-5
    assert evidence.holds


def test_a_graph_that_torch_cannot_run_is_proved_in_float32(monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise NetworkError("no implementation of operator Odd")

    monkeypatch.setattr(proving, "_run", refuse)

    evidence = prove(*_case("residual"))

    assert evidence.precision == "float32" and "Odd" in evidence.note
    assert evidence.proof_error is not None and evidence.proof_error < 1e-3
    assert evidence.holds


def test_channels_that_are_coupled_wrongly_do_not_hold() -> None:
    network, graph, channels = _case("chain")
    crossed = [
        group.model_copy(
            update={
                "slices": tuple(
                    part.model_copy(update={"units": part.units[::-1]})
                    if part.role == "input"
                    else part
                    for part in group.slices
                )
            }
        )
        for group in channels.groups
    ]

    evidence = prove(network, graph, channels.model_copy(update={"groups": tuple(crossed)}))

    assert evidence.proof_error is not None and evidence.proof_error > 1e-2
    assert not evidence.holds


def test_a_graph_of_other_weights_is_noticed() -> None:
    network, graph, channels = _case("chain")
    with torch.no_grad():
        next(network.module.parameters()).mul_(2)

    assert prove(network, graph, channels).export_error > 1e-2


def test_what_float32_may_differ_by_is_too_much_in_float64() -> None:
    def holds(precision: str) -> bool:
        return Evidence(
            proof_error=1e-6,
            proved_groups=1,
            ort_parity=1e-6,
            export_error=1e-6,
            precision=precision,
        ).holds

    assert holds("float32") and not holds("float64")


def test_an_engine_that_only_the_runtimes_optimisations_change_holds_and_says_so(
    monkeypatch,
) -> None:
    deliver = proving._deliver

    def careless(model: onnx.ModelProto, image: torch.Tensor, *, optimized: bool = True) -> object:
        return [out * (1.01 if optimized else 1) for out in deliver(model, image, optimized=False)]

    monkeypatch.setattr(proving, "_deliver", careless)

    evidence = prove(*_case("chain"))

    assert evidence.ort_parity > 5e-3 and evidence.holds
    assert "unpruned network: 1e-02" in evidence.note


def test_an_engine_that_differs_in_any_case_does_not_hold(monkeypatch) -> None:
    deliver = proving._deliver

    def wrong(model: onnx.ModelProto, image: torch.Tensor, *, optimized: bool = True) -> object:
        return [out * 1.01 for out in deliver(model, image, optimized=optimized)]

    monkeypatch.setattr(proving, "_deliver", wrong)

    assert not prove(*_case("chain")).holds


def test_outputs_of_zeros_prove_nothing() -> None:
    with pytest.raises(ProofError, match="says nothing: the largest output is 0"):
        difference([torch.ones(2)], [torch.zeros(2)])


def test_groups_that_are_mixed_are_delivered_all_the_same() -> None:
    network, graph, channels = _case("layer_normed")
    assert [group.name for group in channels.groups if group.mixes] == ["stem"]

    evidence = prove(network, graph, channels)

    assert evidence.holds and evidence.proved_groups < len(channels.groups)
    assert evidence.ort_parity < 1e-5


def test_standardised_weights_are_proved_with_what_the_pruned_network_computes() -> None:
    network, graph, channels = _case("standardised")
    assert any(group.mixes for group in channels.groups)

    evidence = prove(network, graph, channels)

    assert evidence.proof_error is not None and evidence.proof_error < 1e-13
    assert evidence.proved_groups == len(channels.groups) and evidence.holds


def test_weights_go_back_to_the_places_of_the_channels_that_stay() -> None:
    _, graph, channels = _case("chain")
    second = channels.group("conv2")
    keep = {"conv1": (1, 4), "conv2": tuple(range(1, second.width))}
    weight = torch.rand(second.width - 1, 2, 3, 3)

    (whole,) = spread({"conv2.weight": weight}, shapes(graph), channels, keep).values()

    assert torch.equal(whole[1:, [1, 4]], weight)
    assert whole.count_nonzero() == weight.count_nonzero()


def test_a_weight_of_another_size_than_was_kept_is_refused() -> None:
    _, graph, channels = _case("chain")

    with pytest.raises(ProofError, match="kept is"):
        spread({"conv2.weight": torch.rand(1, 1, 3, 3)}, shapes(graph), channels, {})

"""Prove one network: removed == masked, and the engine equal to the pruned torch network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from benchmarks.zoo.standardised import (
    comparable,
    computed_weights,
    spread,
    with_outputs,
    without_standardising,
)
from hardware.graph.carve import carve
from hardware.graph.channel_map import ChannelMap, Keep
from hardware.graph.model import shapes
from pipeline.channels.checks import mask_graph, random_keep
from pipeline.channels.find import find_groups
from pipeline.errors import NetworkError, ProofError
from pipeline.networks.fold_norms import fold_norms
from pipeline.networks.graphform.module import GraphForm
from pipeline.networks.graphform.names import find_roles
from pipeline.records import Network
from pipeline.surgery.proof import outputs_of

# Of the largest output. Faithful surgery reaches some 1e-13 in float64 and 1e-6 in float32; a wrong
# channel shows as 0.1 and more.
TOLERANCES = {"float64": 1e-9, "float32": 1e-3}
Outputs = Sequence[Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """How far computations agree that should be one, relative to the largest output."""

    proof_error: float | None  # removed against masked; None where every group is mixed
    proved_groups: int  # that were compared so
    ort_parity: float  # the delivered engine, all groups pruned, against torch
    export_error: float  # the graph that is analysed against the network's class
    precision: str  # of the proof: "float64", or "float32" where torch cannot run the graph
    note: str = ""  # why it cannot, or why the engine differs
    plain_parity: float | None = None  # as ort_parity, without the runtime's optimisations

    @property
    def holds(self) -> bool:
        """Whether everything agrees as it should.

        An engine may differ because of the runtime's optimisations, if without them it does not.
        """
        single = TOLERANCES["float32"]
        proved = self.proof_error is None or self.proof_error < TOLERANCES[self.precision]
        parity = self.ort_parity if self.plain_parity is None else self.plain_parity
        return proved and parity < single and self.export_error < single


def prove(network: Network, graph: onnx.ModelProto, channels: ChannelMap) -> Evidence:
    """Compare removing with masking for a random half of every group, and deliver the result.

    The comparison is made in float64, on the graph form. Groups that an operator mixes are left out
    of it (unless the operator only computes weights); in the delivered network they are pruned too.

    Args:
        network: with random weights.
        graph: of the network, as exported: its weights are the network's.
        channels: of the graph.

    Raises:
        ProofError: shapes differ, or the comparison says nothing.
    """
    image = network.example()
    with torch.no_grad():
        whole = outputs_of(network.module(image))
    keep = random_keep(channels)
    try:
        return _in_float64(graph, channels, keep, image, whole)
    except (NetworkError, RuntimeError) as error:  # torch's operators raise RuntimeErrors
        note = f"{type(error).__name__}: {error}"[:300]
        return _in_float32(graph, channels, keep, image, whole, note)


def _in_float64(
    graph: onnx.ModelProto, channels: ChannelMap, keep: Keep, image: Tensor, whole: Outputs
) -> Evidence:
    full, removed = _run(graph, image), carve(graph, channels, keep)
    pruned = _run(removed, image)
    _refuse_other_shapes(pruned, full)
    error, count = _proof_error(graph, channels, keep, image, full)
    folded = fold_norms(removed)
    parity, plain, note = difference(_deliver(folded, image), pruned), None, ""
    if parity >= TOLERANCES["float32"]:
        plain = difference(_deliver(folded, image, optimized=False), pruned)
        unpruned = difference(_deliver(fold_norms(graph), image), full)
        note = (
            f"ONNX Runtime without its optimisations: {plain:.0e}; with them, the unpruned "
            f"network: {unpruned:.0e}"
        )
    return Evidence(
        proof_error=error,
        proved_groups=count,
        ort_parity=parity,
        export_error=difference(full, whole),
        precision="float64",
        note=note,
        plain_parity=plain,
    )


def _proof_error(
    graph: onnx.ModelProto, channels: ChannelMap, keep: Keep, image: Tensor, full: Outputs
) -> tuple[float | None, int]:
    """Return how far removing is from masking (None: every group is mixed), for how many groups."""
    exact = _exact(channels, keep)
    weights = computed_weights(graph) if len(exact) < len(keep) else {}
    if weights:
        plain = without_standardising(graph, weights)
        plain_channels = find_groups(plain)
        exact = comparable(channels, plain_channels, keep)
    if not exact:
        return None, 0
    carved = carve(graph, channels, exact)
    if weights:
        outputs = _run(with_outputs(carved, weights), image)
        removed, computed = outputs[: len(full)], outputs[len(full) :]
        given = spread(
            dict(zip(weights.values(), computed, strict=True)), shapes(graph), plain_channels, exact
        )
        masked = _run(mask_graph(plain, plain_channels, exact), image, given)
    else:
        removed, masked = _run(carved, image), _run(mask_graph(graph, channels, exact), image)
    if all(torch.equal(a, b) for a, b in zip(full, masked, strict=True)):
        raise ProofError("The proof says nothing: masking half of all channels changes nothing.")
    return difference(removed, masked), len(exact)


def _in_float32(
    graph: onnx.ModelProto,
    channels: ChannelMap,
    keep: Keep,
    image: Tensor,
    whole: Outputs,
    note: str,
) -> Evidence:
    """Compare in ONNX Runtime, without its optimisations where nothing is delivered."""
    removed = carve(graph, channels, keep)
    pruned = _deliver(removed, image, optimized=False)
    full = _deliver(graph, image, optimized=False)
    _refuse_other_shapes(pruned, full)
    error, exact = None, _exact(channels, keep)
    if exact:
        masked = _deliver(mask_graph(graph, channels, exact), image, optimized=False)
        error = difference(_deliver(carve(graph, channels, exact), image, optimized=False), masked)
    return Evidence(
        proof_error=error,
        proved_groups=len(exact),
        ort_parity=difference(_deliver(fold_norms(removed), image), pruned),
        export_error=difference(full, whole),
        precision="float32",
        note=note,
    )


def _exact(channels: ChannelMap, keep: Keep) -> Keep:
    """Return the choice without the groups that an operator mixes."""
    return {name: units for name, units in keep.items() if channels.group(name).mixes is None}


def _run(
    graph: onnx.ModelProto, image: Tensor, weights: Mapping[str, Tensor] | None = None
) -> Outputs:
    """Return what the graph computes in float64, in torch, with some of its weights replaced."""
    form: nn.Module = GraphForm(graph, find_roles(graph)).double().eval()
    with torch.no_grad():
        for name, weight in (weights or {}).items():
            form.get_parameter(name).copy_(weight)
        return outputs_of(form(image.double()))


def _deliver(model: onnx.ModelProto, image: Tensor, *, optimized: bool = True) -> Outputs:
    """Return what ONNX Runtime computes on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [torch.from_numpy(np.array(t)) for t in session.run(None, {"input": image.numpy()})]


def _refuse_other_shapes(pruned: Outputs, full: Outputs) -> None:
    given, expected = ([tuple(output.shape) for output in some] for some in (pruned, full))
    if given != expected:
        raise ProofError(f"The pruned network returns shapes {given}, the full one {expected}.")


def difference(one: Outputs, other: Outputs) -> float:
    """Return the largest difference, relative to the largest value of that output.

    Raises:
        ProofError: shapes differ, or nothing of the image arrives at an output.
    """
    _refuse_other_shapes(one, other)
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        largest = float(b.abs().max())
        if not 0 < largest < float("inf"):
            raise ProofError(f"The proof says nothing: the largest output is {largest}.")
        worst = max(worst, float((a.double() - b.double()).abs().max()) / largest)
    return worst

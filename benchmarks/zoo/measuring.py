"""Analyse, prune and prove one network of the zoo: runs in a process of its own."""

import argparse
import resource
import time
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from benchmarks.zoo.networks import build
from benchmarks.zoo.records import Entry
from hardware.carving import carve
from hardware.channels import ChannelMap
from hardware.cleaning import fold_norms
from hardware.graphs import shapes
from pipeline.channels import check_carved, find_groups
from pipeline.channels.silencing import random_keep, silence
from pipeline.counting import frozen_rows
from pipeline.errors import ProofError
from pipeline.exporting import export_graph
from pipeline.proving import outputs_of
from pipeline.pruning import fit_to_class
from pipeline.randomizing import randomised
from pipeline.records import Network

TOLERANCE = 1e-3  # float32 on deep random networks; a wrong channel shows as 0.1 and more
Outputs = list[npt.NDArray[Any]]  # Any: float32 throughout


def measure(name: str, with_class: bool) -> Entry:
    """Return what the analysis makes of one network; errors are part of the result."""
    begun = time.perf_counter()
    try:
        entry = _measure(build(name), name, with_class)
    except ProofError as error:
        entry = Entry(name=name, status="wrong proof", detail=str(error))
    except Exception as error:  # whatever breaks is what the zoo is there to show
        entry = Entry(name=name, status="failed", detail=f"{type(error).__name__}: {error}"[:500])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return entry.model_copy(update={"whole_seconds": time.perf_counter() - begun, "peak_mib": peak})


def _measure(network: Network, name: str, with_class: bool) -> Entry:
    network = replace(network, module=randomised(network).float())
    graph = export_graph(network)
    begun = time.perf_counter()
    channels = find_groups(graph)
    seconds = time.perf_counter() - begun
    keep = random_keep(channels)
    check_carved(channels, keep, carve(graph, channels, keep))
    proof_error, ort_parity = _proof(network, graph, channels)
    is_wrong = any(
        error is not None and not error < TOLERANCE for error in (proof_error, ort_parity)
    )
    share = conv_share(graph, channels)
    return Entry(
        name=name,
        status="wrong proof" if is_wrong else "ok" if share else "not prunable",
        seconds=seconds,
        nodes=len(graph.graph.node),
        groups=len(channels.prunable),
        mixing_groups=sum(group.mixes is not None for group in channels.prunable),
        prunable_share=share,
        frozen=_frozen(graph, channels),
        proof_error=proof_error,
        ort_parity=ort_parity,
        class_share=conv_share(graph, fit_to_class(network, channels)) if with_class else None,
    )


def _proof(
    network: Network, graph: onnx.ModelProto, channels: ChannelMap
) -> tuple[float | None, float | None]:
    """Return how far removing is from masking, and the delivered engine from masked torch.

    Both for a random half of every group, leaving out groups that an operator mixes; None where no
    group is left.
    """
    keep = random_keep(channels)
    exact = {n: units for n, units in keep.items() if channels.group(n).mixes is None}
    if not exact:
        return None, None
    image = network.example()
    masked = silence(graph, channels, exact)
    removed = carve(graph, channels, exact)
    delivered = _run(fold_norms(removed), image, optimized=True)
    with torch.no_grad():
        expected = [t.numpy() for t in outputs_of(_with_weights(network.module, masked)(image))]
    proof = _difference(_run(removed, image), _run(masked, image))
    return proof, _difference(delivered, expected)


def _with_weights(module: nn.Module, graph: onnx.ModelProto) -> nn.Module:
    """Return the module with the weights that the graph holds under the same names."""
    own = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for tensor in graph.graph.initializer:
            if tensor.name in own:
                own[tensor.name].copy_(torch.from_numpy(numpy_helper.to_array(tensor).copy()))
    return module


def _run(model: onnx.ModelProto, image: torch.Tensor, *, optimized: bool = False) -> Outputs:
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
    return list(session.run(None, {"input": image.numpy()}))


def _difference(one: Outputs, other: Outputs) -> float:
    """Return the largest difference, relative to the largest value of that output.

    Raises:
        ProofError: shapes differ, or nothing of the image arrives at an output.
    """
    if [a.shape for a in one] != [b.shape for b in other]:
        raise ProofError(f"Shapes {[a.shape for a in one]} are not {[b.shape for b in other]}.")
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        largest = float(np.abs(b).max())
        if not 0 < largest < float("inf"):
            raise ProofError(f"The proof says nothing: the largest output is {largest}.")
        worst = max(worst, float(np.abs(a - b).max()) / largest)
    return worst


def _frozen(graph: onnx.ModelProto, channels: ChannelMap) -> dict[str, int]:
    """Return by reason how many output channels of convolutions stay, the most frequent first."""
    kernels = {tensor.name for tensor in graph.graph.initializer if len(tensor.dims) > 2}
    axes = tuple(axis for axis in channels.frozen if axis.parameter in kernels)
    rows = frozen_rows(channels.model_copy(update={"groups": (), "frozen": axes}))
    return {row.reason: row.channels for row in rows}


def conv_share(graph: onnx.ModelProto, channels: ChannelMap) -> float:
    """Return which share of the output channels of all convolutions may be removed.

    A convolution's weight may be computed: then the parameters that it is computed from count.
    """
    known = shapes(graph)
    sources: dict[str, set[str]] = {t.name: {t.name} for t in graph.graph.initializer}
    free = _free_filters(channels)
    prunable = total = 0
    for node in graph.graph.node:
        inputs = [name for name in node.input if name]
        if inputs and all(name in sources for name in inputs):
            origin = set().union(*(sources[name] for name in inputs))
            sources.update(dict.fromkeys(node.output, origin))
        if node.op_type in ("Conv", "ConvTranspose"):
            outputs = known[node.output[0]][1]
            found = max((free.get(name, 0) for name in sources.get(node.input[1], ())), default=0)
            prunable += min(found, outputs)
            total += outputs
    return prunable / total if total else 0.0


def _free_filters(channels: ChannelMap) -> dict[str, int]:
    """Return by parameter how many of its filters may be removed."""
    free: dict[str, int] = {}
    for group in channels.prunable:
        for part in group.slices:
            if part.role in ("filter", "depthwise"):
                count = sum(unit >= 0 for unit in part.units)
                free[part.parameter] = free.get(part.parameter, 0) + count
    return free


def main() -> None:
    """Measure the network that is named and print the result as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--class-share", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print()  # a network may have printed half a line
    print(measure(options.name, options.class_share).model_dump_json())


if __name__ == "__main__":
    main()

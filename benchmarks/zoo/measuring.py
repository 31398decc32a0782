"""Analyse, prune and prove one network of the zoo: runs in a process of its own."""

import argparse
import resource
import time
import warnings
from dataclasses import replace

import onnx
import torch

from benchmarks.zoo.networks import NOTES, build
from benchmarks.zoo.proving import prove
from benchmarks.zoo.records import WRONG, Entry
from hardware.graph.carve import carve
from hardware.graph.channel_map import ChannelMap
from hardware.graph.model import shapes
from hardware.graph.operators import CONVOLUTIONS
from pipeline.channels.checks import check_carved, random_keep
from pipeline.channels.counts import frozen_rows
from pipeline.channels.find import find_groups
from pipeline.errors import ProofError
from pipeline.networks.analyse import fit_to_class
from pipeline.networks.export import export_graph
from pipeline.records import Network
from pipeline.surgery.proof import randomised


def measure(name: str, with_class: bool) -> Entry:
    """Return what the analysis makes of one network; errors are part of the result."""
    begun = time.process_time()
    try:
        entry = _measure(build(name), name, with_class)
    except ProofError as error:
        entry = Entry(name=name, status=WRONG, detail=str(error))
    except Exception as error:  # whatever breaks is what the zoo is there to show
        entry = Entry(name=name, status="failed", detail=f"{type(error).__name__}: {error}"[:500])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return entry.model_copy(update={"whole_seconds": time.process_time() - begun, "peak_mib": peak})


def _measure(network: Network, name: str, with_class: bool) -> Entry:
    network = replace(network, module=randomised(network).float())
    graph = export_graph(network)
    begun = time.process_time()
    channels = find_groups(graph)
    seconds = time.process_time() - begun
    keep = random_keep(channels)
    check_carved(channels, keep, carve(graph, channels, keep))
    evidence = prove(network, graph, channels)
    share = conv_share(graph, channels)
    return Entry(
        name=name,
        status=WRONG if not evidence.holds else "ok" if share else "not prunable",
        detail=evidence.note or NOTES.get(name, ""),
        seconds=seconds,
        nodes=len(graph.graph.node),
        groups=len(channels.prunable),
        mixing_groups=sum(group.mixes is not None for group in channels.prunable),
        prunable_share=share,
        frozen=_frozen(graph, channels),
        proof_error=evidence.proof_error,
        proved_groups=evidence.proved_groups,
        proof_precision=evidence.precision,
        ort_parity=evidence.ort_parity,
        export_error=evidence.export_error,
        class_share=conv_share(graph, fit_to_class(network, channels)) if with_class else None,
    )


def _frozen(graph: onnx.ModelProto, channels: ChannelMap) -> dict[str, int]:
    """Return by reason how many output channels of convolutions stay, the most frequent first."""
    kernels = {tensor.name for tensor in graph.graph.initializer if len(tensor.dims) > 2}
    axes = tuple(axis for axis in channels.frozen if axis.parameter in kernels)
    rows = frozen_rows(channels.model_copy(update={"groups": (), "frozen": axes}))
    return {row.reason: row.channels for row in rows}


def conv_share(graph: onnx.ModelProto, channels: ChannelMap) -> float:
    """Return which share of the output channels of all convolutions may be removed.

    A convolution's weight may be computed: then the parameters that it is computed from count. A
    convolution that runs several times counts once.
    """
    known = shapes(graph)
    sources: dict[str, set[str]] = {t.name: {t.name} for t in graph.graph.initializer}
    free = _free_filters(channels)
    seen: set[frozenset[str]] = set()
    prunable = total = 0
    for node in graph.graph.node:
        inputs = [name for name in node.input if name]
        if inputs and all(name in sources for name in inputs):
            origin = set().union(*(sources[name] for name in inputs))
            sources.update(dict.fromkeys(node.output, origin))
        if node.op_type in CONVOLUTIONS:
            weights = frozenset(sources.get(node.input[1], {node.output[0]}))
            if weights in seen:
                continue
            seen.add(weights)
            outputs = known[node.output[0]][1]
            found = max((free.get(name, 0) for name in weights), default=0)
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

"""Torch-Pruning on one network of the zoo, by the same rule: runs in a process of its own.

Needs `pip install torch-pruning`, which nothing else here does.
"""

import argparse
import time
import warnings

import torch
from torch import nn

from benchmarks.zoo.networks import build
from benchmarks.zoo.records import Peer
from pipeline.surgery.proof import outputs_of

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)


def measure(name: str) -> Peer:
    """Prune a random half of every group; return the share of convolution output channels reached.

    Torch-Pruning is used as its documentation says: the pruner of every group, with the layers
    named that make an output of the network. A convolution counts with all its channels once it
    lost any, so nothing is held against a tool that keeps multiples of a group. The pruned network
    must run and give outputs of the shapes it gave before; what it computes is not compared.
    """
    import torch_pruning

    network = build(name)
    module, image = network.module, network.example()
    with torch.no_grad():
        before = [tuple(output.shape) for output in outputs_of(module(image))]
    filters = {n: m.weight.shape for n, m in module.named_modules() if isinstance(m, CONVOLUTIONS)}
    widths = {n: m.out_channels for n, m in module.named_modules() if isinstance(m, CONVOLUTIONS)}
    torch.manual_seed(0)
    begun = time.process_time()
    pruner = torch_pruning.pruner.BasePruner(
        module,
        image,
        importance=torch_pruning.importance.RandomImportance(),
        pruning_ratio=0.5,
        ignored_layers=_last_layers(module, image),
    )
    pruner.step()
    seconds = time.process_time() - begun
    with torch.no_grad():
        after = [tuple(output.shape) for output in outputs_of(module(image))]
    lost = sum(
        widths[n] for n, m in module.named_modules() if n in filters and m.out_channels < widths[n]
    )
    share = lost / sum(widths.values()) if widths else 0.0
    if before != after:
        detail = f"outputs have shapes {after} instead of {before}"[:300]
        return Peer(status="wrong", seconds=seconds, prunable_share=share, detail=detail)
    return Peer(status="ok" if share else "not prunable", seconds=seconds, prunable_share=share)


def _last_layers(module: nn.Module, image: torch.Tensor) -> list[nn.Module]:
    """Return the layers from which an output comes without another layer in between.

    They are found by what the autograd graph holds between the outputs and the nearest weights.
    """
    owners = {
        id(m.weight): m
        for m in module.modules()
        if isinstance(m, (*CONVOLUTIONS, nn.Linear)) and isinstance(m.weight, nn.Parameter)
    }
    found: dict[int, nn.Module] = {}
    for output in outputs_of(module(image)):
        waiting, seen = [output.grad_fn], set()
        while waiting:
            function = waiting.pop()
            if function is None or function in seen:
                continue
            seen.add(function)
            parents = [parent for parent, _ in function.next_functions]
            weights = [owners[key] for p in parents if (key := _parameter(p)) in owners]
            found.update({id(layer): layer for layer in weights})
            if not weights:
                waiting += parents
    return list(found.values())


def _parameter(function: object) -> int | None:
    """Return the id of the parameter that a leaf of the autograd graph holds, seen transposed."""
    while function is not None and type(function).__name__ in ("TBackward0", "TransposeBackward0"):
        function = function.next_functions[0][0]  # type: ignore[attr-defined]
    variable = getattr(function, "variable", None)
    return None if variable is None else id(variable)


def main() -> None:
    """Measure the network that is named and print the result as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    name = parser.parse_args().name
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        peer = measure(name)
    except Exception as error:  # the tool raises whatever it runs into: that is the result
        peer = Peer(status="failed", detail=f"{type(error).__name__}: {error}"[:300])
    print()
    print(peer.model_dump_json())


if __name__ == "__main__":
    main()

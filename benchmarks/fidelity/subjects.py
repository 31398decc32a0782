"""The networks whose latency is predicted, and the plans that their tables never saw."""

import numpy as np

from hardware.graph.channel_map import ChannelMap
from hardware.latency.variant import Template
from pipeline.networks.analyse import Subject, analyse
from pipeline.networks.load import load_network
from pipeline.planning.widths import candidate_widths
from pipeline.recipe import ModelSection

Candidates = dict[str, tuple[int, ...]]

CIFAR_RESNET = "benchmarks.networks:cifar_resnet"
NETWORKS = {
    "resnet18": ModelSection(name="torchvision:resnet18", input_shape=(3, 224, 224)),
    "resnet34": ModelSection(name="torchvision:resnet34", input_shape=(3, 224, 224)),
    "mobilenet_v2": ModelSection(name="torchvision:mobilenet_v2", input_shape=(3, 224, 224)),
    "resnet20": ModelSection(name=CIFAR_RESNET, arguments={"depth": 20}, input_shape=(3, 32, 32)),
    "demo": ModelSection(name="benchmarks.networks:digits_resnet", input_shape=(1, 32, 32)),
    "resnet56": ModelSection(name=CIFAR_RESNET, arguments={"depth": 56}, input_shape=(3, 32, 32)),
}
UNIFORM = (0.25, 0.5, 0.75)


def subject_of(
    name: str, input_shape: tuple[int, int, int] = (3, 224, 224)
) -> tuple[Subject, Candidates]:
    """Return a network with random weights, batch 1, and every width that a plan may choose.

    Args:
        name: one of `NETWORKS`, or what a recipe takes as `model.name`: `timm:NAME`,
            `torchvision:NAME`, an ONNX file.
        input_shape: channels, height, width; of names that are not among `NETWORKS`.
    """
    section = NETWORKS.get(name) or ModelSection(name=name, input_shape=input_shape)
    subject = analyse(load_network(section), batch=1)
    return subject, candidate_widths(subject.channels, ())


def template_of(subject: Subject) -> Template:
    """Return what a device measures of a network."""
    return Template(model=subject.template, channels=subject.channels, layers=subject.layers)


def held_out(
    candidates: Candidates, channels: ChannelMap, count: int, seed: int
) -> list[tuple[str, dict[str, int]]]:
    """Return plans with their names: random ones, then those with one share for all groups.

    In a random plan every group has a random candidate width. The groups of a branch are 0
    together, as often as 0 is drawn among the widths of its first group.
    """
    generator = np.random.default_rng(seed)
    alive = {name: [w for w in widths if w] for name, widths in candidates.items()}
    plans = []
    for _ in range(count):
        widths = {name: int(generator.choice(known)) for name, known in alive.items()}
        for branch in channels.branches:
            known = [candidates.get(group, (1,)) for group in branch.groups]
            is_removable = all(0 in found for found in known)
            if is_removable and generator.random() < 1 / len(known[0]):
                widths |= dict.fromkeys(branch.groups, 0)
        plans.append(("random", widths))
    for share in UNIFORM:
        widths = {n: min(ws, key=lambda w: abs(w - share * max(ws))) for n, ws in alive.items()}
        plans.append((f"{share:.0%} of all", widths))
    return plans

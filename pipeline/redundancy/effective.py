"""Redundancy by the gradients of a group's filters: how many directions the loss can tell apart.

Effective filter analysis (Zhou, Lian, Yin, Wang, "A Hierarchical Pruning Algorithm by Effective
Filters", 2022, arXiv:2206.03596). Row j of the gradient matrix is the gradient of the loss by the
weights of channel j, over calibration batches and coupled layers. Where its singular values fall
off, fewer filters would move the loss in as many directions: those are the effective filters. Three
singularities make a filter ineffective:

- *elimination*: its row is zero, the loss does not feel it;
- *overlap*: its row is another one's, but for the size;
- *linear*: its row is a combination of several others.

Status: that redundancy is estimated from a deficit of the gradient matrix, the three singularities
and the singular values are in the abstract and in a summary. The matrix, the thresholds, the counts
by energy and by entropy, and the uncertainty are reconstructions of ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hardware.records import Record
from pipeline.errors import PipelineError
from pipeline.evidence.needs import filters_of, gradients_of
from pipeline.records import Floor, GroupView

RELATIVE = 0.01  # singular values below this share of the largest do not count
ENERGY = 0.99  # share of the summed squares that the counted ones must hold
SAME = 1e-4  # 1 - |cosine| of rows that overlap
ROUNDING = 1e-5  # rows below this share of the largest are zero
SQUARE_ROUNDING = 1e-6  # likewise squared singular values, of products taken in float32
COUNTS = ("by_energy", "by_threshold", "by_entropy")
RESAMPLES = 12
MIDDLE = (0.05, 0.95)  # quantiles of the resamples that bound what is reported


@dataclass(frozen=True, slots=True, kw_only=True)
class Effective:
    """How many filters of a group are effective, by three counts, and why the others are not."""

    by_threshold: float
    by_energy: float
    by_entropy: float
    elimination: int
    overlap: int
    linear: int


class MaximumCompression(Record):
    """The largest share of all prunable filters that may go, by one count of effective filters."""

    count: str
    share: float
    low: float  # of resampled calibration batches, 5 %
    high: float  # 95 %


def by_energy(group: GroupView) -> Floor:
    """Return the floor by the fewest singular values that hold 99 % of the squared gradient.

    Args:
        group: coupled layers, with gradients of several batches.

    Returns:
        floor = effective filters, at least 1; score = width / effective filters, 1 = none is
        redundant. The detail has all counts, the singularities, and the 5 to 95 % interval of
        bootstrap resamples of the batches.

    Raises:
        PipelineError: no gradients, or too few to tell this many filters apart.
    """
    return _floor(group, "by_energy")


def by_threshold(group: GroupView) -> Floor:
    """Return the floor by the singular values above 1 % of the largest; see `by_energy`."""
    return _floor(group, "by_threshold")


def by_entropy(group: GroupView) -> Floor:
    """Return the floor by the exponential of the squared values' entropy; see `by_energy`."""
    return _floor(group, "by_entropy")


def effective_filters(products: Tensor) -> Effective:
    """Return the effective filters of a gradient matrix, given by the products of its rows.

    Args:
        products: `(width, width)`, the matrix times its transpose.
    """
    squares = torch.linalg.eigvalsh(products.double()).clamp_min(0).flip(0)
    largest = float(squares[0])
    if largest == 0:
        width = len(products)
        return Effective(
            by_threshold=0, by_energy=0, by_entropy=0, elimination=width, overlap=0, linear=0
        )
    shares = squares / squares.sum()
    # Shares that are exactly full must not be missed by rounding.
    energy = int((shares.cumsum(0) < ENERGY - 1e-9).sum()) + 1
    eliminated, overlapping = _singularities(products)
    rank = int((squares > SQUARE_ROUNDING * largest).sum())
    return Effective(
        by_threshold=int((squares > RELATIVE**2 * largest).sum()),
        by_energy=energy,
        by_entropy=math.exp(float(torch.special.entr(shares).sum())),
        elimination=eliminated,
        overlap=overlapping,
        linear=max(0, len(products) - eliminated - overlapping - rank),
    )


def maximum_compression(views: Sequence[GroupView]) -> tuple[MaximumCompression, ...]:
    """Return how much of a network may go before groups lose effective filters, by each count.

    All groups are resampled with the same batches, so that what batches share does not average
    out: the interval is that of the network. A resample has fewer different batches, so it sees
    fewer effective filters: where the interval begins at the share itself, more images would lower
    both.

    Args:
        views: of every group, with gradients of several batches.

    Raises:
        PipelineError: as `by_energy`; or there are no views.
    """
    if not views:
        raise PipelineError("No group can be pruned, so there is no compression to estimate.")
    width = sum(view.width for view in views)
    kept, drawn = torch.zeros(len(COUNTS)), torch.zeros(RESAMPLES, len(COUNTS))
    for view in views:
        products = products_of(view)
        kept += _counts(products.sum(dim=0)).clamp_min(1)
        drawn += _resampled(products).clamp_min(1)
    bounds = (1 - drawn / width).quantile(torch.tensor(MIDDLE), dim=0)
    found = []
    for place, count in enumerate(COUNTS):
        share = 1 - float(kept[place]) / width
        found.append(
            MaximumCompression(
                count=count.removeprefix("by_"),
                share=share,
                low=min(float(bounds[0, place]), share),
                high=max(float(bounds[1, place]), share),
            )
        )
    return tuple(found)


def _floor(group: GroupView, count: str) -> Floor:
    products = products_of(group)
    found = effective_filters(products.sum(dim=0))
    drawn = _resampled(products)[:, COUNTS.index(count)]
    low, high = drawn.quantile(torch.tensor(MIDDLE)).tolist()
    effective = max(1.0, getattr(found, count))
    low, high = min(low, effective), max(high, effective)  # resamples see fewer batches
    return Floor(
        group=group.name,
        width=group.width,
        floor=min(group.width, math.ceil(effective - ROUNDING)),
        score=max(1.0, group.width / effective),
        detail=(
            f"effective filters {found.by_energy:g} by energy, {found.by_threshold:g} by "
            f"threshold, {found.by_entropy:.1f} by entropy of {group.width}; {count[3:]} from "
            f"{low:.1f} to {high:.1f} over {len(products)} batches; singularities: "
            f"{found.elimination} elimination, {found.overlap} overlap, {found.linear} linear"
        ),
    )


def products_of(group: GroupView) -> Tensor:
    """Return `(batches, width, width)` products of gradient rows, coupled layers side by side.

    Raises:
        PipelineError: no learned filters, no gradients, or fewer columns than filters.
    """
    filters = filters_of(group)
    layers = gradients_of(group, group.filter_gradients, filters, "Measure effective")
    batches = len(layers[0])
    columns = batches * sum(gradient.shape[2] for gradient in layers)
    if columns < group.width:
        raise PipelineError(
            f"Measure effective sees {columns} gradient columns of group {group.name} in {batches} "
            f"batches, too few to tell {group.width} filters apart. Use more batches: raise "
            "plan.calibration_images or lower data.batch."
        )
    largest = max(float(gradient.abs().max()) for gradient in layers) or 1.0
    found = torch.zeros(batches, group.width, group.width)
    for gradient in layers:
        scaled = gradient / largest  # squares of small gradients would underflow
        found += scaled @ scaled.transpose(1, 2)
    return found


def _resampled(products: Tensor) -> Tensor:
    """Return all counts on bootstrap resamples of the batches, the same ones for every group.

    `(resamples, counts)`.
    """
    draw = torch.Generator().manual_seed(0)
    batches = len(products)
    found = []
    for _ in range(RESAMPLES):
        times = torch.bincount(
            torch.randint(batches, (batches,), generator=draw), minlength=batches
        )
        found.append(_counts(torch.einsum("b,bij->ij", times.float(), products)))
    return torch.stack(found)


def _counts(products: Tensor) -> Tensor:
    """Return the counts in the order of `COUNTS`."""
    found = effective_filters(products)
    return torch.tensor([float(getattr(found, count)) for count in COUNTS])


def _singularities(products: Tensor) -> tuple[int, int]:
    """Return how many rows are zero, and how many repeat an earlier row but for the size."""
    sizes = products.diagonal()
    live = sizes > ROUNDING**2 * sizes.max()
    inner = products[live][:, live]
    scale = inner.diagonal().rsqrt()
    same = (inner * scale[:, None] * scale).abs() >= 1 - SAME
    return int((~live).sum()), int(same.tril(diagonal=-1).any(dim=1).sum())

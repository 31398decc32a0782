"""What the layers that read a pruning group receive on calibration images, in one pass.

A group's *responses* are summed up where they are read: `collect_responses` puts a `Watch` on every
reader, runs the images once, and returns each watch's summary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hardware.graph.channel_map import ChannelMap, Group, ParameterSlice
from pipeline.errors import PipelineError
from pipeline.records import Responses
from pipeline.tasks.evaluate import evaluating

Layer = nn.Conv2d | nn.ConvTranspose2d | nn.Linear

PLACES = 10  # random places per image and layer, as ThiNet draws them
CHUNK = 32  # images at a time
RANK_IMAGES = 8  # the rank of a map hardly depends on the image (HRank)
RANK_PX = 32  # larger maps are thinned evenly, so that a rank is at most this


def collect_responses(
    module: nn.Module, channels: ChannelMap, batches: Sequence[tuple[Tensor, Tensor]], seed: int = 0
) -> dict[str, tuple[Responses, ...]]:
    """Return per prunable group what every layer that reads it receives.

    What a layer reads is what matters to it: it comes after batch norms, activations, gates and
    additions. Only convolutions and linear layers that run as modules can be watched; a group that
    none of them reads is watched at the outputs of the layers that produce it, in a second pass.

    Memory, besides the pass itself: per reader two matrices `(width, width)` and one row of means
    per image. Hooks are removed and modes put back, also after an error.

    Args:
        module: the trained network, run in eval mode without gradients.
        channels: its channel map.
        batches: images `(batch, channels, height, width)`; the labels are not read.
        seed: of the random places.

    Returns:
        Per group one entry per reader; a group where nothing can be watched is left out.

    Raises:
        PipelineError: there are no images, or a response is not a number.
    """
    if not batches:
        raise PipelineError("There are no calibration images: raise plan.calibration_images.")
    draw = torch.Generator().manual_seed(seed)
    layers = {
        name: layer
        for name, layer in module.named_modules(remove_duplicate=False)
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)
    }
    watches = [
        watch for group in channels.prunable for watch in _watches(layers, group, "input", draw)
    ]
    _run(module, watches, batches)
    seen = {watch.group for watch in watches if watch.images}
    missing = [group for group in channels.prunable if group.name not in seen]
    makers = [watch for group in missing for watch in _watches(layers, group, "filter", draw)]
    if makers:
        _run(module, makers, batches)
    found: dict[str, list[Responses]] = {}
    for watch in [*watches, *makers]:
        if watch.images:
            found.setdefault(watch.group, []).append(watch.summary())
    return {name: tuple(summaries) for name, summaries in found.items()}


@dataclass(slots=True, kw_only=True)
class Watch:
    """One place where a group is watched, and what was seen there so far."""

    group: str
    width: int
    reader: str
    layer: Layer
    reads: bool  # the layer's input is watched, not its output
    places: Tensor  # (positions,) channels of the layer's input or output
    owners: Tensor  # (positions,) the channel of the group that each belongs to
    draw: torch.Generator
    images: int = 0
    values: int = 0  # per channel
    rows: int = 0
    product_rows: int = 0
    rank_images: int = 0
    active: Tensor = field(default_factory=lambda: torch.zeros(()))
    magnitude: Tensor = field(default_factory=lambda: torch.zeros(()))
    ranks: Tensor = field(default_factory=lambda: torch.zeros(()))
    pooled: list[Tensor] = field(default_factory=list)
    shift: Tensor | None = None  # about the mean: a covariance about it keeps its digits
    sums: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))
    products: Tensor = field(default_factory=lambda: torch.zeros(()))

    def see(self, value: object) -> None:
        """Add what one call of the layer read or gave."""
        least = 2 if isinstance(self.layer, nn.Linear) else 4
        if not isinstance(value, Tensor) or value.ndim < least:
            return
        maps = self._maps(value.detach())
        flat = maps.flatten(2)
        images, _, size = flat.shape
        self.images += images
        self.values += images * size
        self.active = self.active + self._by_channel((flat > 0).float().sum(dim=(0, 2)))
        self.magnitude = self.magnitude + self._by_channel(flat.abs().sum(dim=(0, 2)))
        self.pooled.append(self._by_channel(flat.mean(dim=2)))
        self._rank(maps[: RANK_IMAGES - self.rank_images])
        # Of a map of few places, all that it has: the same response twice tells nothing new.
        chosen = torch.randint(0, size, (images, 1, min(PLACES, size)), generator=self.draw)
        rows = flat.gather(2, chosen.to(flat.device).expand(-1, flat.shape[1], -1))
        rows = self._by_channel(rows.movedim(1, 2).flatten(0, 1))
        if self.shift is None:
            self.shift = rows.mean(dim=0)
        centred = rows - self.shift
        self.rows += len(rows)
        self.sums = self.sums + centred.sum(dim=0)
        self.squares = self.squares + centred.T @ centred
        self._multiply(value.detach(), rows)

    def summary(self) -> Responses:
        """Return what was seen.

        Raises:
            PipelineError: a response was not a number.
        """
        if not bool(self.magnitude.isfinite().all()):
            raise PipelineError(
                f"What {self.reader} reads on calibration images is not a number. Check the "
                "weights, and data.mean and data.std in the recipe."
            )
        mean = self.sums / self.rows
        return Responses(
            reader=self.reader,
            active=(self.active / self.values).cpu(),
            magnitude=(self.magnitude / self.values).cpu(),
            pooled=torch.cat(self.pooled).cpu(),
            map_ranks=(self.ranks / max(self.rank_images, 1)).cpu(),
            covariance=(self.squares / self.rows - mean[:, None] * mean).cpu(),
            contributions=(self.products / max(self.product_rows, 1)).cpu(),
            rows=self.rows,
        )

    def _maps(self, value: Tensor) -> Tensor:
        """Return the watched channels as `(images, positions, ...)`, float32."""
        if isinstance(self.layer, nn.Linear):
            value = value.movedim(-1, 1) if value.ndim > 2 else value[:, :, None]
        return value.index_select(1, self.places.to(value.device)).float()

    def _by_channel(self, values: Tensor, total: bool = False) -> Tensor:
        """Return the mean (or sum) over the positions of every channel, along the last axis."""
        owners = self.owners.to(values.device)
        found = values.new_zeros(*values.shape[:-1], self.width).index_add_(-1, owners, values)
        return found if total else found / torch.bincount(owners, minlength=self.width).clamp_min(1)

    def _rank(self, maps: Tensor) -> None:
        """Add the ranks of some images' maps; what is no map counts as one row."""
        if not len(maps) or not bool(maps.isfinite().all()):
            return  # the summary refuses what is not a number
        if maps.ndim != 4:
            maps = maps.flatten(2)[:, :, None]
        tall, wide = (-(-size // RANK_PX) for size in maps.shape[2:])
        ranks = torch.linalg.matrix_rank(maps[:, :, ::tall, ::wide].cpu()).float()
        self.ranks = self.ranks + self._by_channel(ranks.sum(dim=0))
        self.rank_images += len(maps)

    def _multiply(self, value: Tensor, rows: Tensor) -> None:
        """Add the products of what channels contribute to outputs, or of responses at a maker."""
        if self.reads:
            rows = contributions(self.layer, value.float(), PLACES, self.draw)
            rows = self._by_channel(rows[:, self.places.to(rows.device)], total=True)
        self.product_rows += len(rows)
        self.products = self.products + rows.T @ rows


def _watches(
    layers: Mapping[str, Layer], group: Group, role: str, draw: torch.Generator
) -> Iterator[Watch]:
    """Yield a watch at every layer that reads (`input`) or makes (`filter`) a group."""
    for part in group.slices:
        name, _, attribute = part.parameter.rpartition(".")
        layer = layers.get(name)
        if part.role != role or attribute != "weight" or layer is None:
            continue
        owners = _owners_of(layer, part)
        places = (owners >= 0).nonzero().flatten()
        yield Watch(
            group=group.name,
            width=group.width,
            reader=name if role == "input" else f"output of {name}",
            layer=layer,
            reads=role == "input",
            places=places,
            owners=owners[places],
            draw=draw,
        )


def _owners_of(layer: Layer, part: ParameterSlice) -> Tensor:
    """Return the group's channel that each channel of a layer belongs to; -1: to none.

    A convolution of several groups has one column for the same position of all its groups, a
    transposed one has one row of filters for them.
    """
    owners = torch.tensor(part.units)
    if isinstance(layer, nn.Linear) or part.axis == 0:
        return owners
    return owners.repeat(layer.groups)


def _run(
    module: nn.Module, watches: Sequence[Watch], batches: Sequence[tuple[Tensor, Tensor]]
) -> None:
    place = next(module.parameters(), torch.empty(0)).device
    with evaluating(module), torch.no_grad(), _watched(watches):
        for images, _ in batches:
            for some in torch.split(images, CHUNK):
                module(some.to(place))


@contextmanager
def _watched(watches: Sequence[Watch]) -> Iterator[None]:
    """Let every watch see the calls of its layer inside the block."""

    def hook(watch: Watch) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def see(_: nn.Module, given: tuple[object, ...], output: object) -> None:
            watch.see((given[0] if given else None) if watch.reads else output)

        return see

    handles = []
    try:
        for watch in watches:
            handles.append(watch.layer.register_forward_hook(hook(watch)))  # noqa: PERF401
        yield
    finally:
        for handle in handles:
            handle.remove()


def contributions(layer: Layer, value: Tensor, places: int, draw: torch.Generator) -> Tensor:
    """Return what each input channel adds to random outputs of a layer.

    An output value of a layer is a sum over its input channels (plus the bias): these are the
    summands. Every row is one random output channel at one random place of one image. Of a
    transposed convolution a row has the summands of one input pixel only, which are all of them
    where stride and kernel are equal.

    Args:
        layer: any stride, padding, dilation and number of convolution groups.
        value: its input `(images, channels, height, width)`; of a linear layer `(images, ..., in)`.
        places: outputs per image.
        draw: of the places and channels.

    Returns:
        `(images * places, channels)`; 0 for channels that the output does not read.
    """
    if isinstance(layer, nn.Linear):
        return _linear(layer, value, places, draw)
    if isinstance(layer, nn.ConvTranspose2d):
        return _transposed(layer, value, places, draw)
    return _convolution(layer, value, places, draw)


def _draw(high: int, images: int, places: int, draw: torch.Generator, like: Tensor) -> Tensor:
    return torch.randint(0, high, (images, places), generator=draw).to(like.device)


def _linear(layer: nn.Linear, value: Tensor, places: int, draw: torch.Generator) -> Tensor:
    flat = value.reshape(len(value), -1, layer.in_features)
    images = torch.arange(len(flat), device=flat.device)[:, None]
    where = _draw(flat.shape[1], len(flat), places, draw, flat)
    outputs = _draw(layer.out_features, len(flat), places, draw, flat)
    return (flat[images, where] * layer.weight.detach().float()[outputs]).flatten(0, 1)


def _convolution(layer: nn.Conv2d, value: Tensor, places: int, draw: torch.Generator) -> Tensor:
    # The module's own padding, in the order of F.pad: that of "same" included.
    padded = nn.functional.pad(value, layer._reversed_padding_repeated_twice)
    reach = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    sizes = [
        max(1, (size - span) // stride + 1)
        for size, span, stride in zip(padded.shape[2:], reach, layer.stride, strict=True)
    ]
    images = torch.arange(len(value), device=value.device)[:, None, None, None]
    rows, columns = (
        _draw(size, len(value), places, draw, value)[..., None] * stride
        + dilation * torch.arange(kernel, device=value.device)
        for size, stride, dilation, kernel in zip(
            sizes, layer.stride, layer.dilation, layer.kernel_size, strict=True
        )
    )
    # (images, places, kernel height, kernel width, channels)
    patches = padded.movedim(1, 3)[images, rows[..., None], columns[:, :, None]]
    outputs = _draw(layer.out_channels, len(value), places, draw, value)
    weight = layer.weight.detach().float()[outputs].permute(0, 1, 3, 4, 2)
    added = (patches * weight.repeat(1, 1, 1, 1, layer.groups)).sum(dim=(2, 3))
    return _own(added, outputs // (layer.out_channels // layer.groups), layer.groups)


def _transposed(
    layer: nn.ConvTranspose2d, value: Tensor, places: int, draw: torch.Generator
) -> Tensor:
    images = torch.arange(len(value), device=value.device)[:, None]
    flat = value.flatten(2).movedim(1, 2)
    where = _draw(flat.shape[1], len(flat), places, draw, flat)
    weight = layer.weight.detach().float().flatten(1)  # (in, out / groups * taps)
    taps = _draw(weight.shape[1], len(flat), places, draw, flat)
    chosen = _draw(layer.groups, len(flat), places, draw, flat)
    return _own(flat[images, where] * weight.T[taps], chosen, layer.groups)


def _own(added: Tensor, chosen: Tensor, groups: int) -> Tensor:
    """Return the summands as rows, 0 outside the convolution group that was chosen."""
    of = torch.arange(added.shape[-1], device=added.device) // (added.shape[-1] // groups)
    return (added * (of == chosen[..., None])).flatten(0, 1)

"""Run a network again and again on one batch, computing only from where it was changed."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

Forward = Callable[..., object]  # of one part, with whatever arguments it takes

# A part that holds more of the parameters than this is taken apart into its children.
LARGE_SHARE = 0.125


@dataclass(slots=True, kw_only=True)
class Tape:
    """What every part of a network gave on one batch, in the order of the calls."""

    parts: Mapping[str, nn.Module]
    outputs: list[object] = field(default_factory=list)  # whatever the part's forward returns
    first_call: dict[str, int] = field(default_factory=dict)  # by the name of the part
    touched: frozenset[int] = frozenset()  # calls whose output something changes in place later

    def start_of(self, parameters: Iterable[str]) -> int:
        """Return the first call that can differ from the tape when these parameters change."""
        first = (self._first_call(name) for name in parameters)
        # Only tensors are known well enough to be handed out again.
        known = (i for i, output in enumerate(self.outputs) if not isinstance(output, Tensor))
        return min(min(first, default=len(self.outputs)), min(known, default=len(self.outputs)))

    def _first_call(self, parameter: str) -> int:
        owner = next((name for name in self.parts if parameter.startswith(f"{name}.")), None)
        return 0 if owner is None else self.first_call.get(owner, 0)


def parts_of(module: nn.Module) -> dict[str, nn.Module]:
    """Return the parts whose outputs are worth recording: blocks, by name, none inside another."""
    total = sum(parameter.numel() for parameter in module.parameters())
    found: dict[str, nn.Module] = {}
    pending = list(module.named_children())
    while pending:
        name, part = pending.pop(0)
        children = [(f"{name}.{child}", inner) for child, inner in part.named_children()]
        size = sum(parameter.numel() for parameter in part.parameters())
        container = isinstance(part, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        if children and (container or size > LARGE_SHARE * total):
            pending = children + pending
        else:
            found[name] = part
    return found


def record(module: nn.Module, images: Tensor) -> Tape:
    """Return what every part gives when the unchanged network runs; call it without gradients.

    Where something changes a part's output in place later on, the network runs a second time and
    copies are recorded of those outputs.
    """
    tape = _record_once(module, images, frozenset())
    return _record_once(module, images, tape.touched) if tape.touched else tape


def replay(module: nn.Module, tape: Tape, images: Tensor, changed: Iterable[str]) -> Tensor:
    """Return the network's output; parts that run before the first changed one are not computed.

    Args:
        module: the network that was recorded.
        tape: of the unchanged network.
        images: the batch that was recorded.
        changed: names of the parameters that differ from the recording.
    """
    stop, calls = tape.start_of(changed), 0

    def call(name: str, forward: Forward, *args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls > stop:
            return forward(*args, **kwargs)
        output = tape.outputs[calls - 1]
        return _copied(output) if calls - 1 in tape.touched else output

    with _through(tape.parts, call):
        return module(images)  # type: ignore[no-any-return]  # a user's module


def _record_once(module: nn.Module, images: Tensor, copied: frozenset[int]) -> Tape:
    tape = Tape(parts=parts_of(module))
    given: list[tuple[object, int]] = []

    def call(name: str, forward: Forward, *args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        place = len(tape.outputs)
        tape.first_call.setdefault(name, place)
        tape.outputs.append(_copied(output) if place in copied else output)
        given.append((output, _version(output)))
        return output

    with _through(tape.parts, call):
        module(images)
    tape.touched = frozenset(i for i, (out, version) in enumerate(given) if _version(out) > version)
    return tape


def _copied(output: object) -> object:
    return output.clone() if isinstance(output, Tensor) else output


def _version(output: object) -> int:
    return output._version if isinstance(output, Tensor) else 0


@contextmanager
def _through(parts: Mapping[str, nn.Module], call: Callable[..., object]) -> Iterator[None]:
    """Let every part run through `call(name, its forward, ...)`; undone in the end."""
    try:
        for name, part in parts.items():
            part.forward = partial(call, name, part.forward)
        yield
    finally:
        for part in parts.values():
            part.__dict__.pop("forward", None)

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
class Call:
    """What one part gave, and what it did to its arguments."""

    output: object  # whatever the part's forward returns
    is_touched: bool = False  # something changes the output in place later on
    returned: int | None = None  # the output is this argument itself
    written: tuple[tuple[int, Tensor], ...] = ()  # arguments changed in place, and their new values
    is_known: bool = True  # can be handed out again


@dataclass(slots=True, kw_only=True)
class Tape:
    """What every part of a network gave on one batch, in the order of the calls."""

    parts: Mapping[str, nn.Module]
    calls: list[Call] = field(default_factory=list)
    first_call: dict[str, int] = field(default_factory=dict)  # by the name of the part

    def start_of(self, parameters: Iterable[str]) -> int:
        """Return the first call that can differ from the tape when these parameters change."""
        changed = [self._first_call(name) for name in parameters]
        unknown = [place for place, call in enumerate(self.calls) if not call.is_known]
        return min([*changed, *unknown[:1], len(self.calls)])

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
    touched = frozenset(place for place, call in enumerate(tape.calls) if call.is_touched)
    return _record_once(module, images, touched) if touched else tape


def replay(module: nn.Module, tape: Tape, images: Tensor, changed: Iterable[str]) -> object:
    """Return the network's output; parts that run before the first changed one are not computed.

    Args:
        module: the network that was recorded.
        tape: of the unchanged network.
        images: the batch that was recorded.
        changed: names of the parameters that differ from the recording.
    """
    stop, count = tape.start_of(changed), 0

    def call(name: str, forward: Forward, *args: object, **kwargs: object) -> object:
        nonlocal count
        count += 1
        if count > stop:
            return forward(*args, **kwargs)
        known, given = tape.calls[count - 1], [*args, *kwargs.values()]
        for index, value in known.written:
            _tensor(given[index]).copy_(value)
        if known.returned is not None:
            return given[known.returned]
        return _tensor(known.output).clone() if known.is_touched else known.output

    with _through(tape.parts, call):
        output: object = module(images)
    return output


def _record_once(module: nn.Module, images: Tensor, copied: frozenset[int]) -> Tape:
    tape = Tape(parts=parts_of(module))
    given: list[tuple[object, int]] = []

    def call(name: str, forward: Forward, *args: object, **kwargs: object) -> object:
        arguments = [*args, *kwargs.values()]
        versions = [_version(argument) for argument in arguments]
        output = forward(*args, **kwargs)
        place = len(tape.calls)
        tape.first_call.setdefault(name, place)
        found = Call(
            output=_tensor(output).clone() if place in copied else output,
            returned=next((i for i, one in enumerate(arguments) if one is output), None),
            written=tuple(
                (i, _tensor(one).clone())
                for i, (one, version) in enumerate(zip(arguments, versions, strict=True))
                if _version(one) > version
            ),
        )
        # What may share memory with something else could be changed behind our back.
        shares = isinstance(output, Tensor) and output._is_view() and found.returned is None
        found.is_known = isinstance(output, Tensor) and not (shares and place in copied)
        tape.calls.append(found)
        given.append((output, _version(output)))
        return output

    with _through(tape.parts, call):
        module(images)
    for recorded, (output, version) in zip(tape.calls, given, strict=True):
        recorded.is_touched = _version(output) > version
    return tape


def _tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor)  # only tensors are seen to change in place
    return value


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

"""What the commands share: where they print, how errors end, a bar of progress, many options."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from hardware.errors import HardwareError

out = Console()
err = Console(stderr=True)
INTERRUPTED = 130
Options = TypeVar("Options")
Progress = Callable[[int, int, str], None]
"""Takes how much is done, of how much, and a line of text."""


def print_error(error: Exception) -> None:
    """Print an error as a user reads it."""
    err.print(f"[bold red]error:[/] {type(error).__name__}", highlight=False)
    err.print(str(error), markup=False, highlight=False)


@contextmanager
def reported(on_interrupt: str) -> Iterator[None]:
    """Turn our errors into one message and exit code 2, and Ctrl-C into a text and code 130."""
    try:
        yield
    except HardwareError as error:
        print_error(error)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        err.print(on_interrupt, markup=False)
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def bar(name: str, in_logs: bool = True) -> Iterator[Progress]:
    """Show progress on stderr: a bar on a terminal, else a line whenever something is done.

    Args:
        name: of what is going on.
        in_logs: whether there are lines where there is no terminal.
    """
    if not err.is_terminal:

        def line(done: int, total: int, text: str) -> None:
            if in_logs:
                err.print(f"{name}: {done}/{total} {text}", markup=False, highlight=False)

        yield line
        return
    columns = (TextColumn(name), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"))
    with Bars(
        *columns, TimeElapsedColumn(), TextColumn("{task.fields[text]}"), console=err
    ) as bars:
        task = bars.add_task(name, total=None, text="")

        def update(done: int, total: int, text: str) -> None:
            bars.update(task, completed=done, total=total, text=text)

        yield update


def command_of(kind: Callable[..., Options], run: Callable[[Options], None]) -> Callable[..., None]:
    """Return a command whose arguments and options are the fields of a dataclass.

    A function of twenty arguments is what typer asks for, and nobody wants to read or to call.
    """

    def command(**values: object) -> None:
        run(kind(**values))

    command.__signature__ = inspect.signature(kind)  # type: ignore[attr-defined]
    command.__name__, command.__doc__ = run.__name__, run.__doc__
    return command

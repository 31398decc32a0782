"""What the commands share: where they print, how errors end, and a bar of progress."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from hardware.errors import HardwareError

out = Console()
err = Console(stderr=True)
INTERRUPTED = 130
Told = Callable[[int, int, str], None]


def tell(error: HardwareError) -> None:
    """Print an error as a user reads it."""
    err.print(f"[bold red]error:[/] {type(error).__name__}", highlight=False)
    err.print(str(error), markup=False, highlight=False)


@contextmanager
def reported(on_interrupt: str) -> Iterator[None]:
    """Turn our errors into one message and exit code 2, and Ctrl-C into a text and code 130."""
    try:
        yield
    except HardwareError as error:
        tell(error)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        err.print(on_interrupt, markup=False)
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def bar(name: str, in_logs: bool = True) -> Iterator[Told]:
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
    with Progress(
        *columns, TimeElapsedColumn(), TextColumn("{task.fields[text]}"), console=err
    ) as p:
        task = p.add_task(name, total=None, text="")

        def told(done: int, total: int, text: str) -> None:
            p.update(task, completed=done, total=total, text=text)

        yield told

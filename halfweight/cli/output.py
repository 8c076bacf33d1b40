"""How the command line speaks: data to stdout, errors and progress to stderr, one style for all."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event
from typing import TYPE_CHECKING, Any

from rich.console import Console

from halfweight.errors import HalfweightError, InterruptedConversionError

if TYPE_CHECKING:
    from rich.progress import Progress

    from halfweight.conversion import parts

stdout = Console()
stderr = Console(stderr=True)


def fail(error: HalfweightError) -> int:
    """Print `error: ...` and `hint: ...` on stderr; returns the exit code."""
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
    return error.exit_code


def print_json(value: Any, indent: int | None = 2) -> None:
    """One JSON document on stdout; on one line with `indent` None."""
    print(json.dumps(value, indent=indent))


def size(num_bytes: float) -> str:
    """Bytes for people, in the units of datasheets and of cards: '8.09 GB (7.54 GiB)'."""
    for power, (gb, gib) in ((3, ("GB", "GiB")), (2, ("MB", "MiB")), (1, ("kB", "KiB"))):
        if num_bytes >= 1000**power:
            return f"{num_bytes / 1000**power:.2f} {gb} ({num_bytes / 1024**power:.2f} {gib})"
    return f"{num_bytes:.0f} bytes"


def bytes_bar() -> Progress:
    """A bar of bytes, rate and time left, on stderr and only on a terminal."""
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
    )


def show_parts(bar: Progress, what: str) -> Callable[[parts.Progress], None]:
    """A task of `bar` that follows a conversion; it is called `what` until the first tensor."""
    task = bar.add_task(what, total=None)

    def show(progress: parts.Progress) -> None:
        done, total = progress.done_bytes, progress.total_bytes
        bar.update(task, description=progress.tensor, completed=done, total=total)

    return show


@contextmanager
def stop_on_ctrl_c() -> Iterator[Event]:
    """The first Ctrl-C sets the event (finish the shard); the second ends the process at once."""
    stop = Event()

    def on_signal(*_: object) -> None:
        if stop.is_set():
            os._exit(InterruptedConversionError.exit_code)
        stop.set()
        stderr.print("finishing this step; Ctrl-C again stops now, both can be resumed")

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)

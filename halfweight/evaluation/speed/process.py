"""Measuring in a fresh process, and the memory of a process. No torch here: it starts at once."""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, TypeVar

T = TypeVar("T")
LONGEST_WAIT_SECONDS = 3600.0
PR_SET_PDEATHSIG = 1


def from_fresh_process(
    rows: Callable[..., Iterator[T]],
    *arguments: Any,
    deadline: float = math.inf,
) -> Iterator[T]:
    """What the generator `rows(*arguments)` yields, run in a new python process; all must pickle.

    The process is killed once it has said that it is done, or when this one dies: its devices are
    free then.

    Raises RuntimeError with the line of its error if it fails, and ends it without a word at
    `deadline` of time.monotonic.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send_rows, args=(theirs, rows, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        while ours.poll(min(max(0.0, deadline - time.monotonic()), LONGEST_WAIT_SECONDS)):
            row = _receive(ours)
            if row is None:
                return
            yield row
    finally:
        process.kill()
        process.join()


def _send_rows(
    connection: Connection, rows: Callable[..., Iterator[Any]], arguments: tuple[Any, ...]
) -> None:
    _die_with_parent()
    try:
        for row in rows(*arguments):
            connection.send(row)
        connection.send(None)
    except Exception as error:
        connection.send(RuntimeError(f"{type(error).__name__}: {error}".splitlines()[0][:300]))
        raise


def _die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends, however that does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _receive(connection: Connection) -> Any:
    try:
        row = connection.recv()
    except EOFError:
        raise RuntimeError("the process ended without a result (killed for memory?)") from None
    if isinstance(row, Exception):
        raise row
    return row


class HostMemory:
    """Peak of this process's own memory (anonymous pages, not the page cache's) inside a block.

    `peak_bytes` is sampled every few milliseconds;
    `peak_resident_bytes` is the kernel's high-water mark of the process, mapped files included.
    """

    def __enter__(self) -> HostMemory:
        self._begin = self._peak = _status_bytes("RssAnon")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak_resident_bytes = _status_bytes("VmHWM")

    @property
    def peak_bytes(self) -> int:
        """The most seen so far, over what there was at the start."""
        return self._peak - self._begin

    def _sample(self) -> None:
        while not self._stop.is_set():
            self._peak = max(self._peak, _status_bytes("RssAnon"))
            time.sleep(0.005)


def _status_bytes(field: str) -> int:
    """A size that the kernel keeps of this process; 0 where there is no /proc."""
    with suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return 0

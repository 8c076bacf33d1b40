"""An output written part by part: each fsynced, hashed as read back, journalled behind the next.

A part is a file, or a run of bytes of a large one: the most work that a kill can lose. What fills
it is up to its `write`; blocks are read and made on `jobs` threads. See `workspace` for what
happens when the process dies.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, Protocol

from halfweight.checkpoint.manifest import MANIFEST_NAME, file_sha256, read_manifest
from halfweight.conversion.workspace import Workspace
from halfweight.errors import (
    CheckpointError,
    DiskFullError,
    InterruptedConversionError,
    UsageError,
)

log = logging.getLogger("halfweight")

Advance = Callable[[str, int], None]
"""Called with a tensor's name and the bytes of the source that are used up."""
Write = Callable[[Path, ThreadPoolExecutor, int, Advance], dict[str, Any]]
"""Fills a part of the file at the path, with at most so many blocks in memory; returns what the
journal says of its tensors."""


@dataclass(frozen=True)
class Progress:
    """How far a conversion is: source bytes done and in all, and the tensor in hand."""

    tensor: str
    done_bytes: int
    total_bytes: int


class Watched(Protocol):
    """What parts are made of: `state` is equal while nobody changes its files."""

    name: str

    def state(self) -> list[Any]:
        """Sizes and times of the files."""
        ...


@dataclass(frozen=True)
class Part:
    """Bytes [begin, end) of `file`, journalled under `name`; made of `source_bytes`.

    A part that is a whole file has its name.
    """

    name: str
    file: str
    begin: int
    end: int
    source_bytes: int
    write: Write


def write_parts(
    workspace: Workspace,
    source: Watched,
    parts: Sequence[Part],
    jobs: int | None,
    progress: Callable[[Progress], None] | None,
    stop: Event | None,
) -> int:
    """Write every part that is not finished; returns how many were.

    Raises DiskFullError before any work if the rest cannot fit, CheckpointError if the source
    changes meanwhile, InterruptedConversionError once `stop` is set, after the part in hand.
    """
    resumed = _check_resumed(workspace, parts)
    _check_space(workspace, parts)
    state, total, done = source.state(), sum(part.source_bytes for part in parts), 0
    jobs = jobs or os.cpu_count() or 1

    def advance(tensor: str, num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress(Progress(tensor, done, total))

    with ThreadPoolExecutor(jobs) as pool, ThreadPoolExecutor(1) as finisher:
        finishing: Future[None] | None = None
        for part in parts:
            if part.name in workspace.finished:
                advance(part.name, part.source_bytes)
                continue
            tensors = part.write(workspace.checkpoint / part.file, pool, jobs + 2, advance)
            if source.state() != state:
                raise CheckpointError(
                    f"{source.name}: a file changed while it was read",
                    hint="run again once nothing writes to the source",
                )
            if finishing is not None:
                finishing.result()
            finishing = finisher.submit(_finish, workspace, part, tensors)
            if stop is not None and stop.is_set():
                finishing.result()
                raise InterruptedConversionError(
                    f"interrupted; {len(workspace.finished)} of {len(parts)} parts kept",
                    hint="run the same command again to go on from there",
                )
        if finishing is not None:
            finishing.result()
    return resumed


def check_out(out: Path, source: Path, overwrite: bool) -> None:
    """Raise UsageError if `out` is in use: by the source, a file, or what must not be replaced."""
    if source.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"{out}: the source is in it", hint="choose another output folder")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise UsageError(f"{out}: a file is in the way", hint="choose another output folder")
    if not overwrite:
        raise UsageError(
            f"{out}: exists and is not empty",
            hint="choose another output folder, or replace it with --overwrite",
        )


def is_published(out: Path, job: dict[str, Any]) -> bool:
    """Whether `out` is the complete result of this very job, as after a kill at the last step."""
    return (out / MANIFEST_NAME).exists() and read_manifest(out)["job"] == job


@contextmanager
def disk_full_named(workspace: Workspace) -> Iterator[None]:
    """Turn ENOSPC into an error that says what is kept and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(
            f"{workspace.out}: the disk is full after {len(workspace.finished)} finished parts",
            hint="free space and run the same command again: finished parts are kept",
        ) from error


def _finish(workspace: Workspace, part: Part, tensors: dict[str, Any]) -> None:
    path = workspace.checkpoint / part.file
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    entry = {"bytes": part.end - part.begin, "sha256": _sha256(path, part), "tensors": tensors}
    workspace.record(part.name, entry)


def _sha256(path: Path, part: Part) -> str:
    if part.name == part.file:
        return file_sha256(path)
    return file_sha256(path, part.begin, part.end)


def _check_resumed(workspace: Workspace, parts: Sequence[Part]) -> int:
    """Drop journalled parts that are no longer what was written; returns how many remain."""
    by_name = {part.name: part for part in parts}
    for name, entry in list(workspace.finished.items()):
        part = by_name.get(name)
        path = workspace.checkpoint / (part.file if part else name)
        if part is None or not path.exists() or _sha256(path, part) != entry["sha256"]:
            log.warning("%s changed since it was written: made again", path)
            workspace.forget(name)
    return len(workspace.finished)


def _check_space(workspace: Workspace, parts: Sequence[Part]) -> None:
    """Raise DiskFullError, before any work, if the rest of the output cannot fit."""
    rest = [part for part in parts if part.name not in workspace.finished]
    needed = sum(part.end - part.begin for part in rest)
    files = {part.file for part in rest}
    present = [path for file in files if (path := workspace.checkpoint / file).exists()]
    done = sum(
        part.end - part.begin
        for part in parts
        if part.name in workspace.finished and part.file in files
    )
    held = max(0, sum(path.stat().st_blocks * 512 for path in present) - done)
    free = shutil.disk_usage(workspace.folder).free + held
    if needed > free:
        raise DiskFullError(
            f"{workspace.out}: needs {needed} bytes more, {free} are free",
            hint=f"free {needed - free} bytes, or choose an output on another disk",
        )

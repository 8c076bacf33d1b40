"""Work that survives being killed: a hidden folder beside OUT, a journal, one rename.

`.OUT.halfweight/` holds

    lock           held by flock while a conversion runs; the kernel lets go if it dies
    journal.jsonl  first line: what job this is; then one line for each finished shard
    checkpoint/    the output as far as it has got
    previous/      an old OUT, while it is being replaced

A shard is written and fsynced before its line is appended and fsynced, so each line in the journal
stands for a complete file. A line cut short by a kill is not a line. At the end `checkpoint` is
renamed to OUT in one step: OUT never exists in part. A rerun of the same job takes up the journal;
another job (other source, recipe or version) starts afresh.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any, TextIO

import msgspec

from halfweight.checkpoint.json_files import JournalLine, is_plain_name, parse_json
from halfweight.errors import HalfweightError


def workspace_folder(out: Path) -> Path:
    """Where the work on `out` is kept."""
    return out.parent / f".{out.name}.halfweight"


def remove_leftovers(out: Path) -> None:
    """Delete what a run that was killed after publishing `out` had not yet deleted."""
    folder = workspace_folder(out)
    if folder.exists():
        with _locked(folder, out):
            shutil.rmtree(folder)


def _locked(folder: Path, out: Path) -> TextIO:
    """The open lock file; closing it, or dying, lets go."""
    lock = open(folder / "lock", "w")  # noqa: SIM115  the caller closes it
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise HalfweightError(
            f"{out}: another process is converting to it",
            hint="wait for it to end, or choose another output",
        ) from error
    return lock


class Workspace:
    """The hidden folder of one conversion to `out`; a context manager that holds its lock."""

    def __init__(self, out: Path, job: dict[str, Any], source_state: list[Any]) -> None:
        self.out = out
        self.job = job
        self.folder = workspace_folder(out)
        self.checkpoint = self.folder / "checkpoint"
        self.finished: dict[str, dict[str, Any]] = {}
        self._first_line = {"job": job, "source_state": source_state}
        self._journal = self.folder / "journal.jsonl"
        self._previous = self.folder / "previous"

    def __enter__(self) -> Workspace:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.folder, self.out)
        self._take_up_journal()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not self.finished:
            shutil.rmtree(self.folder)
        self._lock.close()

    def record(self, shard: str, entry: dict[str, Any]) -> None:
        """Note that `shard`, a file or a part of one, fsynced in `checkpoint`, is complete."""
        self._append({"shard": shard, **entry})
        self.finished[shard] = entry

    def forget(self, shard: str) -> None:
        """Drop a shard whose bytes are not what the journal says; it will be made again."""
        del self.finished[shard]

    def publish(self) -> None:
        """Rename the finished checkpoint to `out`, put aside and then drop what was there."""
        sync(self.checkpoint)
        if self.out.exists():
            shutil.rmtree(self._previous, ignore_errors=True)
            os.rename(self.out, self._previous)
        os.rename(self.checkpoint, self.out)
        sync(self.out.parent)
        self.remove()

    def remove(self) -> None:
        """Delete the workspace, the journal last: until then a rerun knows where it stands."""
        for folder in (self._previous, self.checkpoint):
            shutil.rmtree(folder, ignore_errors=True)
        self._journal.unlink(missing_ok=True)
        shutil.rmtree(self.folder)

    def _take_up_journal(self) -> None:
        lines, num_bytes = _complete_lines(self._journal)
        if lines[:1] == [self._first_line]:
            os.truncate(self._journal, num_bytes)
        else:
            lines = [self._first_line]
            self._journal.unlink(missing_ok=True)
            shutil.rmtree(self.checkpoint, ignore_errors=True)
            self._append(self._first_line)
        self.checkpoint.mkdir(exist_ok=True)
        self.finished = dict(filter(None, map(_finished_shard, lines[1:])))

    def _append(self, line: dict[str, Any]) -> None:
        with open(self._journal, "a") as journal:
            journal.write(json.dumps(line) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        sync(self.folder)


def sync(folder: Path) -> None:
    """Make a folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _finished_shard(line: Any) -> tuple[str, dict[str, Any]] | None:
    """Name and entry of a shard that a line of the journal tells of; what is none was not ours."""
    try:
        msgspec.convert(line, JournalLine)
    except msgspec.ValidationError:
        return None
    name = line["shard"]
    entry = {key: value for key, value in line.items() if key != "shard"}
    return (name, entry) if is_plain_name(name) else None


def _complete_lines(journal: Path) -> tuple[list[dict[str, Any]], int]:
    """The journal's lines up to the first that is cut short, and the bytes they take."""
    lines: list[dict[str, Any]] = []
    num_bytes = 0
    for text in journal.read_bytes().splitlines(keepends=True) if journal.exists() else ():
        try:
            lines.append(parse_json(text))
        except (ValueError, RecursionError):
            break
        num_bytes += len(text)
    return lines, num_bytes

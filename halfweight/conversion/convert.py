"""Checkpoint -> INT8 checkpoint, as a stream: bounded memory, resumable, published at once.

All headers are checked and every byte of the output is planned first. Then blocks of rows go from
the source's file through one fused pass to their place in an output shard, a few at a time on
`jobs` threads; nothing holds a whole tensor but its scales. A finished shard is fsynced, hashed as
read back from the file, and journalled while the next is under way. See `workspace` for what
happens when the process dies, and `layout` for the form of the output.

Before all that the load of the result is rehearsed, on meta: what no model could hold in INT8 is
kept, and a source that is no whole model is refused. Before publishing the output is compared with
what was loaded there.

The output is a function of the source and the recipe alone: no time, path, thread count or machine
goes into any file.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from halfweight.checkpoint.layout import Layout, lay_out
from halfweight.checkpoint.manifest import MANIFEST_NAME, file_sha256, read_manifest
from halfweight.checkpoint.readers import check_scheme, cost_bytes, find_readers, with_kept
from halfweight.checkpoint.shard import some
from halfweight.checkpoint.sources import open_source
from halfweight.checkpoint.sources.source import Source
from halfweight.checkpoint.sources.turned import turned_source
from halfweight.conversion.beside_shards import describe_job, write_beside_shards
from halfweight.conversion.shard_writer import write_shard
from halfweight.conversion.verification import check_structure
from halfweight.conversion.workspace import Workspace, remove_leftovers
from halfweight.errors import (
    CheckpointError,
    DiskFullError,
    InterruptedConversionError,
    UsageError,
)
from halfweight.model.loadability import fit_aside, model_tensors
from halfweight.quantization.scheme import Recipe

log = logging.getLogger("halfweight")

WORST_SHOWN = 5
"""Tensors with crushed groups that are named in the report; the manifest has all."""


@dataclass(frozen=True)
class Progress:
    """How far a conversion is: source bytes done and in all, and the tensor in hand."""

    tensor: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion made. Bytes are those of tensor data, not of headers.

    `source_bytes` are those of the source as it lies: of a .gguf file before it is decoded.

    `readers_bytes` are those of `disk_bytes` that only the named readers ask for.
    `relative_error` is |w - w'| / |w| over all quantized weights (Frobenius norms).
    """

    out: Path
    num_quantized: int
    num_kept: int
    source_bytes: int
    disk_bytes: int
    readers_bytes: int
    resident_bytes: int
    relative_error: float
    resumed_shards: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Refinement:
    """A change to the packed bytes of a finished folder, and what it depends on, for the job.

    `apply(folder)` works in place and returns the new squared error of each weight it changed.
    """

    description: dict[str, Any]
    apply: Callable[[Path], dict[str, float]]


def quantize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    recipe: Recipe | None = None,
    *,
    jobs: int | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    stop: Event | None = None,
    refine: Refinement | None = None,
    check: Callable[[Path], None] | None = None,
    readers: Sequence[str] = (),
) -> ConversionReport:
    """Quantize a model to the folder `out`, which appears only when it is complete.

    `source` is a folder of safetensors, a .gguf file or a Hub id. Run again after a kill, the same
    call resumes and gives the same bytes. `stop`, once set, ends the run after the shard in hand.
    `refine` rounds the finished weights again; the record of the job says so.
    `readers` are other programs that are to read the file: what one of them does not read in INT8
    is kept (checkpoint/readers.py).
    `check` gets the finished folder before it is published: what it raises keeps `out` from
    appearing, and finished shards are kept for the next run.

    Raises CheckpointError for a bad source, UsageError for an `out` that is in the way,
    DiskFullError, and InterruptedConversionError after `stop`.
    """
    opened = open_source(source)
    out = Path(os.path.abspath(Path(out).expanduser()))
    recipe = recipe or Recipe()
    asked_by = find_readers(readers)
    check_scheme(asked_by, recipe.scheme)
    lay_out(opened.tensors, recipe)  # a recipe that cannot be is refused before the model is asked
    fit = fit_aside(opened.name, opened.config, opened.tensors, recipe)
    for note in fit.notes:
        log.warning("%s: %s", opened.name, note)
    _refuse_experts(fit.kept)
    opened = turned_source(opened, fit.turned)
    smallest = lay_out(opened.tensors, recipe, fit.kept)
    kept = with_kept(recipe, asked_by, opened.config, opened.tensors, fit.kept)
    layout = lay_out(opened.tensors, recipe, kept)
    more = cost_bytes(smallest.decisions, layout.decisions)
    job = describe_job(opened, layout) | (refine.description if refine else {})
    if not overwrite and _is_published(out, job):
        log.warning("%s: already complete", out)
        remove_leftovers(out)
        if check is not None:
            check(out)
        shards = read_manifest(out)["shards"]
        return _report(out, opened, layout, more, shards, len(layout.shards))
    _check_out(out, opened.path, overwrite)
    with Workspace(out, job, opened.state()) as workspace, _disk_full_named(workspace):
        resumed = _check_resumed(workspace)
        _check_space(workspace, layout)
        _convert(opened, layout, workspace, jobs or os.cpu_count() or 1, progress, stop)
        write_beside_shards(workspace, opened, layout)
        if refine is not None:
            _refine(workspace, refine)
            write_beside_shards(workspace, opened, layout)
        _check_output(workspace.checkpoint, opened)
        if check is not None:
            check(workspace.checkpoint)
        workspace.publish()
        return _report(out, opened, layout, more, workspace.finished, resumed)


def _convert(
    source: Source,
    layout: Layout,
    workspace: Workspace,
    jobs: int,
    progress: Callable[[Progress], None] | None,
    stop: Event | None,
) -> None:
    """Write every shard that is not finished; fsync, hash and journal each behind the next."""
    state = source.state()
    total = sum(decision.tensor.num_bytes for decision in layout.decisions)
    done = 0

    def advance(tensor: str, num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress(Progress(tensor, done, total))

    with ThreadPoolExecutor(jobs) as pool, ThreadPoolExecutor(1) as finisher:
        finishing: Future[None] | None = None
        for shard in layout.shards:
            if shard.name in workspace.finished:
                advance(shard.name, shard.source_bytes)
                continue
            path = workspace.checkpoint / shard.name
            tensors = write_shard(source, shard, path, pool, jobs + 2, advance)
            if source.state() != state:
                raise CheckpointError(
                    f"{source.name}: a file changed while it was read",
                    hint="run again once nothing writes to the source",
                )
            if finishing is not None:
                finishing.result()
            finishing = finisher.submit(_finish_shard, workspace, path, tensors)
            if stop is not None and stop.is_set():
                finishing.result()
                raise InterruptedConversionError(
                    f"interrupted; {len(workspace.finished)} of {len(layout.shards)} shards kept",
                    hint="run the same command again to go on from there",
                )
        if finishing is not None:
            finishing.result()


def _refuse_experts(kept: Mapping[str, str]) -> None:
    """Experts are most of their model: whether they stay in 16 bits is for the user to say."""
    for name, reason in kept.items():
        if ".experts." in name:
            raise CheckpointError(
                f"tensor {name}: experts cannot be in INT8 here: {reason}",
                hint="--keep '*experts*' leaves them in 16 bits",
            )


def _check_output(folder: Path, source: Source) -> None:
    """Check what was written, and that to the model it is tensor for tensor what fitted it."""
    written = model_tensors(check_structure(folder))
    assert {(t.name, t.shape) for t in written} == {(t.name, t.shape) for t in source.tensors}


def _finish_shard(workspace: Workspace, path: Path, tensors: dict[str, Any]) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    entry = {"bytes": path.stat().st_size, "sha256": file_sha256(path), "tensors": tensors}
    workspace.record(path.name, entry)


def _refine(workspace: Workspace, refine: Refinement) -> None:
    """Change packed bytes of finished shards, and what the journal says of them."""
    errors = refine.apply(workspace.checkpoint)
    for name, entry in list(workspace.finished.items()):
        tensors = {
            tensor: {**record, "squared_error": errors.get(tensor, record["squared_error"])}
            for tensor, record in entry["tensors"].items()
        }
        sha256 = file_sha256(workspace.checkpoint / name)
        workspace.record(name, {**entry, "sha256": sha256, "tensors": tensors})


def _check_resumed(workspace: Workspace) -> int:
    """Drop journalled shards that are no longer what was written; returns how many remain."""
    for name, entry in list(workspace.finished.items()):
        path = workspace.checkpoint / name
        if not path.exists() or file_sha256(path) != entry["sha256"]:
            log.warning("%s changed since it was written: made again", path)
            workspace.forget(name)
    return len(workspace.finished)


def _check_out(out: Path, source: Path, overwrite: bool) -> None:
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


def _check_space(workspace: Workspace, layout: Layout) -> None:
    """Raise DiskFullError, before any work, if the rest of the output cannot fit."""
    rest = [shard for shard in layout.shards if shard.name not in workspace.finished]
    needed = sum(shard.num_bytes for shard in rest)
    present = [workspace.checkpoint / shard.name for shard in rest]
    held = sum(path.stat().st_blocks * 512 for path in present if path.exists())
    free = shutil.disk_usage(workspace.folder).free + held
    if needed > free:
        raise DiskFullError(
            f"{workspace.out}: needs {needed} bytes more, {free} are free",
            hint=f"free {needed - free} bytes, or choose an output on another disk",
        )


@contextmanager
def _disk_full_named(workspace: Workspace) -> Iterator[None]:
    """Turn ENOSPC into an error that says what is kept and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(
            f"{workspace.out}: the disk is full after {len(workspace.finished)} finished shards",
            hint="free space and run the same command again: finished shards are kept",
        ) from error


def _is_published(out: Path, job: dict[str, Any]) -> bool:
    """Whether `out` is the complete result of this very job, as after a kill at the last step."""
    return (out / MANIFEST_NAME).exists() and read_manifest(out)["job"] == job


def _report(
    out: Path,
    source: Source,
    layout: Layout,
    readers_bytes: int,
    shards: dict[str, Any],
    resumed_shards: int,
) -> ConversionReport:
    tensors = {n: record for entry in shards.values() for n, record in entry["tensors"].items()}
    error, norm = (
        sum(record[key] for record in tensors.values()) for key in ("squared_error", "squared_norm")
    )
    return ConversionReport(
        out=out,
        num_quantized=len(tensors),
        num_kept=len(layout.decisions) - len(tensors),
        source_bytes=source.stored_bytes,
        disk_bytes=sum(decision.disk_bytes for decision in layout.decisions),
        readers_bytes=readers_bytes,
        resident_bytes=sum(decision.resident_bytes for decision in layout.decisions),
        relative_error=math.sqrt(error / norm) if norm else 0.0,
        resumed_shards=resumed_shards,
        notes=tuple(_notes(layout, tensors)),
    )


def _notes(layout: Layout, tensors: dict[str, Any]) -> Iterator[str]:
    """One remark for each reason and for each of the worst tensors."""
    by_reason: dict[str, list[str]] = {}
    for decision in layout.decisions:
        if decision.reason and len(decision.tensor.shape) > 1:
            by_reason.setdefault(decision.reason, []).append(decision.tensor.name)
    for reason, names in by_reason.items():
        yield f"{some(names)}: {reason}"
    crushed = {name: r["crushed_groups"] for name, r in tensors.items() if r["crushed_groups"]}
    for name in sorted(crushed, key=lambda name: -crushed[name])[:WORST_SHOWN]:
        yield (
            f"{name}: in {crushed[name]} groups one weight is so large that most others read "
            f"back as 0; --keep {name} leaves it as it is"
        )

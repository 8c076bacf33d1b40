"""Checkpoint -> INT8 checkpoint, as a stream: bounded memory, resumable, published at once.

All headers are checked and every byte of the output is planned first. Then blocks of rows go from
the source's file through one fused pass to their place in an output shard, a few at a time on
`jobs` threads; nothing holds a whole tensor but its scales. See `parts` for how a shard becomes
durable, `workspace` for what happens when the process dies, and `layout` for the form of the
output.

Before all that the load of the result is rehearsed, on meta: what no model could hold in INT8 is
kept, and a source that is no whole model is refused. Before publishing the output is compared with
what was loaded there.

The output is a function of the source and the recipe alone: no time, path, thread count or machine
goes into any file.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

from halfweight.checkpoint.layout import Layout, lay_out
from halfweight.checkpoint.manifest import file_sha256, read_manifest
from halfweight.checkpoint.readers import check_scheme, cost_bytes, find_readers, with_kept
from halfweight.checkpoint.shard import some
from halfweight.checkpoint.sources import open_source
from halfweight.checkpoint.sources.source import Source
from halfweight.checkpoint.sources.turned import turned_source
from halfweight.conversion.beside_shards import describe_job, write_beside_shards
from halfweight.conversion.parts import (
    Progress,
    check_out,
    disk_full_named,
    is_published,
    write_parts,
)
from halfweight.conversion.shard_writer import shard_part
from halfweight.conversion.verification import check_structure
from halfweight.conversion.workspace import Workspace, remove_leftovers
from halfweight.errors import CheckpointError
from halfweight.memory.architecture import architecture
from halfweight.memory.plan import Model, check_ranks
from halfweight.model.loadability import fit_aside, model_tensors
from halfweight.quantization.scheme import Decision, Recipe

log = logging.getLogger("halfweight")

WORST_SHOWN = 5
"""Tensors with crushed groups that are named in the report; the manifest has all."""


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion made. Bytes are those of tensor data, not of headers.

    `source_bytes` are those of the source as it lies: of a .gguf file before it is decoded.

    `readers_bytes` are those of `disk_bytes` that only the named readers ask for, `ranks_bytes`
    those that only smaller groups for several ranks do.
    `relative_error` is |w - w'| / |w| over all quantized weights (Frobenius norms).
    """

    out: Path
    num_quantized: int
    num_kept: int
    source_bytes: int
    disk_bytes: int
    readers_bytes: int
    ranks_bytes: int
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

    Raises CheckpointError for a bad source, UsageError for an `out` that is in the way or for ranks
    that the model's sizes do not allow, DiskFullError, and InterruptedConversionError after `stop`.
    """
    opened = open_source(source)
    out = Path(os.path.abspath(Path(out).expanduser()))
    recipe = recipe or Recipe()
    asked_by = find_readers(readers)
    check_scheme(asked_by, recipe.scheme)
    lay_out(opened.tensors, recipe)  # a recipe that cannot be is refused before the model is asked
    _check_ranks(opened, recipe)
    fit = fit_aside(opened.name, opened.config, opened.tensors, recipe)
    for note in fit.notes:
        log.warning("%s: %s", opened.name, note)
    _refuse_experts(fit.kept)
    opened = turned_source(opened, fit.turned)
    smallest = lay_out(opened.tensors, recipe, fit.kept)
    kept = with_kept(recipe, asked_by, opened.config, opened.tensors, fit.kept)
    layout = lay_out(opened.tensors, recipe, kept)
    more = cost_bytes(smallest.decisions, layout.decisions), _ranks_bytes(opened, layout, kept)
    job = describe_job(opened, layout) | (refine.description if refine else {})
    if not overwrite and is_published(out, job):
        log.warning("%s: already complete", out)
        remove_leftovers(out)
        if check is not None:
            check(out)
        shards = read_manifest(out)["shards"]
        return _report(out, opened, layout, more, shards, len(layout.shards))
    check_out(out, opened.path, overwrite)
    parts = [shard_part(opened, shard) for shard in layout.shards]
    with Workspace(out, job, opened.state()) as workspace, disk_full_named(workspace):
        resumed = write_parts(workspace, opened, parts, jobs, progress, stop)
        write_beside_shards(workspace, opened, layout)
        if refine is not None:
            _refine(workspace, refine)
            write_beside_shards(workspace, opened, layout)
        _check_output(workspace.checkpoint, opened)
        if check is not None:
            check(workspace.checkpoint)
        workspace.publish()
        return _report(out, opened, layout, more, workspace.finished, resumed)


def _check_ranks(source: Source, recipe: Recipe) -> None:
    """Raise UsageError for ranks that could not share the file that the recipe makes."""
    if recipe.tensor_parallel > 1:
        found = architecture(source.config, source.name, source.tensors)
        check_ranks(Model.from_recipe(found, recipe), recipe.tensor_parallel)


def _ranks_bytes(source: Source, layout: Layout, kept: Mapping[str, str]) -> int:
    alone = lay_out(source.tensors, replace(layout.recipe, tensor_parallel=1), kept)
    return cost_bytes(alone.decisions, layout.decisions)


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


def _report(
    out: Path,
    source: Source,
    layout: Layout,
    more: tuple[int, int],
    shards: dict[str, Any],
    resumed_shards: int,
) -> ConversionReport:
    """`more` bytes of the readers and of the ranks."""
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
        readers_bytes=more[0],
        ranks_bytes=more[1],
        resident_bytes=sum(_resident_bytes(d, tensors) for d in layout.decisions),
        relative_error=math.sqrt(error / norm) if norm else 0.0,
        resumed_shards=resumed_shards,
        notes=tuple(_notes(layout, tensors)),
    )


def _resident_bytes(decision: Decision, records: Mapping[str, Any]) -> int:
    """Bytes in memory, in the scale format that was found where the source chose the scales."""
    record = records.get(decision.tensor.name, {})
    if decision.scheme is None or "scale_format" not in record:
        return decision.resident_bytes
    scheme = replace(decision.scheme, scale_format=record["scale_format"])
    return replace(decision, scheme=scheme).resident_bytes


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

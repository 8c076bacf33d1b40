"""INT8 weights -> a checkpoint of another form, by the machinery of a conversion.

A form (`exports/`) plans every byte and refuses by name what it cannot hold. Then the same parts,
journal, checks and rename as in `quantize`: streamed, resumable after kill -9, published when it is
complete and has been read back. The output is a function of the folder and the form alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, Literal, get_args

from halfweight import __version__
from halfweight.checkpoint.headers import resolve
from halfweight.checkpoint.manifest import FORMAT_VERSION
from halfweight.checkpoint.sources.int8_folder import Int8Folder
from halfweight.conversion.beside_shards import write_manifest
from halfweight.conversion.exports.form import Form, Rounding
from halfweight.conversion.parts import (
    Progress,
    check_out,
    disk_full_named,
    is_published,
    write_parts,
)
from halfweight.conversion.verification import check_structure
from halfweight.conversion.workspace import Workspace, remove_leftovers
from halfweight.errors import UsageError

log = logging.getLogger("halfweight")

FormName = Literal["dequantized", "gptq", "gguf-q8_0"]
FORMS: tuple[str, ...] = get_args(FormName)


@dataclass(frozen=True)
class ExportReport:
    """What an export made: tensors whose int8 values are unchanged, dequantized, kept as they were.

    `disk_bytes` are those of the files with weights. `rounding` is of scales in float16.
    """

    out: Path
    to: str
    num_int8: int
    num_dequantized: int
    num_kept: int
    source_bytes: int
    disk_bytes: int
    rounding: Rounding
    resumed_parts: int
    notes: tuple[str, ...]


def export(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: FormName,
    *,
    jobs: int | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    stop: Event | None = None,
) -> ExportReport:
    """Write a halfweight folder as another program reads it; `out` appears when it is complete.

    dequantized: 16-bit weights for transformers. gptq: 8-bit GPTQ, the layers' int8 values bit for
    bit. gguf-q8_0: a folder with one .gguf file for llama.cpp, int8 values bit for bit.
    Run again after a kill, the same call resumes and gives the same bytes. `stop`, once set, ends
    the run after the part in hand.

    Raises CheckpointError for what the form cannot hold, UsageError for an `out` that is in the way
    or a package that is missing, DiskFullError, and InterruptedConversionError after `stop`.
    """
    folder = Int8Folder(resolve(model), str(model))
    check_structure(folder.path)
    out = Path(os.path.abspath(Path(out).expanduser()))
    form = _plan(folder, to, out)
    job = {
        "format_version": FORMAT_VERSION,
        "halfweight": __version__,
        "source": {"name": folder.base_model, **folder.fingerprint()},
        "export": {"to": to},
    }
    if not overwrite and is_published(out, job):
        log.warning("%s: already complete", out)
        remove_leftovers(out)
        return _report(folder, form, out, to, len(form.parts))
    check_out(out, folder.path, overwrite)
    with Workspace(out, job, folder.state()) as workspace, disk_full_named(workspace):
        resumed = write_parts(workspace, folder, form.parts, jobs, progress, stop)
        form.write_beside(workspace.checkpoint)
        (workspace.checkpoint / "README.md").write_text(_card(folder, form, to))
        write_manifest(workspace, [shard.name for shard in form.shards])
        form.check(workspace.checkpoint)
        workspace.publish()
    return _report(folder, form, out, to, resumed)


def _plan(folder: Int8Folder, to: str, out: Path) -> Form:
    if to == "dequantized":
        from halfweight.conversion.exports import dequantized

        return dequantized.plan(folder)
    if to == "gptq":
        from halfweight.conversion.exports import gptq

        return gptq.plan(folder)
    if to != "gguf-q8_0":
        raise UsageError(f"form {to!r} is not known", hint=f"use one of {', '.join(FORMS)}")
    from halfweight.conversion.exports import gguf

    if out.suffix == ".gguf":
        raise UsageError(
            f"{out}: the name of a file, expected that of a folder to make",
            hint="the .gguf file goes into it, beside licence and manifest",
        )
    gguf.require_gguf(folder.path)
    return gguf.plan(folder)


def _report(folder: Int8Folder, form: Form, out: Path, to: str, resumed: int) -> ExportReport:
    return ExportReport(
        out=out,
        to=to,
        num_int8=form.num_int8,
        num_dequantized=form.num_dequantized,
        num_kept=form.num_kept,
        source_bytes=folder.stored_bytes,
        disk_bytes=sum(part.end - part.begin for part in form.parts),
        rounding=form.rounding,
        resumed_parts=resumed,
        notes=form.notes,
    )


LIBRARY = {"dequantized": "transformers", "gptq": "transformers", "gguf-q8_0": "gguf"}
TAGS = {"dequantized": (), "gptq": ("gptq", "int8"), "gguf-q8_0": ("gguf", "int8")}
WORDS = {
    "dequantized": "in the model's own dtype, each weight the value that its INT8 form stood for",
    "gptq": "in GPTQ's 8-bit layout",
    "gguf-q8_0": "as GGUF of type Q8_0",
}


def _card(folder: Int8Folder, form: Form, to: str) -> str:
    name = folder.base_model
    tags = "".join(f"- {tag}\n" for tag in ("halfweight", *TAGS[to]))
    notes: list[Any] = [
        f"{form.num_int8} weights keep their int8 values bit for bit, {form.num_dequantized} are "
        f"dequantized, {form.num_kept} tensors are as they were.",
        *form.notes,
    ]
    listed = "\n".join(f"- {note}" for note in notes)
    return f"""---
base_model: {name}
base_model_relation: quantized
library_name: {LIBRARY[to]}
tags:
{tags}---

# {name}, exported from INT8

{name}, quantized and exported by halfweight {__version__}: {WORDS[to]}.

{listed}

`halfweight.json` holds a sha256 of each file; `halfweight verify` compares them.
"""

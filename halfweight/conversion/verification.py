"""Is a quantized folder what its manifest says, and can a model be loaded from it?"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfweight.checkpoint.headers import (
    Checkpoint,
    StoredWeight,
    check_inside,
    quantized_modules,
    read_headers,
)
from halfweight.checkpoint.manifest import MANIFEST_NAME, file_sha256, read_manifest
from halfweight.checkpoint.readers import find_readers
from halfweight.checkpoint.readers import problems as unread_by
from halfweight.checkpoint.shard import StoredTensor, broken
from halfweight.errors import CheckpointError, UsageError
from halfweight.model.loadability import check_loads
from halfweight.quantization.float_bytes import as_float32


@dataclass(frozen=True)
class Verification:
    """What `verify` found: files and bytes compared, every problem, and remarks.

    `unread` are the problems that only a reader has which was asked for.
    """

    path: Path
    num_files: int
    num_bytes: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    unread: tuple[str, ...] = ()


def verify(
    path: Path,
    progress: Callable[[str, int, int], None] | None = None,
    readers: Sequence[str] = (),
) -> Verification:
    """Compare every file with its sha256, check structure and scales, load the model on meta.

    A folder without a manifest, as save_pretrained writes it, has nothing to be compared with: a
    note says so, and the rest is checked.
    `readers` are other programs that are to read the folder as it is (checkpoint/readers.py).
    `progress(file, bytes done, bytes in all)` is called after each file. Problems are collected,
    not raised: a damaged folder gives a full list.
    """
    asked_by = find_readers(readers)
    problems: list[str] = []
    unread: list[str] = []
    notes: list[str] = []
    files: dict[str, Any] = {}
    try:
        if (path / MANIFEST_NAME).is_file():
            files = _listed_files(path)
        else:
            notes.append(
                f"{path}: no {MANIFEST_NAME}: files are not compared with what was written"
            )
        total = sum(entry["bytes"] for entry in files.values())
        done = 0
        for name, entry in files.items():
            problems += _file_problems(path, name, entry)
            done += entry["bytes"]
            if progress is not None:
                progress(name, done, total)
        exported = _exported_to(path)
        if exported is None:
            checkpoint = check_structure(path)
            unread += [line for r in asked_by for line in unread_by(r, checkpoint)]
            notes += check_loads(checkpoint)
        elif asked_by:
            raise UsageError(
                f"{path}: an export to {exported}, expected INT8 weights as `quantize` writes them",
                hint="--for answers for those alone",
            )
        else:
            _check_export(path, exported)
    except CheckpointError as error:
        problems.append(error.message)
    num_bytes = sum(entry["bytes"] for entry in files.values())
    problems += unread
    return Verification(path, len(files), num_bytes, tuple(problems), tuple(notes), tuple(unread))


def _exported_to(path: Path) -> str | None:
    """The form of an exported folder; None for INT8 weights of our own."""
    export = read_manifest(path)["job"].get("export") if (path / MANIFEST_NAME).is_file() else None
    return export["to"] if export else None


def _check_export(path: Path, to: str) -> None:
    """Check an exported folder as it was before it was published."""
    from halfweight.conversion.exports import dequantized, gguf, gptq

    checks = {"dequantized": dequantized.check, "gptq": gptq.check, "gguf-q8_0": gguf.check}
    if to not in checks:
        raise broken(path / MANIFEST_NAME, f"tells of an export to {to}, which is not known")
    checks[to](path)


def check_structure(path: Path) -> Checkpoint:
    """Check headers, packed modules and scales. Raises CheckpointError for the first fault."""
    checkpoint = read_headers(path)
    modules = quantized_modules(checkpoint)
    if not modules:
        raise CheckpointError(
            f"{path}: no quantized module in it", hint="give a folder made by `halfweight quantize`"
        )
    _check_group_sizes(checkpoint, modules.values())
    for weight in modules.values():
        _check_values(weight)
    return checkpoint


def _listed_files(path: Path) -> dict[str, Any]:
    """File name -> {bytes, sha256} of the manifest; every name a plain one."""
    manifest = read_manifest(path)
    files = {**manifest["shards"], **manifest["files"]}
    for name in files:
        check_inside(path, name)
    return files


def _file_problems(path: Path, name: str, entry: dict[str, Any]) -> Iterator[str]:
    file = path / name
    if not file.is_file():
        yield f"{file}: missing, expected {entry['bytes']} bytes"
    elif (size := file.stat().st_size) != entry["bytes"]:
        yield f"{file}: {size} bytes, expected {entry['bytes']}"
    elif (found := file_sha256(file)) != entry["sha256"]:
        yield f"{file}: sha256 {found[:16]}..., expected {entry['sha256'][:16]}..."


def _check_group_sizes(checkpoint: Checkpoint, weights: Iterable[StoredWeight]) -> None:
    """Each module's stored group size is what config.json tells other engines."""
    config = checkpoint.config.get("quantization_config") or {}
    groups = list((config.get("config_groups") or {}).values())
    for weight in weights:
        group = next((g for g in groups if _targets(g, weight.module)), None)
        if group is None or weight.module in (config.get("ignore") or ()):
            raise broken(checkpoint.root / "config.json", f"no config group for {weight.module}")
        declared = group["weights"].get("group_size") or weight.shape[1]
        if declared != weight.group_size:
            fault = f"gives {weight.module} group size {declared}, its scales {weight.group_size}"
            raise broken(checkpoint.root / "config.json", fault)


def _targets(group: dict[str, Any], module: str) -> bool:
    return any(_matches(target, module) for target in group.get("targets") or ())


def _matches(target: str, module: str) -> bool:
    if not target.startswith("re:"):
        return target == module
    try:
        return re.match(target.removeprefix("re:"), module) is not None
    except re.error:
        return False


def _check_values(weight: StoredWeight) -> None:
    """The shape record is true and every scale is a positive finite number."""
    shape = tuple(_read(weight.shape_record).view(np.int64).tolist())
    if shape != weight.shape:
        fault = f"{weight.shape_record.name} says {list(shape)}, data is {list(weight.shape)}"
        raise broken(weight.packed.shard, fault)
    scales = as_float32(_read(weight.scale), weight.scale.info.dtype)
    good = np.isfinite(scales) & (scales > 0)
    if not good.all():
        first = int(np.argmin(good))
        raise broken(
            weight.scale.shard,
            f"tensor {weight.scale.name}: {scales.size - int(good.sum())} of {scales.size} scales "
            f"not positive and finite, first {scales[first]} at {first}",
        )


def _read(tensor: StoredTensor) -> NDArray[np.uint8]:
    count = tensor.end - tensor.begin
    return np.fromfile(tensor.shard, np.uint8, count, offset=tensor.begin)

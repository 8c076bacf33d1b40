"""What a checkpoint holds, in bytes by kind, from its headers alone.

Works on any safetensors folder or file. For one that is not quantized, the answer holds the plan of
`quantize`: bytes on disk and in memory under a recipe, to the byte.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from halfweight.checkpoint.headers import (
    Checkpoint,
    StoredWeight,
    quantized_modules,
    read_headers,
    resolve,
)
from halfweight.checkpoint.manifest import MANIFEST_NAME, read_manifest
from halfweight.checkpoint.readers import READERS, problems
from halfweight.checkpoint.sources.source import is_tied
from halfweight.quantization.scheme import GROUP_SIZES, SCALE_FORMATS, Recipe, Scheme, TensorInfo

PARTS = {"weight_packed": "int8", "weight_scale": "scales", "weight_shape": "shape_records"}


@dataclass(frozen=True)
class Entry:
    """One weight or tensor: what it is, its shape as the model sees it, its bytes on disk."""

    name: str
    kind: str
    shape: tuple[int, ...]
    group_size: int | None
    num_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk an element, scales included."""
        elements = TensorInfo(self.name, "U8", self.shape).num_elements
        return 8 * self.num_bytes / elements if elements else 0.0


@dataclass(frozen=True)
class Plan:
    """What `quantize` would make of a checkpoint: bytes of tensor data on disk and in memory."""

    disk_bytes: int
    resident_bytes: int


@dataclass(frozen=True)
class Contents:
    """A checkpoint in figures. `bytes_by_kind`: int8, scales, shape_records, then other dtypes.

    `num_params` counts weights once, however they are stored. `resident_bytes` is None where the
    headers cannot tell. `plan` is None for a checkpoint that is already quantized, for which
    `readers` says of each other program why it does not read the file; nothing where it does.
    """

    path: Path
    num_files: int
    file_bytes: int
    num_params: int
    bytes_by_kind: dict[str, int]
    resident_bytes: int | None
    plan: Plan | None
    entries: tuple[Entry, ...]
    readers: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors' data on disk."""
        return sum(self.bytes_by_kind.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk a parameter, over everything."""
        return 8 * self.data_bytes / self.num_params if self.num_params else 0.0


def inspect(model: str | os.PathLike[str], recipe: Recipe | None = None) -> Contents:
    """Read the headers of a folder, a .safetensors file or a Hub id; no weights.

    Raises CheckpointError for anything `read_headers` refuses.
    """
    path = resolve(model)
    checkpoint = read_headers(path)
    modules = quantized_modules(checkpoint)
    entries = tuple(_entries(checkpoint, modules))
    by_kind: dict[str, int] = {}
    for tensor in checkpoint.tensors:
        kind = _kind(tensor.info, modules)
        by_kind[kind] = by_kind.get(kind, 0) + tensor.info.num_bytes
    order = [*PARTS.values(), *sorted(by_kind)]
    return Contents(
        path=path,
        num_files=len(checkpoint.shards),
        file_bytes=sum(shard.num_bytes for shard in checkpoint.shards),
        num_params=sum(TensorInfo(e.name, "U8", e.shape).num_elements for e in entries),
        bytes_by_kind={kind: by_kind[kind] for kind in order if kind in by_kind},
        resident_bytes=_resident_bytes(checkpoint, modules) if modules else checkpoint.num_bytes,
        plan=None if modules else _plan(checkpoint, recipe or Recipe()),
        entries=entries,
        readers={name: problems(r, checkpoint) for name, r in READERS.items()} if modules else {},
    )


def _entries(checkpoint: Checkpoint, modules: Mapping[str, StoredWeight]) -> Iterator[Entry]:
    for tensor in checkpoint.tensors:
        module, _, part = tensor.name.rpartition(".")
        if module not in modules or part not in PARTS:
            info = tensor.info
            yield Entry(info.name, info.dtype, info.shape, None, info.num_bytes)
        elif part == "weight_packed":
            weight = modules[module]
            stored = (weight.packed, weight.scale, weight.shape_record)
            num_bytes = sum(part.info.num_bytes for part in stored)
            yield Entry(f"{module}.weight", "int8", weight.shape, weight.group_size, num_bytes)


def _kind(tensor: TensorInfo, modules: Mapping[str, StoredWeight]) -> str:
    module, _, part = tensor.name.rpartition(".")
    return PARTS.get(part, tensor.dtype) if module in modules else tensor.dtype


def _resident_bytes(checkpoint: Checkpoint, modules: Mapping[str, StoredWeight]) -> int | None:
    """Bytes in memory, if the manifest tells in which format the scales are held there."""
    if not (checkpoint.root / MANIFEST_NAME).exists():
        return None
    name = read_manifest(checkpoint.root)["job"]["recipe"]["scheme"]["scale_format"]
    if name not in SCALE_FORMATS:
        return None
    quantized = sum(
        Scheme(w.group_size if w.group_size in GROUP_SIZES else "row", name)
        .resident_bytes(w.shape)
        .total
        for w in modules.values()
    )
    kept = [t.info.num_bytes for t in checkpoint.tensors if _kind(t.info, modules) == t.info.dtype]
    return quantized + sum(kept)


def _plan(checkpoint: Checkpoint, recipe: Recipe) -> Plan:
    tied = is_tied(checkpoint.config)
    tensors = [t.info for t in checkpoint.tensors]
    stored = [t for t in tensors if not (tied and t.name.endswith("lm_head.weight"))]
    decisions = recipe.decide_all(stored)
    return Plan(sum(d.disk_bytes for d in decisions), sum(d.resident_bytes for d in decisions))

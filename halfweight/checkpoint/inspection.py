"""What a checkpoint holds, in bytes by kind, from its headers alone.

Works on any safetensors folder or file. For one that is not quantized, the answer holds the plan of
`quantize`: bytes on disk and in memory under a recipe, to the byte.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from halfweight.checkpoint.forms import Form
from halfweight.checkpoint.headers import (
    Checkpoint,
    StoredWeight,
    quantized_modules,
    read_headers,
    resolve,
)
from halfweight.checkpoint.readers import READERS, problems
from halfweight.checkpoint.scale_formats import stored_schemes
from halfweight.checkpoint.sources.source import is_tied
from halfweight.quantization.scheme import Recipe, TensorInfo

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

    `num_params` counts weights once, however they are stored. `form` names a form of others,
    `remedy` says what to do with it. `plan` is None for a checkpoint that is already quantized,
    unless `quantize` reads its form; where it does not, `num_params` is 0. Of a checkpoint in our
    own form `readers` says why each other program does not read it; nothing where it does.
    """

    path: Path
    num_files: int
    file_bytes: int
    num_params: int
    bytes_by_kind: dict[str, int]
    resident_bytes: int
    plan: Plan | None
    entries: tuple[Entry, ...]
    form: str | None = None
    remedy: str | None = None
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
    form = checkpoint.form
    modules = {} if form else quantized_modules(checkpoint)
    entries = tuple(_entries(checkpoint, modules))
    tensors = [] if modules else _tensors_of_model(checkpoint, form)
    weights = [TensorInfo(e.name, "U8", e.shape) for e in entries] if modules else tensors
    by_kind: dict[str, int] = {}
    for tensor in checkpoint.tensors:
        kind = _kind(tensor.info, modules)
        by_kind[kind] = by_kind.get(kind, 0) + tensor.info.num_bytes
    order = [*PARTS.values(), *sorted(by_kind)]
    return Contents(
        path=path,
        num_files=len(checkpoint.shards),
        file_bytes=sum(shard.num_bytes for shard in checkpoint.shards),
        num_params=sum(tensor.num_elements for tensor in weights),
        bytes_by_kind={kind: by_kind[kind] for kind in order if kind in by_kind},
        resident_bytes=_resident_bytes(checkpoint, modules),
        plan=None if not tensors else _plan(checkpoint, tensors, recipe or Recipe()),
        entries=entries,
        form=form.described if form else None,
        remedy=form.remedy(path) if form else None,
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


def _resident_bytes(checkpoint: Checkpoint, modules: Mapping[str, StoredWeight]) -> int:
    schemes = stored_schemes(checkpoint, modules)
    quantized = sum(schemes[n].resident_bytes(w.shape).total for n, w in modules.items())
    kept = [t.info.num_bytes for t in checkpoint.tensors if _kind(t.info, modules) == t.info.dtype]
    return quantized + sum(kept)


def _tensors_of_model(checkpoint: Checkpoint, form: Form | None) -> list[TensorInfo]:
    """16-bit tensors, or what `quantize` finds in a form of others; none where it is not read."""
    tensors = [t.info for t in checkpoint.tensors]
    if form is None:
        return tensors
    if not form.is_read:
        return []
    from halfweight.checkpoint.sources.others import as_the_model_has_them

    plain, matrices = as_the_model_has_them(form, checkpoint.config, tensors)
    return [*plain, *(matrix.info for matrix in matrices)]


def _plan(checkpoint: Checkpoint, tensors: list[TensorInfo], recipe: Recipe) -> Plan:
    tied = is_tied(checkpoint.config)
    stored = [t for t in tensors if not (tied and t.name.endswith("lm_head.weight"))]
    decisions = recipe.decide_all(stored)
    return Plan(sum(d.disk_bytes for d in decisions), sum(d.resident_bytes for d in decisions))

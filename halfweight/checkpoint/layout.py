"""The form of our output: compressed-tensors `pack-quantized`, as shards, headers and config.

A module P with weight [N, K] becomes P.weight_packed int32 [N, K/4] (bytes q + 128, row-major),
P.weight_scale [N, K/G] and P.weight_shape int64 [2]. Everything here follows from the source's
headers alone, so every byte offset of the output is known before a weight is read.
"""

from __future__ import annotations

import fnmatch
import json
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from halfweight.errors import CheckpointError, UsageError
from halfweight.quantization.scheme import DTYPE_BYTES, Decision, Recipe, Scheme, TensorInfo

MAX_SHARD_BYTES = 2_000_000_000
"""The most work a kill can lose, and a size that every file system and Hub takes."""
ALIGNMENT = 64
"""Data starts at a multiple of a cache line, so that a mapped file can be read as vectors."""


@dataclass(frozen=True)
class OutputShard:
    """One file of the output: the decisions it holds and its tensors in the order of the bytes."""

    name: str
    decisions: tuple[Decision, ...]

    @cached_property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Widest dtype first, so that every tensor is aligned to its own size."""
        tensors = (tensor for decision in self.decisions for tensor in output_tensors(decision))
        return tuple(sorted(tensors, key=lambda tensor: -DTYPE_BYTES[tensor.dtype]))

    @property
    def source_bytes(self) -> int:
        """Bytes of the source's tensors that end up in this file."""
        return sum(decision.tensor.num_bytes for decision in self.decisions)

    @cached_property
    def header(self) -> bytes:
        """The file's first bytes, before any dtype of scales is changed."""
        return header(self.tensors)

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(tensor.num_bytes for tensor in self.tensors)

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Tensor name -> absolute offset in the file."""
        sizes = [tensor.num_bytes for tensor in self.tensors]
        starts = accumulate(sizes, initial=len(self.header))
        return {tensor.name: start for tensor, start in zip(self.tensors, starts, strict=False)}


@dataclass(frozen=True)
class Layout:
    """A whole output: what happens to each tensor, and the files that hold the result."""

    recipe: Recipe
    decisions: tuple[Decision, ...]
    shards: tuple[OutputShard, ...]


def lay_out(
    tensors: Iterable[TensorInfo], recipe: Recipe, kept: Mapping[str, str] | None = None
) -> Layout:
    """Decide on every tensor and plan the output's files.

    `kept` are tensors that stay as they are whatever the recipe says, with the reason.
    Raises UsageError for a recipe that has no form on disk or quantizes nothing, CheckpointError
    for expert weights in one 3-D tensor that the recipe does not keep.
    """
    if recipe.scheme.group_size == "tensor":
        raise UsageError(
            "one scale a tensor cannot be written to a checkpoint",
            hint="use a group size, or 'row'; 'tensor' is for comparison in memory",
        )
    decisions = tuple(
        Decision(d.tensor, None, kept[d.tensor.name]) if kept and d.tensor.name in kept else d
        for d in recipe.decide_all(tensors)
    )
    if not any(decision.scheme for decision in decisions):
        raise UsageError(
            f"nothing to quantize: all {len(decisions)} tensors are kept",
            hint="give fewer --keep; see `halfweight inspect SRC --tensors` for the names",
        )
    for decision in decisions:
        _refuse_fused_experts(decision.tensor, recipe)
    return Layout(recipe, decisions, plan_shards(decisions, MAX_SHARD_BYTES))


def _refuse_fused_experts(tensor: TensorInfo, recipe: Recipe) -> None:
    if len(tensor.shape) != 3 or "experts" not in tensor.name:
        return
    if not any(fnmatch.fnmatchcase(tensor.name, pattern) for pattern in recipe.keep):
        raise CheckpointError(
            f"tensor {tensor.name}: experts fused in one tensor {list(tensor.shape)}, whose "
            f"orientation is not known; expected one matrix an expert",
            hint="--keep '*experts*' leaves them in 16 bits",
        )


def module_of(tensor: TensorInfo) -> str:
    """The module that owns a weight: its name without `.weight`."""
    return tensor.name.removesuffix(".weight")


def output_tensors(decision: Decision) -> tuple[TensorInfo, ...]:
    """What one source tensor becomes on disk: itself, or shape record, packed data and scales."""
    if decision.scheme is None:
        return (decision.tensor,)
    out_features, in_features = decision.tensor.shape
    module = module_of(decision.tensor)
    scales_shape = decision.scheme.scales_shape((out_features, in_features))
    return (
        TensorInfo(f"{module}.weight_shape", "I64", (2,)),
        TensorInfo(f"{module}.weight_packed", "I32", (out_features, in_features // 4)),
        TensorInfo(f"{module}.weight_scale", scale_dtype(decision.scheme), scales_shape),
    )


def scale_dtype(scheme: Scheme) -> str:
    """The dtype of scales on disk. Those of grid8 may become F16 where the source is F16."""
    return scheme.format.disk_dtype or "BF16"


def plan_shards(decisions: Sequence[Decision], max_bytes: int) -> tuple[OutputShard, ...]:
    """Decisions in order, cut into files of at most `max_bytes` (or one tensor)."""
    cuts: list[list[Decision]] = [[]]
    size = 0
    for decision in decisions:
        if cuts[-1] and size + decision.disk_bytes > max_bytes:
            cuts.append([])
            size = 0
        cuts[-1].append(decision)
        size += decision.disk_bytes
    if len(cuts) == 1:
        return (OutputShard("model.safetensors", tuple(cuts[0])),)
    return tuple(
        OutputShard(f"model-{i:05}-of-{len(cuts):05}.safetensors", tuple(cut))
        for i, cut in enumerate(cuts, start=1)
    )


def header(tensors: Iterable[TensorInfo], num_bytes: int = 0) -> bytes:
    """A shard's first bytes, for tensors stored in this order; padded to `num_bytes` if given."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        offsets = [position, position + tensor.num_bytes]
        position += tensor.num_bytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    padded = num_bytes or -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT
    return struct.pack("<Q", padded - 8) + text.ljust(padded - 8)


def with_dtypes(tensors: Iterable[TensorInfo], dtypes: Mapping[str, str]) -> list[TensorInfo]:
    """The tensors with other dtypes of the same size where `dtypes` names them."""
    return [replace(tensor, dtype=dtypes.get(tensor.name, tensor.dtype)) for tensor in tensors]


def index(shards: Sequence[OutputShard]) -> dict[str, Any]:
    """The contents of model.safetensors.index.json."""
    tensors = [(tensor, shard.name) for shard in shards for tensor in shard.tensors]
    total = sum(tensor.num_bytes for tensor, _ in tensors)
    weight_map = {tensor.name: name for tensor, name in sorted(tensors, key=lambda t: t[0].name)}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def quantization_config(decisions: Sequence[Decision]) -> dict[str, Any]:
    """`quantization_config` of config.json: one config group a group size, kept modules ignored.

    A head that is not stored is the embedding's twin, and is ignored too. Targets are patterns on
    the last part of the name where all modules that share it share a group size, so that engines
    which fuse modules find them; else whole names.
    """
    by_size: dict[int | str, list[str]] = defaultdict(list)
    ignore: list[str] = []
    for decision in decisions:
        if decision.scheme is not None:
            by_size[decision.scheme.group_size].append(module_of(decision.tensor))
        elif len(decision.tensor.shape) == 2 and decision.tensor.name.endswith(".weight"):
            ignore.append(module_of(decision.tensor))
    if not any(d.tensor.name.endswith("lm_head.weight") for d in decisions):
        ignore.append("lm_head")
    suffixes = Counter(s for modules in by_size.values() for s in {_suffix(m) for m in modules})
    groups = {
        f"group_{i}": _config_group(size, _targets(modules, suffixes))
        for i, (size, modules) in enumerate(by_size.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


def _suffix(module: str) -> str:
    return module.rpartition(".")[2]


def _targets(modules: Sequence[str], suffixes: Counter[str]) -> list[str]:
    targets = []
    for module in modules:
        suffix = _suffix(module)
        shared = suffixes[suffix] == 1
        targets.append(f"re:(.*\\.)?{re.escape(suffix)}$" if shared else module)
    return list(dict.fromkeys(targets))


def _config_group(group_size: int | str, targets: list[str]) -> dict[str, Any]:
    by_group = isinstance(group_size, int)
    return {
        "targets": targets,
        "weights": {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "strategy": "group" if by_group else "channel",
            "group_size": group_size if by_group else None,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }

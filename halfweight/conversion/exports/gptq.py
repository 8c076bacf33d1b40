"""GPTQ, 8 bits, symmetric: the layout that gptqmodel writes and vLLM reads.

A module P of the repeated layers with weight [N, K] becomes

P.qweight, P.scales, P.qzeros and P.g_idx, whose layout gptq_packing.py says. P.qweight is our own
weight_packed, transposed: not a bit of a weight changes. Zero points are those of GPTQ's first
version, which every reader knows. G is one for the model, the smallest of the folder's; a longer
group's scale is repeated. Embedding and head are dequantized: most readers know them in 16 bits
only.
"""

from __future__ import annotations

import re
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfweight import __version__
from halfweight.checkpoint.headers import StoredWeight
from halfweight.checkpoint.layout import module_of
from halfweight.checkpoint.shard import broken, some
from halfweight.checkpoint.sources import open_source
from halfweight.checkpoint.sources.gptq_packing import (
    ordered_g_idx,
    pack_qweight,
    symmetric_qzeros,
)
from halfweight.checkpoint.sources.int8_folder import Int8Folder
from halfweight.conversion.beside_shards import write_json
from halfweight.conversion.exports.dequantized import (
    DequantizedSource,
    shards_of,
    write_checkpoint_files,
)
from halfweight.conversion.exports.form import (
    Form,
    float16_rounding,
    float16_scales,
    rounding_notes,
)
from halfweight.conversion.exports.source import ExportSource, Rows, bytes_of_rows
from halfweight.conversion.shard_writer import shard_part
from halfweight.errors import CheckpointError
from halfweight.quantization.scheme import TensorInfo

GROUP_SIZES = (32, 64, 128)
"""That vLLM's kernels and gptqmodel have, besides one scale a row; longer groups are split."""
IN_LAYERS = re.compile(r"\.\d+\.")
INSTEAD = "halfweight export --to dequantized writes a checkpoint that GPTQ tools take"


class GptqSource(ExportSource):
    """An Int8Folder as a Source of GPTQ's tensors, groups of `group_size` (None: one a row)."""

    def __init__(self, folder: Int8Folder, modules: list[str], group_size: int | None) -> None:
        self._plain = DequantizedSource(folder)
        self._group_size = group_size
        self._modules = frozenset(modules)
        quantized = {f"{module}.weight" for module in modules}
        own = (t for module in modules for t in self._tensors(module, folder.weights[module]))
        others = (t for t in self._plain.tensors if t.name not in quantized)
        super().__init__(folder, (*own, *others))

    def read(self, tensor: TensorInfo, begin: int, end: int) -> NDArray[np.uint8]:
        """Bytes [begin, end) of a tensor."""
        module, _, part = tensor.name.rpartition(".")
        if module not in self._modules or part == "bias":
            return self._plain.read(tensor, begin, end)
        row_bytes = tensor.num_bytes // tensor.shape[0]
        return bytes_of_rows(self._rows(module, part), row_bytes, begin, end)

    def _group(self, weight: StoredWeight) -> int:
        return self._group_size or weight.shape[1]

    def _tensors(self, module: str, weight: StoredWeight) -> tuple[TensorInfo, ...]:
        rows, columns = weight.shape
        groups = columns // self._group(weight)
        return (
            TensorInfo(f"{module}.qweight", "I32", (columns // 4, rows)),
            TensorInfo(f"{module}.scales", "F16", (groups, rows)),
            TensorInfo(f"{module}.qzeros", "I32", (groups, rows // 4)),
            TensorInfo(f"{module}.g_idx", "I32", (columns,)),
        )

    def _rows(self, module: str, part: str) -> Rows:
        """How rows of a module's tensor are made; those of qweight are columns of ours."""
        weight = self.folder.weights[module]
        group = self._group(weight)
        if part == "qweight":
            packed = self.folder.whole(module)
            return lambda first, last: pack_qweight(packed[:, 4 * first : 4 * last])
        if part == "scales":
            scales = float16_scales(self.folder, module)
            repeats = weight.group_size // group
            return lambda first, last: np.repeat(scales, repeats, axis=1)[:, first:last].T
        if part == "qzeros":
            return lambda first, last: symmetric_qzeros(last - first, weight.shape[0])
        return lambda first, last: ordered_g_idx(last, group)[first:]


def plan(folder: Int8Folder) -> Form:
    """The export of `folder` to GPTQ. Raises CheckpointError for what GPTQ has no form of."""
    modules = [name for name in folder.weights if IN_LAYERS.search(name)]
    group_size = _group_size(folder, modules)
    for module in modules:
        _refuse(folder, module)
    _refuse_turned(folder)
    source = GptqSource(folder, modules, group_size)
    shards = shards_of(source)
    rounding = float16_rounding(folder, modules)
    kept = _kept_matrices(folder)
    notes = list(rounding_notes(rounding))
    if kept:
        notes.append(f"16 bits, excepted by `dynamic`: {some(kept)}")
    quantization = quantization_config(group_size, kept)

    def write_beside(out: Path) -> None:
        config = {**folder.config, "quantization_config": quantization}
        write_checkpoint_files(folder, out, shards, config)
        write_json(out / "quantize_config.json", quantization)

    return Form(
        parts=tuple(shard_part(source, shard) for shard in shards),
        shards=shards,
        write_beside=write_beside,
        check=check,
        num_int8=len(modules),
        num_dequantized=len(folder.weights) - len(modules),
        num_kept=len(folder.plain),
        rounding=rounding,
        notes=tuple(notes),
    )


def quantization_config(group_size: int | None, kept: list[str]) -> dict[str, Any]:
    """What gptqmodel, vLLM and transformers read; `kept` modules are excepted by name."""
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": 8,
        "group_size": group_size or -1,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"halfweight:{__version__}"]},
    }
    if kept:
        config["dynamic"] = {f"-:^{re.escape(module)}$": {} for module in kept}
    return config


def check(out: Path) -> None:
    """Read headers and small parts as `quantize` does; raises CheckpointError for what it refuses.

    Those are shapes that do not fit each other, groups out of order, zero points other than 128.
    """
    tensors = open_source(out).tensors
    if not any(tensor.int8 is not None for tensor in tensors):
        raise broken(out, "no GPTQ module in it")


def _group_size(folder: Int8Folder, modules: list[str]) -> int | None:
    """The group size for all of the model; None where every module has one scale a row."""
    if not modules:
        raise CheckpointError(
            f"{folder.path}: no layer is in INT8, so there is nothing for GPTQ to hold",
            hint=INSTEAD,
        )
    weights = [folder.weights[module] for module in modules]
    if all(weight.group_size == weight.shape[1] for weight in weights):
        return None
    common = gcd(*(weight.group_size for weight in weights))
    fitting = [size for size in GROUP_SIZES if common % size == 0]
    if not fitting:
        raise CheckpointError(
            f"{folder.path}: groups of {common} weights, expected a multiple of {GROUP_SIZES[0]}",
            hint=INSTEAD,
        )
    return max(fitting)


def _refuse(folder: Int8Folder, module: str) -> None:
    rows, _ = folder.weights[module].shape
    found = None
    if ".experts." in module:
        found = "experts"
    elif rows % 4:
        found = f"{rows} outputs, which GPTQ's packed zero points cannot hold"
    if found:
        raise CheckpointError(
            f"{folder.path}: module {module}: {found}, not exported to GPTQ", hint=INSTEAD
        )


def _refuse_turned(folder: Int8Folder) -> None:
    from halfweight.model.building import stored_turned

    for module in stored_turned(folder.config, folder.weights):
        raise CheckpointError(
            f"{folder.path}: module {module}: the model has it as [K, N], not exported to GPTQ",
            hint=INSTEAD,
        )


def _kept_matrices(folder: Int8Folder) -> list[str]:
    """Modules of the layers that are in 16 bits."""
    return [
        module_of(tensor.info)
        for tensor in folder.plain.values()
        if len(tensor.info.shape) == 2
        and tensor.name.endswith(".weight")
        and IN_LAYERS.search(tensor.name)
    ]

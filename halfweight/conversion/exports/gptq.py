"""GPTQ, 8 bits, symmetric: the layout that gptqmodel writes and vLLM reads.

A module P of the repeated layers with weight [N, K] becomes

    P.qweight  int32 [K/4, N]     byte i of element [k, n] is q[n, 4k + i] + 128
    P.scales   float16 [K/G, N]
    P.qzeros   int32 [K/G, N/4]   bytes 127: the zero point 128, less one, as GPTQ's first version
                                  stores it and every reader expects
    P.g_idx    int32 [K]          k // G: groups in order

so qweight is our own weight_packed, transposed: not a bit of a weight changes. G is one for the
model, the smallest of the folder's; a longer group's scale is repeated. Embedding and head are
dequantized: most readers know them in 16 bits only.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfweight import __version__
from halfweight.checkpoint.headers import StoredWeight, read_headers
from halfweight.checkpoint.layout import module_of
from halfweight.checkpoint.shard import broken, some
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
from halfweight.conversion.shard_writer import shard_part
from halfweight.errors import CheckpointError
from halfweight.quantization.scheme import TensorInfo

GROUP_SIZES = (32, 64, 128)
"""That vLLM's kernels and gptqmodel have, besides one scale a row; longer groups are split."""
IN_LAYERS = re.compile(r"\.\d+\.")
ZERO_POINT_BYTES = 127
INSTEAD = "halfweight export --to dequantized writes a checkpoint that GPTQ tools take"


class GptqSource:
    """An Int8Folder as a Source of GPTQ's tensors, groups of `group_size` (None: one a row)."""

    def __init__(self, folder: Int8Folder, modules: list[str], group_size: int | None) -> None:
        self._plain = DequantizedSource(folder)
        self.name, self.path, self.config = folder.name, folder.path, folder.config
        self.stored_bytes = folder.stored_bytes
        self._folder, self._group_size = folder, group_size
        quantized = {f"{module}.weight" for module in modules}
        own = (t for module in modules for t in self._tensors(module, folder.weights[module]))
        others = (t for t in self._plain.tensors if t.name not in quantized)
        self.tensors = (*own, *others)
        self._modules = frozenset(modules)

    def read(self, tensor: TensorInfo, begin: int, end: int) -> NDArray[np.uint8]:
        """Bytes [begin, end) of a tensor."""
        module, _, part = tensor.name.rpartition(".")
        if module not in self._modules or part == "bias":
            return self._plain.read(tensor, begin, end)
        row_bytes = tensor.num_bytes // tensor.shape[0]
        first, last = begin // row_bytes, -(-end // row_bytes)
        rows = self._rows(module, part)(first, last)
        data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
        return data[begin - first * row_bytes : end - first * row_bytes]

    def fingerprint(self) -> dict[str, Any]:
        """That of the folder."""
        return self._folder.fingerprint()

    def state(self) -> list[Any]:
        """That of the folder."""
        return self._folder.state()

    def write_companions(self, folder: Path) -> None:
        """Those of the folder."""
        self._folder.write_companions(folder)

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

    def _rows(self, module: str, part: str) -> Callable[[int, int], NDArray[Any]]:
        """How rows [first, last) of a module's tensor are made."""
        weight = self._folder.weights[module]
        group = self._group(weight)
        if part == "qweight":
            packed = self._folder.whole(module).view(np.int32)
            return lambda first, last: packed[:, first:last].T
        if part == "scales":
            scales = float16_scales(self._folder, module)
            repeats = weight.group_size // group
            return lambda first, last: np.repeat(scales, repeats, axis=1)[:, first:last].T
        if part == "qzeros":
            columns = weight.shape[0]
            return lambda first, last: np.full((last - first, columns), ZERO_POINT_BYTES, np.uint8)
        return lambda first, last: np.arange(first, last, dtype=np.int32) // group


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
    """Raise CheckpointError unless each qweight has the scales, zeros and order that it needs."""
    shapes = {t.name: (t.info.dtype, t.info.shape) for t in read_headers(out).tensors}
    config = read_headers(out).config.get("quantization_config") or {}
    modules = [n.removesuffix(".qweight") for n in shapes if n.endswith(".qweight")]
    if not modules or config.get("quant_method") != "gptq":
        raise broken(out, "no GPTQ module in it")
    for module in modules:
        _, (words, rows) = shapes[f"{module}.qweight"]
        group = config["group_size"] if config["group_size"] > 0 else 4 * words
        groups = 4 * words // group
        expected = {
            "qweight": ("I32", (words, rows)),
            "scales": ("F16", (groups, rows)),
            "qzeros": ("I32", (groups, rows // 4)),
            "g_idx": ("I32", (4 * words,)),
        }
        for part, form in expected.items():
            found = shapes.get(f"{module}.{part}")
            if found != form:
                raise broken(out, f"{module}.{part} is {found}, expected {form}")


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

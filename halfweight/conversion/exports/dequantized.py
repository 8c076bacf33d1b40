"""A plain checkpoint of transformers: each weight is its INT8 value times its scale.

The product is exact in float32 and then rounded to the model's dtype, as `numerics.dequantize`
says. Weights that the model stores as [K, N] are turned back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfweight.checkpoint import layout
from halfweight.checkpoint.headers import INDEX_NAME, read_headers
from halfweight.checkpoint.layout import OutputShard, module_of, plan_shards
from halfweight.checkpoint.sources.int8_folder import Int8Folder
from halfweight.checkpoint.sources.source import Source
from halfweight.checkpoint.sources.turned import turned_source
from halfweight.conversion.beside_shards import write_json
from halfweight.conversion.exports.form import Form
from halfweight.conversion.exports.source import ExportSource, dequantized
from halfweight.conversion.shard_writer import shard_part
from halfweight.model.loadability import rehearse
from halfweight.quantization.float_bytes import as_bytes
from halfweight.quantization.scheme import DTYPE_BYTES, Decision, TensorInfo


class DequantizedSource(ExportSource):
    """An Int8Folder as a Source of 16-bit weights; `tensors` are named as those of its source."""

    def __init__(self, folder: Int8Folder) -> None:
        own = (
            TensorInfo(f"{module}.weight", folder.dtype, weight.shape)
            for module, weight in folder.weights.items()
        )
        super().__init__(folder, (*own, *(stored.info for stored in folder.plain.values())))

    def read(self, tensor: TensorInfo, begin: int, end: int) -> NDArray[np.uint8]:
        """Bytes [begin, end) of a tensor."""
        if tensor.name in self.folder.plain:
            return self.folder.read(tensor.name, begin, end)
        size = DTYPE_BYTES[tensor.dtype]
        values = dequantized(self.folder, module_of(tensor), begin // size, end // size)
        return as_bytes(values, tensor.dtype)


def plan(folder: Int8Folder) -> Form:
    """The export of `folder` to a plain checkpoint in the model's dtype."""
    source = turned_source(DequantizedSource(folder), _turned(folder))
    shards = shards_of(source)
    return Form(
        parts=tuple(shard_part(source, shard) for shard in shards),
        shards=shards,
        write_beside=lambda out: write_checkpoint_files(folder, out, shards, folder.config),
        check=check,
        num_int8=0,
        num_dequantized=len(folder.weights),
        num_kept=len(folder.plain),
    )


def shards_of(source: Source) -> tuple[OutputShard, ...]:
    """The files that hold a source's tensors as it gives them."""
    decisions = [Decision(tensor, None, "") for tensor in source.tensors]
    return plan_shards(decisions, layout.MAX_SHARD_BYTES)


def write_checkpoint_files(
    folder: Int8Folder, out: Path, shards: tuple[OutputShard, ...], config: dict[str, Any]
) -> None:
    """Write config, index and companions beside the shards of an export."""
    folder.write_companions(out)
    write_json(out / "config.json", config)
    if len(shards) > 1:
        write_json(out / INDEX_NAME, layout.index(shards))


def check(out: Path) -> None:
    """Rehearse the load of a plain checkpoint; raises CheckpointError if a tensor is missing."""
    found = read_headers(out)
    rehearse(out, found.config, [tensor.info for tensor in found.tensors], set())


def _turned(folder: Int8Folder) -> set[str]:
    """The weights that the model has as [K, N]."""
    from halfweight.model.building import stored_turned

    return {f"{name}.weight" for name in stored_turned(folder.config, folder.weights)}

"""A folder of INT8 weights as it lies: what an export reads.

No `Source`: a Source gives a tensor as one matrix, and each form of export makes another of a
weight's bytes and scales. Blocks are read as they are asked for; what is asked for again and again
while a weight is written, its scales, is kept for the few weights in hand.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfweight.checkpoint.headers import (
    LEGAL_PREFIXES,
    TORCH_DTYPES,
    StoredWeight,
    check_inside,
    own_dtype,
    quantized_modules,
    read_headers,
)
from halfweight.checkpoint.manifest import MANIFEST_NAME, read_manifest
from halfweight.checkpoint.shard import StoredTensor
from halfweight.checkpoint.sources.folder import copy_companions, fingerprint, read_stored, state
from halfweight.checkpoint.sources.source import publishable
from halfweight.errors import CheckpointError
from halfweight.quantization.float_bytes import as_float32

HELD_WEIGHTS = 3
"""Whose scales or bytes are kept: blocks of neighbours are in work at the same time."""
OFFSET = 128
"""Added to an int8 weight on disk, so that it is an unsigned byte."""


class Int8Folder:
    """`weights` are its modules in INT8, `plain` its other tensors, both in the files' order.

    `dtype` is the model's own: BF16, F16 or F32. `config` is without `quantization_config`.
    """

    def __init__(self, path: Path, name: str) -> None:
        """Read and check all headers. Raises CheckpointError where there is no INT8 weight."""
        checkpoint = read_headers(path)
        found = quantized_modules(checkpoint)
        if not found or not checkpoint.config:
            what = "no INT8 weights" if checkpoint.config else "no config.json"
            raise CheckpointError(
                f"{path}: {what}, expected a folder that `halfweight quantize` made",
                hint=f"halfweight quantize {path} OUT makes one",
            )
        self.path, self.name = path, name
        self.weights: dict[str, StoredWeight] = found
        self.config = publishable(checkpoint.config)
        self.config.pop("quantization_config", None)
        self.dtype = {torch: ours for ours, torch in TORCH_DTYPES.items()}[own_dtype(checkpoint)]
        parts = {part.name for w in found.values() for part in (w.packed, w.scale, w.shape_record)}
        self.plain: dict[str, StoredTensor] = {
            tensor.name: tensor for tensor in checkpoint.tensors if tensor.name not in parts
        }
        self.stored_bytes = checkpoint.num_bytes
        self._checkpoint = checkpoint
        self._lock = Lock()
        self._held: OrderedDict[tuple[str, str], NDArray[Any]] = OrderedDict()

    @property
    def base_model(self) -> str:
        """The model that was quantized, as the manifest names it, else this folder's name."""
        if (self.path / MANIFEST_NAME).is_file():
            source = read_manifest(self.path)["job"].get("source")
            name = source.get("name") if isinstance(source, dict) else None
            if isinstance(name, str):
                return name
        return self.name if not Path(self.name).exists() else self.path.resolve().name

    def read(self, name: str, begin: int, end: int) -> NDArray[np.uint8]:
        """Bytes [begin, end) of a plain tensor."""
        return read_stored(self.plain[name], begin, end)

    def packed(self, module: str, begin: int, end: int) -> NDArray[np.uint8]:
        """Weights [begin, end) of a module in row-major order, as bytes q + 128."""
        return read_stored(self.weights[module].packed, begin, end)

    def whole(self, module: str) -> NDArray[np.uint8]:
        """All weights of a module [N, K], as bytes q + 128."""
        weight = self.weights[module]
        rows, columns = weight.shape
        read = self.packed
        data = self._keep(("packed", module), lambda: read(module, 0, rows * columns))
        return data.reshape(weight.shape)

    def scales(self, module: str) -> NDArray[np.float32]:
        """Scales of a module [N, K/G]; raises CheckpointError unless positive and finite."""
        return self._keep(("scales", module), lambda: self._scales(self.weights[module].scale))

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the folder without reading its weights."""
        return fingerprint(self._checkpoint)

    def state(self) -> list[Any]:
        """Size and modification time of every shard."""
        return state(self._checkpoint)

    def write_companions(self, folder: Path) -> None:
        """Copy tokenizer, generation config and licence; never code."""
        copy_companions(self.path, folder)

    def write_licences(self, folder: Path) -> None:
        """Copy the files whose terms travel with the weights."""
        for path in sorted(self.path.iterdir()):
            if path.name.startswith(LEGAL_PREFIXES) and path.is_file():
                data = check_inside(self.path, path.name).read_bytes()
                (folder / path.name).write_bytes(data)

    def _scales(self, stored: StoredTensor) -> NDArray[np.float32]:
        raw = read_stored(stored, 0, stored.info.num_bytes)
        scales = as_float32(raw, stored.info.dtype).reshape(stored.info.shape)
        good = np.isfinite(scales) & (scales > 0)
        if not good.all():
            raise CheckpointError(
                f"{stored.shard}: tensor {stored.name}: {scales.size - int(good.sum())} of "
                f"{scales.size} scales not positive and finite",
                hint="copy or download this file again, or quantize the source again",
            )
        return scales

    def _keep(self, key: tuple[str, str], make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        with self._lock:
            if key not in self._held:
                kept = [held for held in self._held if held[0] == key[0]]
                if len(kept) >= HELD_WEIGHTS:
                    del self._held[kept[0]]
                self._held[key] = make()
            return self._held[key]

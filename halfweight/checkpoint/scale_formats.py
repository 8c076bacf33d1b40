"""What memory holds of a stored INT8 weight: its scheme, to the byte.

The manifest tells where halfweight wrote the folder. Elsewhere the scales themselves do: those on
grid8's grid become one byte each as they are loaded, others stay in the file's dtype. They are a
hundredth of the file, and the first rows off the grid end the search. A plan starts without numpy.
"""

from __future__ import annotations

from collections.abc import Mapping

from halfweight.checkpoint.headers import Checkpoint, StoredWeight
from halfweight.checkpoint.manifest import MANIFEST_NAME, read_manifest
from halfweight.errors import CheckpointError
from halfweight.quantization.scheme import (
    DTYPE_BYTES,
    SCALE_FORMATS,
    Scheme,
    TensorInfo,
    stored_group_size,
)

FLOAT_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""Dtype of scales on disk -> scale format that holds them as they are."""
SPAN_SCALES = 1_000_000


def stored_schemes(
    checkpoint: Checkpoint, modules: Mapping[str, StoredWeight]
) -> dict[str, Scheme]:
    """Module name -> the scheme that a loaded model holds its weight in.

    Raises CheckpointError for a manifest of a scale format that is not known.
    """
    recorded = _recorded(checkpoint)
    found = {}
    for name, weight in modules.items():
        scale_format = recorded[f"{name}.weight"] if recorded else _format_of(weight)
        found[name] = stored_scheme(weight.packed.info, weight.scale.info, scale_format)
    return found


def stored_scheme(packed: TensorInfo, scale: TensorInfo, scale_format: str | None = None) -> Scheme:
    """The scheme of packed int32 [N, K/4] and scales [N, K/G]; in the file's format by default."""
    group_size = stored_group_size(4 * packed.shape[1], scale.shape[1])
    return Scheme(group_size, scale_format or FLOAT_NAMES.get(scale.dtype, "float32"), "absmax")


class _Recorded(dict[str, str]):
    """Tensor name -> scale format; the recipe's for what is not named."""

    def __init__(self, default: str, named: Mapping[str, str]) -> None:
        super().__init__(named)
        self.default = default

    def __missing__(self, name: str) -> str:
        return self.default


def _recorded(checkpoint: Checkpoint) -> _Recorded | None:
    path = checkpoint.root / MANIFEST_NAME
    if not path.exists():
        return None
    manifest = read_manifest(checkpoint.root)
    records = {n: r for shard in manifest["shards"].values() for n, r in shard["tensors"].items()}
    named = {n: r["scale_format"] for n, r in records.items() if r.get("scale_format")}
    recipe = manifest["job"].get("recipe")
    if recipe is None:
        return None
    default: str = recipe["scheme"]["scale_format"]
    for name in {default, *named.values()} - SCALE_FORMATS.keys():
        raise CheckpointError(
            f"{path}: scale format {name!r} is not known",
            hint=f"expected one of {', '.join(SCALE_FORMATS)}; a newer halfweight may know it",
        )
    return _Recorded(default, named)


def _format_of(weight: StoredWeight) -> str | None:
    """grid8 if every scale lies on the grid, else None: as the file has them."""
    import numpy as np

    from halfweight.quantization.float_bytes import as_float32
    from halfweight.quantization.grid8 import lies_on_grid8

    scale = weight.scale
    if scale.info.dtype not in FLOAT_NAMES:
        return None
    num_rows, num_groups = scale.info.shape
    step = max(1, SPAN_SCALES // num_groups)
    row_bytes = num_groups * DTYPE_BYTES[scale.info.dtype]
    for row in range(0, num_rows, step):
        count = min(step, num_rows - row) * row_bytes
        raw = np.fromfile(scale.shard, np.uint8, count, offset=scale.begin + row * row_bytes)
        if not lies_on_grid8(as_float32(raw, scale.info.dtype).reshape(-1, num_groups)):
            return None
    return "grid8"

"""What is stored and how many bytes it takes. No torch here: plans must start in no time.

Words: a weight is [out_features, in_features] = [N, K]; `group_size` consecutive weights along K
share one scale, so scales are [N, K / group_size]. All byte arithmetic of the project is in this
file; whoever needs a size asks here.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from halfweight.errors import UsageError

GroupSize = int | Literal["row", "tensor"]
ScaleChoice = Literal["absmax", "least_squares"]

GROUP_SIZES = (32, 64, 128, 256)
"""What halfweight quantizes to. Files of others have groups of any size, run as they are."""
FALLBACK_GROUP_SIZES = (128, 64, 32)
"""Tried in this order where the asked group size does not divide in_features."""

FLOAT_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
DTYPE_BYTES = {
    **FLOAT_DTYPE_BYTES,
    **{"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
}
"""Bytes an element of each safetensors dtype."""

ALWAYS_KEPT = ("*norm*", "*.gate.weight", "*router*", "*rotary*", "*position_embeddings.weight")
"""Tensors never quantized: norms, mixture-of-experts routers, position tables."""

DIVIDED_BY_COLUMNS = ("o_proj", "down_proj", "w2")
"""Linears of which each of several ranks holds some columns, by the last part of their names."""


@dataclass(frozen=True)
class ScaleFormat:
    """How a scale is held in memory, and the dtype it takes on disk.

    `group_bytes` bytes a group, plus `row_bytes` a row of the weight. `disk_dtype` None means
    bfloat16 or float16 as the model.
    """

    name: str
    group_bytes: int
    row_bytes: int
    disk_dtype: str | None


SCALE_FORMATS = {
    f.name: f
    for f in (
        ScaleFormat("float32", 4, 0, "F32"),
        ScaleFormat("float16", 2, 0, "F16"),
        ScaleFormat("bfloat16", 2, 0, "BF16"),
        ScaleFormat("grid8", 1, 1, None),
    )
}


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of one quantized weight: INT8 data, scales, and the shape record (disk only)."""

    data: int
    scales: int
    shape_record: int = 0

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return self.data + self.scales + self.shape_record


@dataclass(frozen=True)
class Scheme:
    """How one weight matrix is quantized. The default is halfweight's: grid8, groups of 128.

    `group_size` is one of GROUP_SIZES in what a Recipe makes, any number in what others made.
    """

    group_size: GroupSize = 128
    scale_format: str = "grid8"
    scale_choice: ScaleChoice = "least_squares"

    def __post_init__(self) -> None:
        size = self.group_size
        if not (isinstance(size, int) and size > 0) and size not in ("row", "tensor"):
            raise _not_a_group_size(size)
        if self.scale_format not in SCALE_FORMATS:
            raise UsageError(
                f"scale format {self.scale_format!r} is not known",
                hint=f"use one of {', '.join(SCALE_FORMATS)}",
            )
        if self.scale_choice not in ("absmax", "least_squares"):
            raise UsageError(
                f"scale choice {self.scale_choice!r} is not known",
                hint="use absmax or least_squares",
            )
        if self.group_size == "tensor" and self.scale_format == "grid8":
            raise UsageError(
                "one scale a tensor cannot use grid8, which keeps an exponent a row",
                hint="use scale format float32, bfloat16 or float16 with group size 'tensor'",
            )

    @property
    def format(self) -> ScaleFormat:
        """The row of SCALE_FORMATS that this scheme uses."""
        return SCALE_FORMATS[self.scale_format]

    def for_in_features(self, in_features: int) -> Scheme | None:
        """This scheme with a group size that divides `in_features`, or None if none does.

        The asked size if it divides, else the largest of FALLBACK_GROUP_SIZES below it that does.
        """
        if not isinstance(self.group_size, int):
            return self if in_features % 4 == 0 else None
        sizes = (self.group_size, *(g for g in FALLBACK_GROUP_SIZES if g < self.group_size))
        for size in sizes:
            if in_features and in_features % size == 0:
                return replace(self, group_size=size)
        return None

    def scales_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of the scales of a weight [N, K]: [N, K/G], [N, 1] for a row, [1, 1] a tensor."""
        out_features, in_features = shape
        if self.group_size == "tensor":
            return (1, 1)
        if self.group_size == "row":
            return (out_features, 1)
        if in_features % self.group_size:
            raise UsageError(
                f"group size {self.group_size} does not divide in_features {in_features}",
                hint="choose a group size that divides it",
            )
        return (out_features, in_features // self.group_size)

    def resident_bytes(self, shape: tuple[int, int]) -> WeightBytes:
        """Bytes of a weight [N, K] in memory: one a weight, plus its scales."""
        num_rows, _ = scales_shape = self.scales_shape(shape)
        scales = prod(scales_shape) * self.format.group_bytes + num_rows * self.format.row_bytes
        return WeightBytes(prod(shape), scales)

    def disk_bytes(self, shape: tuple[int, int]) -> WeightBytes:
        """Bytes of a weight [N, K] in a checkpoint: data, scales, int64 [2] shape record."""
        scale_bytes = DTYPE_BYTES[self.format.disk_dtype or "BF16"]
        return WeightBytes(prod(shape), prod(self.scales_shape(shape)) * scale_bytes, 16)


Q8_0_SCHEME = Scheme(32, "float16", "absmax")
"""GGUF's own INT8."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint as its header describes it; no data.

    `int8` is the scheme of a weight whose INT8 values the checkpoint has, if in another layout.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    int8: Scheme | None = None

    @property
    def num_elements(self) -> int:
        """Number of elements; 1 for a scalar."""
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.num_elements * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Decision:
    """What happens to one tensor: quantized by `scheme`, or kept (scheme None) for `reason`."""

    tensor: TensorInfo
    scheme: Scheme | None
    reason: str

    @property
    def keeps_int8(self) -> bool:
        """Whether INT8 values of the source are taken as they are."""
        return self.scheme is not None and self.scheme == self.tensor.int8

    @property
    def resident_bytes(self) -> int:
        """Bytes in memory once loaded."""
        if self.scheme is None:
            return self.tensor.num_bytes
        return self.scheme.resident_bytes(self._matrix).total

    @property
    def disk_bytes(self) -> int:
        """Bytes of data in the checkpoint."""
        if self.scheme is None:
            return self.tensor.num_bytes
        return self.scheme.disk_bytes(self._matrix).total

    @property
    def _matrix(self) -> tuple[int, int]:
        out_features, in_features = self.tensor.shape
        return out_features, in_features


@dataclass(frozen=True)
class Recipe:
    """What to do with a whole checkpoint: one scheme, and globs of tensors kept in 16 bits.

    What is INT8 in the source stays as it is, unless `requantize` gives it the scheme as well.
    Groups are smaller where `tensor_parallel` ranks' columns would not hold whole ones.
    """

    scheme: Scheme = Scheme()
    keep: tuple[str, ...] = ()
    requantize: bool = False
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        if self.scheme.group_size not in (*GROUP_SIZES, "row", "tensor"):
            raise _not_a_group_size(self.scheme.group_size)

    def decide(self, tensor: TensorInfo) -> Decision:
        """Quantize or keep one tensor, with the reason in words.

        Linears, embeddings and the output head are quantized: every 2-D floating point tensor
        named `*.weight` that is not in ALWAYS_KEPT or `keep`. One that is INT8 already stays so.
        """
        if tensor.dtype not in FLOAT_DTYPE_BYTES:
            return Decision(tensor, None, f"{tensor.dtype} is not a floating point type")
        if len(tensor.shape) != 2 or not tensor.name.endswith(".weight"):
            return Decision(tensor, None, "not a weight matrix")
        for pattern in (*ALWAYS_KEPT, *self.keep):
            if fnmatch.fnmatchcase(tensor.name, pattern):
                return Decision(tensor, None, f"kept by {pattern!r}")
        if tensor.int8 is not None and not self.requantize:
            groups = tensor.int8.group_size
            size = "one scale a row" if groups == "row" else f"groups of {groups}"
            return Decision(tensor, tensor.int8, f"INT8 in the source, kept bit for bit: {size}")
        columns, what = self._columns(tensor)
        scheme = self.scheme.for_in_features(columns)
        if scheme is None:
            return Decision(tensor, None, f"no group size divides {what}")
        if scheme.group_size != self.scheme.group_size:
            asked = self.scheme.group_size
            what = what.removeprefix("in_features ")
            reason = f"group size {scheme.group_size}: {asked} does not divide {what}"
            return Decision(tensor, scheme, reason)
        return Decision(tensor, scheme, "")

    def _columns(self, tensor: TensorInfo) -> tuple[int, str]:
        """How many columns groups have to divide, and how they are called: 0 where ranks do not."""
        columns, ranks = tensor.shape[1], self.tensor_parallel
        own = tensor.name.removesuffix(".weight").rpartition(".")[2]
        if ranks == 1 or own not in DIVIDED_BY_COLUMNS:
            return columns, f"in_features {columns}"
        each, rest = divmod(columns, ranks)
        return (0 if rest else each), f"{columns / ranks:g}, the columns that each rank has"

    def decide_all(self, tensors: Iterable[TensorInfo]) -> list[Decision]:
        """`decide` for each tensor, in the given order."""
        return [self.decide(tensor) for tensor in tensors]


def stored_group_size(in_features: int, num_groups: int) -> GroupSize:
    """The group size of a weight that lies in a file with `num_groups` scales a row."""
    size = in_features // num_groups
    return "row" if num_groups == 1 and size not in GROUP_SIZES else size


def _not_a_group_size(size: object) -> UsageError:
    return UsageError(
        f"group size {size!r} is not supported",
        hint=f"use one of {', '.join(map(str, GROUP_SIZES))}, row, tensor",
    )

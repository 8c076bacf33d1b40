"""hopper_gemv.cu: one token or two, where reading the weights is the whole cost.

x lies in registers, so rows may be so long and no longer; longer ones are hopper_small.cu's.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfweight.kernels.cuda import driver

ARCHITECTURE = "sm_90a"
FILES = ("cuda/ptx.cuh", "hopper/hopper.cuh", "hopper/words.cuh", "hopper/hopper_gemv.cu")
TOKENS = (1, 2)
"""Of the compiled forms: with four, hopper_small.cu is faster."""
WARPS = 8
THREADS = 32 * (WARPS + 1)
SEGMENT = 16
"""Columns that share a step."""
COLUMNS = SEGMENT * 32 * WARPS
"""Of x, of which a thread has a segment."""
MOST_SEGMENTS = 8
"""Of a thread, for all tokens: registers."""
ROWS = (8, 4, 2, 1)
"""Of a stage: whole ones, one behind the other, in one copy."""
STAGE_BYTES = 32 << 10
RING_BYTES = 136 << 10
"""Four stages of 32 KB. Three are fewer than the memory's latency wants; more leave less room for
the blocks of other kernels (docs/notes/kernels.md has the times)."""
MOST_SHARED_BYTES = RING_BYTES + (4 << 10)
"""The ring, its barriers, and the warps' sums of a stage."""
MOST_STAGES = 16
ONE_SCALE_A_ROW = 31
"""Columns are shifted by this to their group."""
COMMON_SEGMENTS = (1, 2, 4)
"""A thread's, of rows of up to 4,096, 8,192 and 16,384 columns: compiled ahead."""


class Operands(ctypes.Structure):
    """`Operands` of hopper_gemv.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("packed", "x", "codes", "exponents", "bias", "y")),
        *((name, ctypes.c_int) for name in ("out_features", "in_features", "num_groups")),
        *((name, ctypes.c_int) for name in ("group_shift", "num_workers", "stages")),
    ]


@dataclass(frozen=True)
class Form:
    """A compiled form for `tokens`, and the ring for rows of this kind."""

    tokens: int
    in_features: int
    num_groups: int

    @property
    def segments(self) -> int:
        """Of 16 columns that a thread has."""
        return -(-self.in_features // COLUMNS)

    @property
    def rows(self) -> int:
        """Of a stage."""
        return rows_of(self.in_features)

    @property
    def stages(self) -> int:
        """Of the ring."""
        return min(MOST_STAGES, RING_BYTES // (self.stage_bytes + 16))

    @property
    def stage_bytes(self) -> int:
        """A stage's rows: weights, and the words that hold codes, exponents and biases."""
        counts = self.rows * self.num_groups, self.rows, 2 * self.rows
        words = sum((count + 7) // 4 for count in counts)
        return -(-(self.rows * self.in_features + 4 * words) // 128) * 128

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory, in the order of `Places`."""
        return self.stages * (self.stage_bytes + 16) + 2 * self.rows * self.tokens * WARPS * 4

    @property
    def defines(self) -> dict[str, int]:
        """Compile-time names of the source."""
        return names_of(self.tokens, self.segments, self.rows)


def rows_of(in_features: int) -> int:
    """Rows of a stage."""
    return next((n for n in ROWS if n * in_features <= STAGE_BYTES), 1)


def names_of(tokens: int, segments: int, rows: int) -> dict[str, int]:
    """Compile-time names of a form."""
    return {"TOKENS": tokens, "SEGMENTS": segments, "ROWS": rows}


def source(names: dict[str, int], dtype: torch.dtype) -> str:
    """The kernel's text: compile-time choices, then FILES."""
    folder = Path(__file__).parents[1]
    chosen = names | {"BF16": int(dtype == torch.bfloat16)}
    parts = [f"#define {name} {value}" for name, value in chosen.items()]
    return "\n".join([*parts, *((folder / name).read_text() for name in FILES)])


def common_sources(dtype: torch.dtype) -> list[str]:
    """Of the forms that models' products take."""
    return [
        source(names_of(tokens, segments, rows_of(segments * COLUMNS)), dtype)
        for tokens in TOKENS
        for segments in COMMON_SEGMENTS
    ]


@lru_cache(maxsize=4096)
def form_for(num_tokens: int, in_features: int, num_groups: int) -> Form | None:
    """The form for a product that Hopper's kernels take, or None."""
    if num_tokens not in TOKENS:
        return None
    form = Form(num_tokens, in_features, num_groups)
    return form if num_tokens * form.segments <= MOST_SEGMENTS else None


@cache
def _kernel(tokens: int, segments: int, rows: int, dtype: torch.dtype, device: int) -> Any:
    text = source(names_of(tokens, segments, rows), dtype)
    return driver.load(text, ARCHITECTURE, b"w8a16_gemv", MOST_SHARED_BYTES, device)


@lru_cache(maxsize=4096)
def _start(form: Form, workers: int, dtype: torch.dtype, device: int, stream: int) -> driver.Start:
    sizes = (workers, THREADS, form.shared_bytes)
    kernel = _kernel(form.tokens, form.segments, form.rows, dtype, device)
    return driver.prepare(kernel, sizes, stream, device, is_early=True)


def operands_of(
    form: Form,
    num_workers: int,
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    exponents: Tensor,
    bias: Tensor | None,
    y: Tensor,
) -> Operands:
    """What the kernel must know of y [M, N] = x [M, K] W^T, with scales [N, K/G]."""
    num_groups, columns = scales.shape[1], x.shape[1]
    shift = ONE_SCALE_A_ROW if num_groups == 1 else (columns // num_groups).bit_length() - 1
    tensors = (packed, x, scales, exponents, bias, y)
    sizes = (len(packed), columns, num_groups, shift, num_workers, form.stages)
    return Operands(*map(driver.address, tensors), *sizes)


def launch(
    form: Form,
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    exponents: Tensor,
    bias: Tensor | None,
    y: Tensor,
) -> None:
    """Fill y [M, N]; x and packed in memory that 16-byte copies can read."""
    device = x.device.index
    workers = min(driver.num_multiprocessors(device), -(-len(packed) // form.rows))
    stream = torch.cuda.current_stream(device).cuda_stream
    start = _start(form, workers, y.dtype, device, stream)
    given = operands_of(form, workers, x, packed, scales, exponents, bias, y)
    driver.launch(start, ctypes.addressof(given))

"""hopper_gemv.cu: up to 4 tokens, where reading the weights is the whole cost.

x lies in registers, so rows may be so long and no longer. What it does not take is hopper_small.cu's
or the Triton backend's.
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
FILES = ("cuda/ptx.cuh", "hopper/hopper.cuh", "hopper/hopper_gemv.cu")
TOKENS = (1, 2, 4)
"""Of the compiled forms; 3 are computed as 4."""
WARPS = 8
THREADS = 32 * (WARPS + 1)
SEGMENT = 16
"""Columns that share a step."""
SEGMENTS = 8
"""Of x, for all tokens, that a thread has registers for."""
ROWS = (8, 4, 2, 1)
STAGE_BYTES = 32 << 10
BLOCKS = ((3, 2), (2, 4), (1, SEGMENTS))
"""Of a multiprocessor, for so many segments of all tokens at most, which is what registers allow."""
MOST_STAGES = 4
LEAST_STAGES = 2
ONE_SCALE_A_ROW = 31
"""Columns are shifted by this to their group."""


class Operands(ctypes.Structure):
    """`Operands` of hopper_gemv.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("packed", "x", "codes", "exponents", "bias", "y")),
        *((name, ctypes.c_int) for name in ("num_tokens", "out_features", "in_features")),
        *((name, ctypes.c_int) for name in ("num_groups", "group_shift", "num_workers", "stages")),
    ]


@dataclass(frozen=True)
class Form:
    """A compiled form, the ring's stages, and how many blocks a multiprocessor has."""

    tokens: int
    segments: int
    rows: int
    in_features: int
    num_groups: int
    stages: int
    blocks: int

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

    def defines(self, dtype: torch.dtype) -> dict[str, int]:
        """Compile-time names of the source."""
        sizes = {"TOKENS": self.tokens, "SEGMENTS": self.segments, "ROWS": self.rows}
        return sizes | {"BF16": int(dtype == torch.bfloat16)}


def source(defines: dict[str, int]) -> str:
    """The kernel's text: compile-time choices, then FILES."""
    folder = Path(__file__).parents[1]
    parts = [f"#define {name} {value}" for name, value in defines.items()]
    return "\n".join([*parts, *((folder / name).read_text() for name in FILES)])


@lru_cache(maxsize=4096)
def form_for(
    num_tokens: int, in_features: int, num_groups: int, multiprocessor_bytes: int
) -> Form | None:
    """The form for weights with rows of this kind, or None."""
    tokens = next((n for n in TOKENS if n >= num_tokens), None)
    segments = -(-in_features // (SEGMENT * 32 * WARPS))
    if tokens is None or tokens * segments > SEGMENTS:
        return None
    blocks = next(n for n, most in BLOCKS if tokens * segments <= most)
    rows = next((n for n in ROWS if n * in_features <= STAGE_BYTES), 1)
    for stages in range(MOST_STAGES, LEAST_STAGES - 1, -1):
        form = Form(tokens, segments, rows, in_features, num_groups, stages, blocks)
        if blocks * (form.shared_bytes + 1024) <= multiprocessor_bytes:
            return form
    return None


def _form(x: Tensor, packed: Tensor, scales: Tensor) -> Form | None:
    room, columns = driver.card_of(x.device.index).shared_bytes, packed.shape[1]
    return form_for(x.numel() // columns, columns, scales.shape[1], room)


def takes(x: Tensor, packed: Tensor, scales: Tensor) -> bool:
    """Whether hopper_gemv.cu computes a product that Hopper's kernels take, with grid8 scales."""
    columns, num_groups = packed.shape[1], scales.shape[1]
    return (
        x.numel() <= TOKENS[-1] * columns
        and columns % SEGMENT == 0
        and (num_groups == 1 or columns // num_groups % SEGMENT == 0)
        and packed.data_ptr() % 16 == 0
        and _form(x, packed, scales) is not None
    )


@cache
def _kernel(form: Form, dtype: torch.dtype, device: int) -> Any:
    text = source(form.defines(dtype))
    return driver.load(text, ARCHITECTURE, b"w8a16_gemv", form.shared_bytes, device)


@lru_cache(maxsize=4096)
def _start(form: Form, workers: int, dtype: torch.dtype, device: int, stream: int) -> driver.Start:
    sizes = (workers, THREADS, form.shared_bytes)
    space = driver.workspace(device, stream, 1, 1)
    return driver.prepare(_kernel(form, dtype, device), sizes, stream, space, is_early=True)


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
    sizes = (len(x), len(packed), columns, num_groups, shift, num_workers, form.stages)
    return Operands(*map(driver.address, tensors), *sizes)


def launch(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    exponents: Tensor,
    bias: Tensor | None,
    y: Tensor,
) -> None:
    """Fill y [M, N]; for what `takes` says, x in memory that 16-byte copies can read."""
    device = x.device.index
    form = _form(x, packed, scales)
    assert form is not None
    workers = min(form.blocks * driver.num_multiprocessors(device), -(-len(packed) // form.rows))
    stream = torch.cuda.current_stream(device).cuda_stream
    start = _start(form, workers, y.dtype, device, stream)
    given = operands_of(form, workers, x, packed, scales, exponents, bias, y)
    driver.launch(start, ctypes.addressof(given))

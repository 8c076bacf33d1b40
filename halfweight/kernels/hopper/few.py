"""hopper_few.cu: up to 16 tokens, where reading the weights is the whole cost.

x lies in shared memory as two bytes a number beside the ring of weights, so many tokens of long rows
leave no room for it; those are hopper_small.cu's.
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
from halfweight.kernels.hopper.tensor_map import tensor_map

ARCHITECTURE = "sm_90a"
FILES = ("cuda/ptx.cuh", "hopper/hopper.cuh", "hopper/hopper_few.cu")
MOST_TOKENS = 16
TILES = (1, 2, 4)
"""Compiled forms: NT, of four tokens each."""
ROWS, WARPS, UNIT = 16, 8, 128
"""As in hopper_few.cu: rows of W a tile, warps that multiply, columns of each and of a step."""
COLUMNS = WARPS * UNIT
THREADS = 32 * (WARPS + 1)
STAGE_BYTES = ROWS * COLUMNS
STAGES = 6
"""Of 16 KB each: what two blocks of a multiprocessor hold of the memory's latency, and more."""
LEAST_STAGES = 3
ONE_SCALE_A_ROW = 31
"""Columns are shifted by this to their group."""


class Operands(ctypes.Structure):
    """`Operands` of hopper_few.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("packed", "x", "codes", "exponents", "bias", "y")),
        *((name, ctypes.c_int) for name in ("num_tokens", "out_features", "in_features")),
        *((name, ctypes.c_int) for name in ("num_groups", "group_shift", "num_workers")),
        *((name, ctypes.c_int) for name in ("stages", "code_slots")),
    ]


@dataclass(frozen=True)
class Form:
    """How products of these sizes are computed: as many stages as the ring has."""

    num_tokens: int
    in_features: int
    num_groups: int
    stages: int

    @property
    def tiles(self) -> int:
        """NT of the compiled form."""
        return next(n for n in TILES if 4 * n >= self.num_tokens)

    @property
    def pieces(self) -> int:
        """Stages of a tile."""
        return -(-self.in_features // COLUMNS)

    @property
    def code_slots(self) -> int:
        """Tiles whose codes the ring reaches."""
        return 1 + -(-(self.stages - 1) // self.pieces)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory, in the order of `Places`."""
        units, tokens = self.pieces * WARPS, 4 * self.tiles
        sums, steps = 2 * WARPS * ROWS * tokens * 4, units * tokens * 4
        x = 2 * self.num_tokens * (units * UNIT + 64)
        ring = self.stages * (STAGE_BYTES + 16)
        return ring + 64 + sums + steps + self.code_slots * ROWS * self.num_groups + x


def source(tiles: int, dtype: torch.dtype) -> str:
    """The kernel's text for products of 4 `tiles` tokens."""
    folder = Path(__file__).parents[1]
    defines = f"#define NT {tiles}\n#define BF16 {int(dtype == torch.bfloat16)}\n"
    return defines + "\n".join((folder / name).read_text() for name in FILES)


@lru_cache(maxsize=4096)
def form_for(
    num_tokens: int, in_features: int, num_groups: int, multiprocessor_bytes: int
) -> Form | None:
    """The form whose blocks fit a multiprocessor's shared memory twice, else once, or None."""
    for blocks in (2, 1):
        for stages in range(STAGES * (3 - blocks), LEAST_STAGES - 1, -1):
            form = Form(num_tokens, in_features, num_groups, stages)
            if blocks * (form.shared_bytes + 1024) <= multiprocessor_bytes:
                return form
    return None


def takes(x: Tensor, packed: Tensor, scales: Tensor) -> bool:
    """Whether hopper_few.cu computes a product that Hopper's kernels take, with grid8 scales."""
    (rows, columns), num_groups = packed.shape, scales.shape[1]
    return (
        x.numel() <= MOST_TOKENS * columns
        and rows % ROWS == 0
        and columns % UNIT == 0
        and (num_groups == 1 or columns // num_groups % UNIT == 0)
        and packed.data_ptr() % 16 == 0
        and _form(x.numel() // columns, columns, num_groups, x.device.index) is not None
    )


def _form(num_tokens: int, in_features: int, num_groups: int, device: int) -> Form | None:
    return form_for(num_tokens, in_features, num_groups, driver.card_of(device).shared_bytes)


@cache
def _kernel(form: Form, dtype: torch.dtype, device: int) -> Any:
    text = source(form.tiles, dtype)
    return driver.load(text, ARCHITECTURE, b"w8a16_few", form.shared_bytes, device)


@lru_cache(maxsize=4096)
def _start(
    form: Form, num_workers: int, dtype: torch.dtype, device: int, stream: int
) -> driver.Start:
    sizes = (num_workers, THREADS, form.shared_bytes)
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
    sizes = (len(x), len(packed), columns, num_groups, shift, num_workers)
    return Operands(*map(driver.address, tensors), *sizes, form.stages, form.code_slots)


def _map(packed: Tensor) -> Any:
    rows, columns = packed.shape
    sizes = (UNIT, rows, columns // UNIT)
    return tensor_map(packed.data_ptr(), "uint8", sizes, (columns, UNIT), (UNIT, ROWS, WARPS))


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
    form = _form(*x.shape, scales.shape[1], device)
    assert form is not None
    workers = min(driver.num_multiprocessors(device), len(packed) // ROWS)
    stream = torch.cuda.current_stream(device).cuda_stream
    start = _start(form, workers, y.dtype, device, stream)
    given = operands_of(form, workers, x, packed, scales, exponents, bias, y)
    driver.launch(start, _map(packed).getPtr(), ctypes.addressof(given))

"""Numba backend for CPUs: compiled at run time, no build step, cached on disk.

    up to 8 tokens   linear_few   reads the packed bytes once (decode_products.py)
    prefill          linear_many  shares each byte among all tokens (prefill_products.py)
    prefill, AMX     linear_bfloat16, linear_matrix  the same by the CPU's matrix unit
    prefill else     blocks of rows dequantized in cache, then the vendor's matrix product

With VNNI activations become integers of 15 bits (where x has 16) or 23 bits a block of their group,
in two or three digits: they round as x itself does, and their products are exact. Without VNNI, or
in groups that no multiple of 64 divides, they stay floats. One digit, the opt-in, rounds x to int8.

All of it runs on torch's own threads, as many as `torch.get_num_threads()` says. Small matrices
take one thread: waking another would cost more than it saves.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import cache

import torch
from numba.core.registry import cpu_target
from torch import Tensor

from halfweight.errors import UsageError
from halfweight.kernels.cpu import decode_products, prefill_products
from halfweight.kernels.cpu.dot_tiles import ROWS
from halfweight.kernels.cpu.llvm_vectors import LANES, LINE
from halfweight.kernels.cpu.matrix_unit import MATRIX_RECORDS
from halfweight.kernels.cpu.threads import Arguments, CFunction, Kernel, num_threads
from halfweight.kernels.operations import Backend
from halfweight.quantization.numerics import QuantizedTensor, dequantize

MAX_DIRECT_TOKENS = 8
"""Larger batches go through dequantized blocks and the vendor's matrix product."""
BLOCK_WEIGHTS = 1 << 21
"""Weights dequantized at a time for prefill: they stay in a shared cache."""
SPARE_RECORDS = 2
"""Rounded tokens that a matrix unit may read past the last."""
SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18
"""How Linux on x86-64 is asked for the tile registers."""
MIN_THREAD_BYTES = 1 << 16
"""Weights that are worth a thread."""
FORMATS = {
    torch.float32: decode_products.FLOAT32,
    torch.bfloat16: decode_products.BFLOAT16,
    torch.float16: decode_products.FLOAT16,
    torch.uint8: decode_products.GRID8,
}

_float_product = CFunction(decode_products.float_product)
_digit_product = CFunction(decode_products.digit_product)
_linear_few = Kernel(decode_products.linear_few)
_round_tokens = Kernel(prefill_products.round_tokens)
_linear_many = Kernel(prefill_products.linear_many)
_linear_matrix = Kernel(prefill_products.linear_matrix)
_linear_bfloat16 = Kernel(prefill_products.linear_bfloat16)


def linear_cells(
    packed: Tensor,
    scales: Tensor,
    exponents: Tensor | None,
    bias: Tensor | None,
    parts: int,
) -> tuple[int, ...]:
    """A linear as its kernels know it; `bias` is float32, and all tensors must outlive the call.

    `parts` are the digits that x is to be rounded to, if the weight's groups allow.
    """
    out_features, in_features = packed.shape
    group_size = in_features // scales.shape[1]
    parts = parts if _step_block(group_size) else 0
    return (
        out_features,
        in_features,
        group_size,
        packed.data_ptr(),
        scales.data_ptr(),
        FORMATS[scales.dtype],
        scales.shape[1] if scales.shape[0] > 1 or out_features == 1 else 0,
        0 if exponents is None else exponents.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        parts,
        (_digit_product if parts else _float_product).address,
    )


def linear(
    x: Tensor, packed: Tensor, scales: Tensor, exponents: Tensor | None, bias: Tensor | None
) -> Tensor:
    """x [..., K] times the dequantized weights [N, K], in x's dtype, float32 accumulation."""
    parts = exact_parts(x.dtype)
    if x.numel() // x.shape[-1] <= MAX_DIRECT_TOKENS:
        return _linear_few_tokens(x, packed, scales, exponents, bias, parts)
    if _takes_bfloat16(x, packed.shape[1] // scales.shape[1]):
        return _linear_bfloat16_tokens(x, packed, scales, exponents, bias)
    if parts and _step_block(packed.shape[1] // scales.shape[1]):
        return _linear_many_tokens(x, packed, scales, exponents, bias, parts)
    return _linear_by_blocks(x, QuantizedTensor(packed, scales, exponents), bias)


def exact_parts(dtype: torch.dtype) -> int:
    """Digits that hold activations of `dtype`, 0 where the CPU is better served by floats."""
    if not has_int8_products():
        return 0
    return 3 if dtype == torch.float32 else 2


def max_record_bytes(columns: int, parts: int) -> int:
    """Bytes of a token in digits, at most and in whole lines (decode_products.record_bytes)."""
    blocks = -(-columns // 64)
    return _whole_lines(parts * columns + blocks * (64 * parts + 4))


def _whole_lines(num_bytes: int) -> int:
    return -(-num_bytes // LINE) * LINE


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments: runs as often as one likes, on the same tensors."""

    kernel: Kernel
    arguments: Arguments
    threads: int
    kept: tuple[Tensor, ...]

    def run(self) -> None:
        """Run it on all its threads."""
        self.arguments.cells[decode_products.TICKET] = self.arguments.cells[
            decode_products.THREAD
        ] = 0
        self.kernel.run(self.arguments, self.threads)


def _launch(
    kernel: Kernel, linear: tuple[int, ...], rest: tuple[int, ...], threads: int, work_bytes: int
) -> Launch:
    """A kernel with memory for its threads; `rest` are its cells from TOKENS to Y."""
    own = _whole_lines(work_bytes)
    work = torch.empty(threads * own, dtype=torch.uint8)
    arguments = Arguments(*linear, 0, *rest, threads, 0, work.data_ptr(), own)
    return Launch(kernel, arguments, threads, (work,))


def few_tokens(x: Tensor, weight: QuantizedTensor, bias: Tensor | None, y: Tensor) -> Launch:
    """y [M, N] = x [M, K] times a weight that outlives the launch; bias is float32."""
    return _few_tokens(x, weight, bias, y, exact_parts(x.dtype))


def _few_tokens(
    x: Tensor, weight: QuantizedTensor, bias: Tensor | None, y: Tensor, parts: int
) -> Launch:
    (columns, groups), tokens = (weight.shape[1], weight.scales.shape[1]), x.numel() // x.shape[-1]
    cells = linear_cells(weight.packed, weight.scales, weight.exponents, bias, parts)
    rest = (tokens, x.data_ptr(), FORMATS[x.dtype], y.data_ptr())
    token_bytes = 4 * columns + max_record_bytes(columns, parts)
    scratch = 4 * ROWS * (max(groups, columns // 64) + 4)
    threads = _threads_for(weight.packed)
    return _launch(_linear_few, cells, rest, threads, tokens * token_bytes + scratch)


def _linear_few_tokens(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    exponents: Tensor | None,
    bias: Tensor | None,
    parts: int,
) -> Tensor:
    x, bias = x.contiguous(), None if bias is None else bias.float()
    y = x.new_empty((*x.shape[:-1], packed.shape[0]))
    if y.numel():
        _few_tokens(x, QuantizedTensor(packed, scales, exponents), bias, y, parts).run()
    return y


def _threads_for(packed: Tensor) -> int:
    return min(num_threads(), max(1, packed.numel() // MIN_THREAD_BYTES))


def _linear_by_blocks(x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """Prefill: a block of rows in float32 at a time."""
    out_features, in_features = weight.shape
    rows = x.reshape(-1, in_features).float()
    y = torch.empty(rows.shape[0], out_features)
    step = max(16, BLOCK_WEIGHTS // in_features)
    for n in range(0, out_features, step):
        block = dequantize(_rows(weight, slice(n, n + step)))
        y[:, n : n + step] = torch.mm(rows, block.T)
    if bias is not None:
        y += bias
    return y.to(x.dtype).reshape(*x.shape[:-1], out_features)


def linear_int8(
    x: Tensor, packed: Tensor, scales: Tensor, exponents: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`linear` with x rounded to int8, a step for each token and block of a group (opt-in).

    Where a matrix unit takes bfloat16 as it is, that is faster, and x stays exact.
    """
    group_size = packed.shape[1] // scales.shape[1]
    if _takes_bfloat16(x, group_size):
        return linear(x, packed, scales, exponents, bias)
    if not _step_block(group_size):
        raise UsageError(
            f"int8 activations on the CPU need groups of 64, found group size {group_size}",
            hint="load the model without activations='int8', or quantize it with --group-size 64",
        )
    few = x.numel() // x.shape[-1] <= MAX_DIRECT_TOKENS
    multiply = _linear_few_tokens if few else _linear_many_tokens
    return multiply(x, packed, scales, exponents, bias, 1)


def _linear_many_tokens(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    exponents: Tensor | None,
    bias: Tensor | None,
    parts: int,
) -> Tensor:
    columns, tokens = packed.shape[1], x.numel() // packed.shape[1]
    x, bias = x.contiguous(), None if bias is None else bias.float()
    cells = linear_cells(packed, scales, exponents, bias, parts)
    block, form = _step_block(cells[decode_products.GROUP]), FORMATS[x.dtype]
    by_matrix = tokens * parts >= MATRIX_RECORDS and has_matrix_unit()
    num_records = tokens * parts + SPARE_RECORDS
    record = int(prefill_products.part_bytes.py_func(columns, columns // block))
    records = torch.empty(num_records, record, dtype=torch.uint8)
    y = x.new_empty((*x.shape[:-1], packed.shape[0]))
    source, rounded = x.data_ptr(), records.data_ptr()
    rounding = (tokens, source, form, rounded)
    _launch(_round_tokens, cells, rounding, num_threads(), 4 * (columns + 3 * LANES)).run()
    products = (tokens, rounded, form, y.data_ptr())
    at_once = int(prefill_products.blocks_at_once.py_func(columns)) if by_matrix else 1
    own = prefill_products.many_bytes(columns, block, at_once)
    kernel = _linear_matrix if by_matrix else _linear_many
    _launch(kernel, cells, products, num_threads(), own).run()
    return y


def _takes_bfloat16(x: Tensor, group_size: int) -> bool:
    """Whether a matrix unit takes x as it is."""
    enough = x.numel() // x.shape[-1] >= MATRIX_RECORDS
    return enough and x.dtype == torch.bfloat16 and group_size % 32 == 0 and has_matrix_unit()


def _linear_bfloat16_tokens(
    x: Tensor, packed: Tensor, scales: Tensor, exponents: Tensor | None, bias: Tensor | None
) -> Tensor:
    columns, tokens = packed.shape[1], x.numel() // packed.shape[1]
    x, bias = x.contiguous(), None if bias is None else bias.float()
    cells = linear_cells(packed, scales, exponents, bias, 0)
    y = x.new_empty((*x.shape[:-1], packed.shape[0]))
    own = _bfloat16_bytes(columns, cells[decode_products.GROUP])
    rest = (tokens, x.data_ptr(), FORMATS[x.dtype], y.data_ptr())
    _launch(_linear_bfloat16, cells, rest, num_threads(), own).run()
    return y


@cache
def _bfloat16_bytes(columns: int, group_size: int) -> int:
    at_once = int(prefill_products.blocks_at_once.py_func(2 * columns))
    return prefill_products.many_bytes(columns, group_size, at_once, width=2)


@cache
def has_int8_products() -> bool:
    """Whether kernels are compiled for a CPU that multiplies bytes four at a time (VNNI)."""
    features: str = cpu_target.target_context.codegen().magic_tuple()[2]
    return "+avx512vnni" in features.split(",")


@cache
def has_matrix_unit() -> bool:
    """Whether this CPU multiplies tiles (AMX) and the system lets this process use them."""
    features: str = cpu_target.target_context.codegen().magic_tuple()[2]
    if (
        not {"+amx-tile", "+amx-int8", "+amx-bf16"} <= set(features.split(","))
        or sys.platform != "linux"
    ):
        return False
    granted = ctypes.CDLL(None).syscall(SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    return int(granted) == 0


def _step_block(group_size: int) -> int:
    """Activations that share a step beside weights in groups of `group_size`; 0: none can."""
    return int(decode_products.step_block.py_func(group_size))


def _rows(weight: QuantizedTensor, rows: slice | Tensor) -> QuantizedTensor:
    one_scale = weight.scales.shape[0] == 1 != weight.packed.shape[0]
    return QuantizedTensor(
        weight.packed[rows],
        weight.scales if one_scale else weight.scales[rows],
        None if weight.exponents is None else weight.exponents[rows],
    )


def embedding(
    ids: Tensor, packed: Tensor, scales: Tensor, exponents: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Dequantized rows `ids` [...] as [..., K] in `dtype`."""
    if ids.numel() == 0:
        return torch.empty(*ids.shape, packed.shape[1], dtype=dtype)
    rows = _rows(QuantizedTensor(packed, scales, exponents), ids.reshape(-1))
    return dequantize(rows, dtype).reshape(*ids.shape, packed.shape[1])


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on `device`, or None."""
    return None if device.type == "cpu" else "needs the CPU"


BACKEND = Backend("cpu", unavailable, linear, embedding, linear_int8)

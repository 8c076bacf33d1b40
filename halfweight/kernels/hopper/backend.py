"""CUDA C++ backend for Hopper (compute capability 9.0).

Four kernels share hopper.cuh: hopper_gemv.cu for one token or two and hopper_small.cu for few,
where reading the weights is the whole cost, hopper_large.cu for more, where L2 and the tensor cores
are, and hopper_int8.cu for many tokens rounded to int8. All are persistent, fed by bulk copies, and
read the weights as the file has them. gemv.py and tiles.py choose between them.

The source is compiled by NVRTC, half a second a form, ahead of need as a model is loaded, and then
kept in the cache folder; tensor maps are encoded once for each weight and each activation buffer.
What no kernel takes (scales that are not grid8, float32 activations, gathers) goes to the Triton
backend, by rule and not by failure.
"""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfweight.kernels.cuda import driver
from halfweight.kernels.cuda.schedule import Plan
from halfweight.kernels.hopper import gemv
from halfweight.kernels.hopper.tensor_map import KINDS, tensor_map
from halfweight.kernels.hopper.tiles import (
    INT8,
    LARGE,
    SMALL,
    Config,
    Int8,
    Large,
    choose,
    choose_int8,
)
from halfweight.kernels.operations import Backend, TokenRange
from halfweight.kernels.triton import backend as portable
from halfweight.kernels.triton.tables import COMMON_SHAPE

COMPUTE_CAPABILITY = (9, 0)
INT8_GROUP = 128
"""Int8 activations meet groups of multiples of this, which hopper_int8.cu sums as integers."""
ARCHITECTURE = "sm_90a"
INT8_TOKENS = 512
"""Fewer tokens are multiplied exactly, which is faster as well."""

COMMON_GROUP = 128
REASONS = {
    "hopper_gemv.cu": "reading the weight is the limit: whole rows in a copy, integer dot products",
    "hopper_small.cu": "reading the weight is the limit: mma.sync fed by bulk copies",
    "hopper_large.cu": "L2 and the tensor cores are the limit: wgmma",
}


HEADERS = (
    *("cuda/ptx.cuh", "hopper/hopper.cuh"),
    *("cuda/schedule.cuh", "hopper/words.cuh", "hopper/codes.cuh"),
)


def source(config: Config, groups: int, dtype: torch.dtype) -> str:
    """The kernel's text: compile-time choices, hopper.cuh, wgmma where used, the kernel."""
    defines = {**config.defines(groups), "BF16": int(dtype == torch.bfloat16)}
    folder = Path(__file__).parent
    parts = [f"#define {name} {value}" for name, value in defines.items()]
    for name in HEADERS:
        parts.append((folder.parent / name).read_text())
    if isinstance(config, Large):
        parts.append((folder / "hopper_wgmma.cuh").read_text())
        parts.append(_wgmma(config, "bf16" if dtype == torch.bfloat16 else "f16"))
    parts.append((folder / config.file).read_text())
    return "\n".join(parts)


DESCRIPTOR_HIGH = 0x40000040
"""The high word of every operand's descriptor: see hopper_wgmma.cuh."""


def _wgmma(config: Large, kind: str) -> str:
    """`queue_products`: W from registers, x from shared memory, added to what the sums hold."""
    sums, steps = config.tokens // 2, config.products
    number, constraint, form, signs = "float", "+f", f"k16.f32.{kind}.{kind}", ", 1, 1, 0"
    if isinstance(config, Int8):
        number, constraint, form, signs = "int", "+r", "k32.s32.s8.s8", ""
    places = ", ".join(f"%{i}" for i in range(sums))
    lines = [
        "{ .reg .b64 x; .reg .b32 low; .reg .pred yes; setp.eq.u32 yes, 0, 0;",
        "wgmma.fence.sync.aligned;",
    ]
    for step in range(steps):
        a = ", ".join(f"%{sums + 4 * step + i}" for i in range(4))
        lines += [
            f"add.u32 low, %{sums + 4 * steps}, {2 * step}; mov.b64 x, {{low, {DESCRIPTOR_HIGH}}};",
            f"wgmma.mma_async.sync.aligned.m64n{config.tokens}{form} "
            f"{{{places}}}, {{{a}}}, x, yes{signs};",
        ]
    lines += ["wgmma.commit_group.sync.aligned;", "}"]
    text = "\n".join(f'"{line}\\n"' for line in lines)
    outputs = ", ".join(f'"{constraint}"(sums[{i}])' for i in range(sums))
    inputs = ", ".join(f'"r"(a[{i}][{j}])' for i in range(steps) for j in range(4))
    return (
        f"__device__ __forceinline__ void queue_products({number} (&sums)[{sums}], "
        f"const unsigned (&a)[{steps}][4], unsigned x) {{\n"
        f'asm volatile({text} : {outputs} : {inputs}, "r"(x));\n}}'
    )


@cache
def _kernel(config: Config, groups: int, dtype: torch.dtype, device: int) -> Any:
    text = source(config, groups, dtype)
    return driver.load(text, ARCHITECTURE, config.entry, config.shared_bytes, device)


def _maps(plan: Plan[Config], packed: Tensor, x: Tensor) -> tuple[Any, Any]:
    """Tensor maps of the weights and the activations as `plan` reads them."""
    config = plan.config
    kind = KINDS[x.dtype]
    w_at, x_at, columns = packed.data_ptr(), x.data_ptr(), x.shape[1]
    if isinstance(config, Large):
        w_sizes, x_sizes = (columns, packed.shape[0]), (columns, x.shape[0])
        size = x.element_size()
        x_box = (128 // size, config.tokens // config.cluster)
        return (
            tensor_map(w_at, "uint8", w_sizes, (columns,), (config.columns, plan.rows)),
            tensor_map(x_at, kind, x_sizes, (columns * size,), x_box),
        )
    boxes = config.k_bytes // 128
    w_sizes3, x_sizes3 = (128, packed.shape[0], columns // 128), (64, x.shape[0], columns // 64)
    return (
        tensor_map(w_at, "uint8", w_sizes3, (columns, 128), (128, config.rows, boxes)),
        tensor_map(x_at, kind, x_sizes3, (columns * 2, 128), (64, config.tokens, 2 * boxes)),
    )


def _workspace(device: int, stream: int) -> tuple[Tensor, Tensor]:
    blocks = driver.num_multiprocessors(device)
    sums = blocks * max(config.partial_floats for config in (*SMALL, *LARGE, *INT8))
    return driver.workspace(device, stream, sums, blocks)


@lru_cache(maxsize=16384)
def _start(
    plan: Plan[Config], group_size: int, dtype: torch.dtype, device: int, stream: int
) -> driver.Start:
    """It may start before the kernel ahead of it has ended: it waits before it reads x."""
    config = plan.config
    kernel = _kernel(config, config.groups(group_size), dtype, device)
    grid = plan.num_workers * config.cluster * config.split
    sizes = (grid, config.threads, config.shared_bytes)
    space = _workspace(device, stream)
    return driver.prepare(kernel, sizes, stream, device, space, is_early=True)


def _launch(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    exponents: Tensor,
    bias: Tensor | None,
    y: Tensor,
    plan: Plan[Config],
    steps: Tensor | None = None,
) -> None:
    device, group_size = x.device.index, x.shape[1] // scales.shape[1]
    stream = torch.cuda.current_stream(device).cuda_stream
    start = _start(plan, group_size, y.dtype, device, stream)
    w_map, x_map = _maps(plan, packed, x)
    problem = driver.problem_of(plan, start, x, scales, exponents, bias, y, steps)
    driver.launch(start, w_map.getPtr(), x_map.getPtr(), ctypes.addressof(problem))


def _divides_evenly(group_size: int, num_groups: int) -> bool:
    return num_groups == 1 or (group_size >= 32 and group_size.bit_count() == 1)


def takes(x: Tensor, packed: Tensor, scales: Tensor, exponents: Tensor | None) -> bool:
    """Whether a kernel here computes this product; the Triton backend does the others."""
    return (
        x.dtype in (torch.float16, torch.bfloat16)
        and exponents is not None
        and scales.dtype == torch.uint8
        and packed.shape[1] % 32 == 0
        and packed.is_contiguous()
        and packed.data_ptr() % 16 == 0
        and _divides_evenly(packed.shape[1] // scales.shape[1], scales.shape[1])
        and x.numel() > 0
    )


def linear(
    x: Tensor, packed: Tensor, scales: Tensor, exponents: Tensor | None, bias: Tensor | None
) -> Tensor:
    """x [..., K] times the dequantized weights [N, K], in x's dtype; see hopper.cuh."""
    if exponents is None or not takes(x, packed, scales, exponents):
        return portable.BACKEND.linear(x, packed, scales, exponents, bias)
    rows, y, bias = driver.operands(x, packed, bias)
    operands = (rows, packed, scales.contiguous(), exponents, bias, y)
    form = gemv.form_for(*rows.shape, scales.shape[1])
    if form is not None:
        gemv.launch(form, *operands)
    else:
        group_size, card = packed.shape[1] // scales.shape[1], driver.card_of(x.device.index)
        _launch(*operands, choose(rows.shape[0], *packed.shape, group_size, card))
    return y.reshape(*x.shape[:-1], packed.shape[0])


def takes_int8(x: Tensor, packed: Tensor, scales: Tensor, exponents: Tensor | None) -> bool:
    """Whether hopper_int8.cu computes this product: many tokens, groups no smaller than 128."""
    group_size = packed.shape[1] // scales.shape[1]
    return (
        takes(x, packed, scales, exponents)
        and x.numel() >= INT8_TOKENS * packed.shape[1]
        and (group_size % INT8_GROUP == 0 or scales.shape[1] == 1)
    )


def rounded_for(config: Config, x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] as hopper_int8.cu takes it: int8 [M, K] and float32 [2, blocks of K, padded M], the
    ratios of a token's steps and the steps.
    """
    sizes = config.k_bytes, config.tokens
    (rounded,), steps = portable.round_activations(x, 1, *sizes, with_ratios=True)
    return rounded, steps


def linear_int8(
    x: Tensor, packed: Tensor, scales: Tensor, exponents: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Like `linear`, with x rounded to int8 per token and 512 columns: opt-in, not exact.

    What hopper_int8.cu does not take is `linear`, exact and faster than int8 without it.
    """
    if exponents is None or not takes_int8(x, packed, scales, exponents):
        return linear(x, packed, scales, exponents, bias)
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    chosen = choose_int8(rows.shape[0], *packed.shape, driver.card_of(x.device.index))
    rounded, steps = rounded_for(chosen.config, rows)
    y = torch.empty(rows.shape[0], packed.shape[0], dtype=x.dtype, device=x.device)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    _launch(rounded, packed, scales.contiguous(), exponents, bias, y, chosen, steps)
    return y.reshape(*x.shape[:-1], packed.shape[0])


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on `device`, or None."""
    reason = driver.unavailable(device, lambda found: found == COMPUTE_CAPABILITY, "9.0")
    return reason or portable.BACKEND.unavailable(device)


def ranges(device: torch.device) -> list[TokenRange]:
    """By the model of tiles on this card, for a weight of common size; one token or two by rule."""
    card, first = driver.card_of(device.index or 0), "hopper_gemv.cu"
    found = [TokenRange(1, first, REASONS[first])]
    for tokens in range(1 + gemv.TOKENS[-1], 2 + max(config.tokens for config in SMALL)):
        file = choose(tokens, *COMMON_SHAPE, COMMON_GROUP, card).config.file
        if file != found[-1].kernel:
            found.append(TokenRange(tokens, file, REASONS[file]))
    return found


def prepare(device: torch.device, group_size: int, dtype: torch.dtype) -> None:
    """All forms but those of int8 activations."""
    if dtype in (torch.float16, torch.bfloat16):
        texts = gemv.common_sources(dtype)
        texts += [source(form, form.groups(group_size), dtype) for form in (*SMALL, *LARGE)]
        driver.compile_ahead(texts, ARCHITECTURE)


BACKEND = Backend(
    "cuda",
    unavailable,
    linear,
    portable.BACKEND.embedding,
    linear_int8,
    ranges=ranges,
    prepare=prepare,
)

"""CUDA C++ backend for compute capability 8.0 and up: few to 256 tokens by w8a16.cu.

One kernel, compiled by NVRTC when a form of it is first needed and kept; tiles.py chooses the form
by the device's own facts. One token is the Triton backend's GEMV, more than 256 are its dequantized
blocks and the vendor's product, by rule and not by failure. Nowhere between them are Triton's tiles
faster in the mean, not even on an H200, where they have wgmma (docs/kernels.md).

`choose_backend` takes it on cards that have no wgmma (Hopper's kernels come first), where
cuda-bindings and NVRTC are; without these the Triton backend is taken, and the log says why.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfweight.kernels.cuda import driver, tuned
from halfweight.kernels.cuda.schedule import Plan
from halfweight.kernels.cuda.tiles import SHAPES, Form, Shape, choose, form_on, may_scale, run_of
from halfweight.kernels.operations import Backend, TokenRange
from halfweight.kernels.triton import backend as portable
from halfweight.kernels.triton.tables import REASONS, Config

MIN_CAPABILITY = (8, 0)
EARLY_CAPABILITY = (9, 0)
"""From here on a kernel may start before the one ahead of it has ended."""
MOST_TOKENS = 256
SCALES = {torch.uint8: 0, torch.float16: 1, torch.bfloat16: 2, torch.float32: 3}
"""Kinds of scales as w8a16.cu numbers them."""
FILES = ("ptx.cuh", "schedule.cuh", "w8a16_copies.cuh", "w8a16.cu")
"""Instructions, schedule, copies, kernel."""


class Operands(ctypes.Structure):
    """`Operands` of w8a16.cu."""

    _fields_ = [("packed", ctypes.c_void_p), ("x", ctypes.c_void_p), ("problem", driver.Problem)]


def source(form: Form, run: int, scales: torch.dtype, dtype: torch.dtype) -> str:
    """The kernel's text: compile-time choices, then FILES."""
    defines = form.defines(run, SCALES[scales], dtype == torch.bfloat16)
    parts = [f"#define {name} {value}" for name, value in defines.items()]
    folder = Path(__file__).parent
    parts += [(folder / name).read_text() for name in FILES]
    return "\n".join(parts)


@cache
def _kernel(form: Form, run: int, scales: torch.dtype, dtype: torch.dtype, device: int) -> Any:
    text = source(form, run, scales, dtype)
    return driver.load(text, _architecture(device), b"w8a16", form.shared_bytes, device)


def _architecture(device: int) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@lru_cache(maxsize=16384)
def _start(
    plan: Plan[Form], run: int, scales: torch.dtype, dtype: torch.dtype, device: int, stream: int
) -> driver.Start:
    form, multiprocessors = plan.config, driver.card_of(device).multiprocessors
    kernel = _kernel(form, run, scales, dtype, device)
    floats = multiprocessors * max(shape.partial_floats * shape.blocks for shape in SHAPES)
    blocks = multiprocessors * max(shape.blocks for shape in SHAPES)
    space = driver.workspace(device, stream, floats, blocks)
    sizes = (plan.num_workers, form.shape.threads, form.shared_bytes)
    is_early = torch.cuda.get_device_capability(device) >= EARLY_CAPABILITY
    return driver.prepare(kernel, sizes, stream, device, space, is_early=is_early)


@lru_cache(maxsize=4096)
def _plan(device: int, sizes: tuple[int, int, int], scaled: bool) -> Plan[Form]:
    return choose(driver.card_of(device), sizes, scaled, tuned.ratios_of(device))


def tune(device: int, ratios: Mapping[Shape, float]) -> Path:
    """Keep what was measured of the forms, and choose by it. Returns the file's path."""
    path = tuned.keep(device, ratios)
    _plan.cache_clear()
    return path


def launch(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    exponents: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    plan: Plan[Form],
) -> None:
    """Fill y [M, N] as a plan says; all in memory that 16-byte copies can read."""
    device, num_groups = x.device.index, scales.shape[1]
    stream = torch.cuda.current_stream(device).cuda_stream
    run = run_of(x.shape[1] // num_groups, num_groups)
    start = _start(plan, run, scales.dtype, y.dtype, device, stream)
    problem = driver.problem_of(plan, start, x, scales, exponents, bias, y)
    given = Operands(packed.data_ptr(), x.data_ptr(), problem)
    driver.launch(start, ctypes.addressof(given))


def takes(x: Tensor, packed: Tensor, scales: Tensor, exponents: Tensor | None) -> bool:
    """Whether w8a16.cu computes this product; the Triton backend does the others."""
    num_groups = scales.shape[1]
    return (
        x.dtype in (torch.float16, torch.bfloat16)
        and scales.dtype in SCALES
        and (scales.dtype == torch.uint8) == (exponents is not None)
        and scales.shape[0] == packed.shape[0]
        and packed.shape[1] % 32 == 0
        and (num_groups == 1 or packed.shape[1] // num_groups % 32 == 0)
        and packed.is_contiguous()
        and packed.data_ptr() % 16 == 0
        and 1 < x.numel() // packed.shape[1] <= MOST_TOKENS
    )


def linear(
    x: Tensor, packed: Tensor, scales: Tensor, exponents: Tensor | None, bias: Tensor | None
) -> Tensor:
    """x [..., K] times the dequantized weights [N, K], in x's dtype; see w8a16.cu."""
    if x.numel() > MOST_TOKENS * packed.shape[1]:
        return portable.product(x, packed, scales, exponents, bias, lambda *_: Config("dequantize"))
    if not takes(x, packed, scales, exponents):
        return portable.BACKEND.linear(x, packed, scales, exponents, bias)
    rows, y, bias = driver.operands(x, packed, bias)
    run = run_of(packed.shape[1] // scales.shape[1], scales.shape[1])
    scaled = may_scale(run, scales.dtype == torch.uint8)
    plan = _plan(x.device.index, (rows.shape[0], *packed.shape), scaled)
    launch(rows, packed, scales.contiguous(), exponents, bias, y, plan)
    return y.reshape(*x.shape[:-1], packed.shape[0])


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on `device`, or None."""
    reason = driver.unavailable(device, lambda found: found >= MIN_CAPABILITY, "8.0")
    return reason or portable.BACKEND.unavailable(device)


def ranges(device: torch.device) -> list[TokenRange]:
    """By rule: see the top of this file."""
    return [
        TokenRange(1, "gemv", REASONS["gemv"]),
        TokenRange(2, "w8a16.cu", "mma.sync fed by cp.async; its tile by a model of the card"),
        TokenRange(MOST_TOKENS + 1, "dequantize", REASONS["dequantize"]),
    ]


def prepare(device: torch.device, group_size: int, dtype: torch.dtype) -> None:
    """All forms for weights with one-byte scales."""
    if dtype not in (torch.float16, torch.bfloat16) or group_size % 32:
        return
    index = device.index or 0
    card, run = driver.card_of(index), run_of(group_size, 0)
    shapes = [shape for shape in SHAPES if may_scale(run, True) or not shape.scaled]
    fit = [form for form in (form_on(card, shape) for shape in shapes) if form.stages > 1]
    texts = [source(form, run, torch.uint8, dtype) for form in fit]
    driver.compile_ahead(texts, _architecture(index))


BACKEND = Backend(
    "sm80",
    unavailable,
    linear,
    portable.BACKEND.embedding,
    portable.BACKEND.linear_int8,
    ranges=ranges,
    prepare=prepare,
)

"""CUDA C++ backend for compute capability 8.0 and up: few to 256 tokens by w8a16.cu.

One kernel, compiled by NVRTC when a form of it is first needed and kept; tiles.py chooses the form
by the device's own facts. One token is the Triton backend's GEMV, more than 256 are its dequantized
blocks and the vendor's product, by rule and not by failure.

It is right where it was run: in an emulator on the CPU (tests/kernels/test_kernels_cuda.py). No GPU
has run it yet, so `choose_backend` never takes it by itself: ask for it by name.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfweight.kernels.cuda.driver import Problem, address, check, load, workspace
from halfweight.kernels.cuda.schedule import Plan
from halfweight.kernels.cuda.tiles import (
    SHAPES,
    Card,
    Form,
    choose,
    products_per_clock,
    run_of,
)
from halfweight.kernels.operations import Backend
from halfweight.kernels.triton import backend as portable
from halfweight.kernels.triton.tables import Config

MIN_CAPABILITY = (8, 0)
MOST_TOKENS = 256
SCALES = {torch.uint8: 0, torch.float16: 1, torch.bfloat16: 2, torch.float32: 3}
"""Kinds of scales as w8a16.cu numbers them."""


class _Operands(ctypes.Structure):
    _fields_ = [("packed", ctypes.c_void_p), ("x", ctypes.c_void_p), ("problem", Problem)]


def source(form: Form, run: int, scales: torch.dtype, dtype: torch.dtype) -> str:
    """The kernel's text: compile-time choices, instructions, schedule, kernel."""
    defines = form.defines(run, SCALES[scales], dtype == torch.bfloat16)
    parts = [f"#define {name} {value}" for name, value in defines.items()]
    folder = Path(__file__).parent
    parts += [(folder / name).read_text() for name in ("ptx.cuh", "schedule.cuh", "w8a16.cu")]
    return "\n".join(parts)


@cache
def card_of(device: int) -> Card:
    """What the driver says of a device."""
    from cuda.bindings import driver

    names = driver.CUdevice_attribute
    handle = check(driver.cuDeviceGet(device), "device")

    def ask(name: str) -> int:
        attribute = getattr(names, f"CU_DEVICE_ATTRIBUTE_{name}")
        found: int = check(driver.cuDeviceGetAttribute(attribute, handle), name)
        return found

    bits, khz = ask("GLOBAL_MEMORY_BUS_WIDTH"), ask("MEMORY_CLOCK_RATE")
    return Card(
        ask("MULTIPROCESSOR_COUNT"),
        ask("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
        ask("MAX_SHARED_MEMORY_PER_MULTIPROCESSOR"),
        ask("L2_CACHE_SIZE"),
        2 * khz * 1e3 * bits / 8 / 1e6,  # two transfers a clock
        ask("CLOCK_RATE") / 1e3,
        products_per_clock(torch.cuda.get_device_capability(device)),
    )


@dataclass(frozen=True)
class _Start:
    """How a plan is launched on one stream: what does not change from call to call."""

    kernel: Any
    launch: Any
    partials: Tensor
    flags: Tensor


@cache
def _kernel(form: Form, run: int, scales: torch.dtype, dtype: torch.dtype, device: int) -> Any:
    major, minor = torch.cuda.get_device_capability(device)
    text = source(form, run, scales, dtype)
    return load(text, f"sm_{major}{minor}", b"w8a16", form.shared_bytes, device)


@lru_cache(maxsize=16384)
def _start(
    plan: Plan[Form], run: int, scales: torch.dtype, dtype: torch.dtype, device: int, stream: int
) -> _Start:
    from cuda.bindings import driver

    form, multiprocessors = plan.config, card_of(device).multiprocessors
    launch = driver.CUlaunchConfig()
    launch.gridDimX, launch.gridDimY, launch.gridDimZ = plan.num_workers, 1, 1
    launch.blockDimX, launch.blockDimY, launch.blockDimZ = form.shape.threads, 1, 1
    launch.sharedMemBytes = form.shared_bytes
    launch.hStream = stream
    floats = multiprocessors * max(shape.partial_floats * shape.blocks for shape in SHAPES)
    blocks = multiprocessors * max(shape.blocks for shape in SHAPES)
    kernel = _kernel(form, run, scales, dtype, device)
    return _Start(kernel, launch, *workspace(device, stream, floats, blocks))


def _launch(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    exponents: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    plan: Plan[Form],
) -> None:
    from cuda.bindings import driver

    (num_tokens, in_features), out_features = x.shape, packed.shape[0]
    device, num_groups = x.device.index, scales.shape[1]
    group_size = in_features // num_groups
    stream = torch.cuda.current_stream(device).cuda_stream
    start = _start(plan, run_of(group_size, num_groups), scales.dtype, y.dtype, device, stream)
    problem = Problem(
        *map(address, (scales, exponents, bias, y, start.partials, start.flags, None)),
        *(num_tokens, out_features, in_features, group_size, num_groups),
        *(plan.tiles_m, plan.tiles_n, plan.rows, plan.k_blocks),
        *(plan.whole_waves, plan.num_workers, 0),
    )
    operands = _Operands(address(packed), address(x), problem)
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(operands))
    where = ctypes.addressof(arguments)
    check(driver.cuLaunchKernelEx(start.launch, start.kernel, where, 0), "launch")


def takes(x: Tensor, packed: Tensor, scales: Tensor) -> bool:
    """Whether w8a16.cu computes this product; the Triton backend does the others."""
    num_groups = scales.shape[1]
    return (
        x.dtype in (torch.float16, torch.bfloat16)
        and scales.dtype in SCALES
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
    if not takes(x, packed, scales):
        return portable.BACKEND.linear(x, packed, scales, exponents, bias)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if rows.data_ptr() % 16:
        rows = rows.clone()
    y = torch.empty(rows.shape[0], packed.shape[0], dtype=x.dtype, device=x.device)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    plan = choose(card_of(x.device.index), rows.shape[0], *packed.shape)
    _launch(rows, packed, scales.contiguous(), exponents, bias, y, plan)
    return y.reshape(*x.shape[:-1], packed.shape[0])


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on `device`, or None."""
    if device.type != "cuda":
        return "needs a CUDA device"
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return "needs the package cuda-bindings"
    return portable.BACKEND.unavailable(device)


BACKEND = Backend(
    "sm80", unavailable, linear, portable.BACKEND.embedding, portable.BACKEND.linear_int8
)

"""CUDA C++ backend for Hopper (compute capability 9.0): one kernel for every batch size.

The source, hopper.cu, is compiled by NVRTC when a shape first needs it (about a second, then kept
for the process). Tensor maps are encoded once for each weight and each activation buffer. What the
kernel does not take (scales that are not grid8, float32 activations, gathers) goes to the portable
backend, by rule and not by failure.

Why one kernel: a ring of bulk copies keeps more bytes in flight than a plain GEMV does, so the
memory-bound sizes run at the speed of memory, and with a larger tile the same loop keeps the tensor
cores busy at prefill. A tile's width in tokens is the only real choice; see CONFIGS.
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

from halfweight.errors import HalfweightError
from halfweight.kernels import Backend
from halfweight.kernels import reference as portable

ROWS = 128
"""Rows of W a block takes: BN of hopper.cu."""
CONSUMER_THREADS = 256
SHARED_BYTES = 227 * 1024
COMPUTE_CAPABILITY = (9, 0)


@dataclass(frozen=True)
class Config:
    """Shape of one compiled kernel: tokens a tile, K a stage, stages, blocks a cluster."""

    tokens: int
    k_bytes: int
    stages: int
    cluster: int

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one stage: a tile of W in bytes, one of x in 16 bits."""
        return ROWS * self.k_bytes + self.tokens * self.k_bytes * 2

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: alignment, ring, store buffers, barriers."""
        store = 8 * min(self.tokens, 32) * 32
        return 1024 + self.stages * self.stage_bytes + store + 16 * self.stages


CONFIGS = (
    Config(8, 128, 10, 1),
    Config(16, 128, 10, 1),
    Config(32, 128, 8, 1),
    Config(64, 128, 6, 1),
    Config(128, 128, 4, 1),
    Config(256, 64, 5, 2),
)
"""Smallest tile that holds the batch; the last for all larger batches."""


def config_for(num_tokens: int) -> Config:
    """The configuration for a batch of `num_tokens`."""
    return next((c for c in CONFIGS if c.tokens >= num_tokens), CONFIGS[-1])


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "exponents", "bias", "y")),
        *((name, ctypes.c_void_p) for name in ("partials", "flags")),
        *((name, ctypes.c_int) for name in ("num_tokens", "out_features", "in_features")),
        *((name, ctypes.c_int) for name in ("group_size", "num_groups", "tiles_m", "tiles_n")),
        *((name, ctypes.c_int) for name in ("k_blocks", "whole_waves", "num_workers")),
    ]


def _check(result: tuple[Any, ...], what: str) -> Any:
    status, *values = result
    if int(status) != 0:
        raise HalfweightError(
            f"CUDA call {what} failed: {status!r}",
            hint="load the model with backend='triton' and report this message",
        )
    return values[0] if len(values) == 1 else values


def source(config: Config, groups: int, dtype: torch.dtype) -> str:
    """hopper.cu with its compile-time choices and the wgmma instruction of its tile width."""
    kind = "bf16" if dtype == torch.bfloat16 else "f16"
    count = config.tokens // 2
    outputs = ", ".join(f"%{i}" for i in range(count))
    a, rest = ", ".join(f"%{count + i}" for i in range(4)), count + 4
    constraints = ", ".join(f'"+f"(acc[{i}])' for i in range(count))
    wgmma = (
        "__device__ __forceinline__ void wgmma(float (&acc)[MT / 2], unsigned a0, unsigned a1,"
        " unsigned a2, unsigned a3, unsigned long long b, bool accumulate) {\n"
        f'asm volatile("{{.reg .pred p; setp.ne.b32 p, %{rest + 1}, 0;"\n'
        f'"wgmma.mma_async.sync.aligned.m64n{config.tokens}k16.f32.{kind}.{kind} "\n'
        f'"{{{outputs}}}, {{{a}}}, %{rest}, p, 1, 1, 0;}}"\n'
        f': {constraints} : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"((int)accumulate));\n}}'
    )
    defines = {
        "MT": config.tokens,
        "KB": config.k_bytes,
        "STAGES": config.stages,
        "CLUSTER": config.cluster,
        "GROUPS": groups,
        "BF16": int(dtype == torch.bfloat16),
    }
    head = "\n".join(f"#define {name} {value}" for name, value in defines.items())
    return f"{head}\n{wgmma}\n{Path(__file__).with_name('hopper.cu').read_text()}"


def compile_cubin(text: str) -> bytes:
    """Machine code of `text` for sm_90a through NVRTC; raises HalfweightError with its log."""
    from cuda.bindings import nvrtc

    program = _check(nvrtc.nvrtcCreateProgram(text.encode(), b"hopper.cu", 0, [], []), "create")
    options = [b"--gpu-architecture=sm_90a", b"--std=c++17"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(status) != 0:
        log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program), "log size")
        nvrtc.nvrtcGetProgramLog(program, log)
        raise HalfweightError(f"hopper.cu does not compile: {log.decode()}")
    cubin: bytes = b" " * _check(nvrtc.nvrtcGetCUBINSize(program), "cubin size")
    _check(nvrtc.nvrtcGetCUBIN(program, cubin), "cubin")
    return cubin


@cache
def _kernel(config: Config, groups: int, dtype: torch.dtype, device: int) -> Any:
    from cuda.bindings import driver

    with torch.cuda.device(device):
        torch.cuda.current_stream()
        module = _check(
            driver.cuModuleLoadData(compile_cubin(source(config, groups, dtype))), "load"
        )
        kernel = _check(driver.cuModuleGetFunction(module, b"w8a16"), "function")
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(kernel, attribute, config.shared_bytes), "shared memory")
    return kernel


@lru_cache(maxsize=16384)
def _tensor_map(
    pointer: int, rows: int, columns: int, box_rows: int, box_columns: int, kind: str
) -> Any:
    """Tensor map of a row-major matrix of bytes or 16-bit values, read in swizzled boxes."""
    from cuda.bindings import driver

    types = driver.CUtensorMapDataType
    dtype, size = {
        "uint8": (types.CU_TENSOR_MAP_DATA_TYPE_UINT8, 1),
        "float16": (types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2),
        "bfloat16": (types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2),
    }[kind]
    swizzles = driver.CUtensorMapSwizzle
    swizzle = {
        128: swizzles.CU_TENSOR_MAP_SWIZZLE_128B,
        64: swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
    }[box_columns * size]
    return _check(
        driver.cuTensorMapEncodeTiled(
            dtype,
            2,
            pointer,
            [driver.cuuint64_t(columns), driver.cuuint64_t(rows)],
            [driver.cuuint64_t(columns * size)],
            [driver.cuuint32_t(box_columns), driver.cuuint32_t(box_rows)],
            [driver.cuuint32_t(1), driver.cuuint32_t(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
        "tensor map",
    )


@cache
def _workspace(device: int, stream: int) -> tuple[Tensor, Tensor]:
    """Partial sums and flags for one stream: launches on one stream never overlap."""
    blocks = _num_multiprocessors(device)
    sums = blocks * CONFIGS[-1].tokens // 2 * CONSUMER_THREADS
    where = torch.device("cuda", device)
    return (
        torch.empty(sums, dtype=torch.float32, device=where),
        torch.zeros(blocks, dtype=torch.int32, device=where),
    )


@cache
def _num_multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def schedule(tiles: int, k_blocks: int, slots: int) -> tuple[int, int]:
    """(whole waves of tiles, workers): all but the last one to two waves go tile by tile."""
    workers = min(slots, tiles * k_blocks)
    waves, rest = divmod(tiles, workers)
    return (waves if rest == 0 else max(0, waves - 1)), workers


def _launch(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    exponents: Tensor,
    bias: Tensor | None,
    y: Tensor,
    config: Config,
) -> None:
    from cuda.bindings import driver

    (num_tokens, in_features), out_features = x.shape, packed.shape[0]
    device, num_groups = x.device.index, scales.shape[1]
    group_size = in_features // num_groups
    stream = torch.cuda.current_stream(device).cuda_stream
    partials, flags = _workspace(device, stream)
    tiles_m = -(-num_tokens // config.tokens)
    tiles_n = -(-out_features // (ROWS * config.cluster))
    k_blocks = -(-in_features // config.k_bytes)
    slots = _num_multiprocessors(device) // config.cluster
    waves, workers = schedule(tiles_m * tiles_n, k_blocks, slots)
    groups = max(1, config.k_bytes // group_size) if num_groups > 1 else 1
    kind = str(x.dtype).removeprefix("torch.")
    x_rows = config.tokens // config.cluster
    w_map = _tensor_map(packed.data_ptr(), *packed.shape, ROWS, config.k_bytes, "uint8")
    x_map = _tensor_map(x.data_ptr(), num_tokens, in_features, x_rows, 64, kind)
    problem = _Problem(
        *(scales.data_ptr(), exponents.data_ptr(), 0 if bias is None else bias.data_ptr()),
        *(y.data_ptr(), partials.data_ptr(), flags.data_ptr()),
        *(num_tokens, out_features, in_features, group_size, num_groups),
        *(tiles_m, tiles_n, k_blocks, waves, workers),
    )
    arguments = (ctypes.c_void_p * 3)(w_map.getPtr(), x_map.getPtr(), ctypes.addressof(problem))
    _check(
        driver.cuLaunchKernel(
            _kernel(config, groups, x.dtype, device),
            *(workers * config.cluster, 1, 1),
            *(384, 1, 1),
            config.shared_bytes,
            stream,
            ctypes.addressof(arguments),
            0,
        ),
        "launch",
    )


def takes(x: Tensor, packed: Tensor, scales: Tensor, exponents: Tensor | None) -> bool:
    """Whether hopper.cu computes this product; the Triton backend does the others."""
    return (
        x.dtype in (torch.float16, torch.bfloat16)
        and exponents is not None
        and scales.dtype == torch.uint8
        and packed.shape[1] % 32 == 0
        and packed.is_contiguous()
        and packed.data_ptr() % 16 == 0
        and x.numel() > 0
    )


def linear(
    x: Tensor, packed: Tensor, scales: Tensor, exponents: Tensor | None, bias: Tensor | None
) -> Tensor:
    """x [..., K] times the dequantized weights [N, K], in x's dtype; see hopper.cu."""
    if exponents is None or not takes(x, packed, scales, exponents):
        return portable.BACKEND.linear(x, packed, scales, exponents, bias)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if rows.data_ptr() % 16:
        rows = rows.clone()
    y = torch.empty(rows.shape[0], packed.shape[0], dtype=x.dtype, device=x.device)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    config = config_for(rows.shape[0])
    _launch(rows, packed, scales.contiguous(), exponents, bias, y, config)
    return y.reshape(*x.shape[:-1], packed.shape[0])


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on `device`, or None."""
    if device.type != "cuda":
        return "needs a CUDA device"
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability != COMPUTE_CAPABILITY:
        return f"needs compute capability 9.0, this GPU has {capability[0]}.{capability[1]}"
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return "needs the package cuda-bindings"
    return portable.BACKEND.unavailable(device)


BACKEND = Backend(
    "cuda", unavailable, linear, portable.BACKEND.embedding, portable.BACKEND.linear_int8
)

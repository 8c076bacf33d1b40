"""From a kernel's text to its launch: NVRTC, the driver, and what the kernels take as a problem.

Machine code is kept in the cache folder, by compiler, options and text.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from functools import cache
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from halfweight.cache_folder import cache_folder, write_whole
from halfweight.errors import HalfweightError


class Problem(ctypes.Structure):
    """`Problem` of schedule.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "exponents", "bias", "y")),
        *((name, ctypes.c_void_p) for name in ("partials", "flags", "steps")),
        *((name, ctypes.c_int) for name in ("num_tokens", "out_features", "in_features")),
        *((name, ctypes.c_int) for name in ("group_size", "num_groups", "tiles_m", "tiles_n")),
        *((name, ctypes.c_int) for name in ("tile_rows", "k_blocks", "whole_waves", "num_workers")),
        ("steps_stride", ctypes.c_int),
    ]


def address(tensor: Tensor | None) -> int:
    """Where a tensor's numbers lie; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def check(result: tuple[Any, ...], what: str) -> Any:
    """What a call of the driver or of NVRTC returned beside its status. Raises HalfweightError."""
    status, *values = result
    if int(status) != 0:
        raise HalfweightError(
            f"CUDA call {what} failed: {status!r}",
            hint="load the model with backend='triton' and report this message",
        )
    return values[0] if len(values) == 1 else values


def cubin(text: str, architecture: str) -> bytes:
    """Machine code of `text`, from the cache where this compiler has made it before."""
    from cuda.bindings import nvrtc

    version = check(nvrtc.nvrtcVersion(), "version")
    name = sha256(repr((version, _options(architecture), text)).encode()).hexdigest()
    path = cache_folder() / "cuda" / f"{name}.cubin"
    if path.is_file():
        return path.read_bytes()
    compiled = compile_cubin(text, architecture)
    with suppress(OSError):  # a cache that cannot be written is no reason to stop
        write_whole(path, compiled)
    return compiled


def _options(architecture: str) -> list[bytes]:
    return [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]


def compile_cubin(text: str, architecture: str) -> bytes:
    """Machine code of `text` through NVRTC; raises HalfweightError with its log."""
    from cuda.bindings import nvrtc

    options = _options(architecture)
    program = check(nvrtc.nvrtcCreateProgram(text.encode(), b"kernel.cu", 0, [], []), "create")
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(status) != 0:
        log = b" " * check(nvrtc.nvrtcGetProgramLogSize(program), "log size")
        nvrtc.nvrtcGetProgramLog(program, log)
        raise HalfweightError(
            f"the kernel does not compile for {architecture}: {log.decode()}",
            hint="load the model with backend='triton' and report this message",
        )
    compiled: bytes = b" " * check(nvrtc.nvrtcGetCUBINSize(program), "cubin size")
    check(nvrtc.nvrtcGetCUBIN(program, compiled), "cubin")
    return compiled


def load(text: str, architecture: str, entry: bytes, shared_bytes: int, device: int) -> Any:
    """The function `entry` of `text` on a device, with so much dynamic shared memory allowed."""
    from cuda.bindings import driver

    with torch.cuda.device(device):
        torch.cuda.current_stream()  # makes the context current
        module = check(driver.cuModuleLoadData(cubin(text, architecture)), "load")
    kernel = check(driver.cuModuleGetFunction(module, entry), "function")
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    check(driver.cuFuncSetAttribute(kernel, attribute, shared_bytes), "shared memory")
    return kernel


@cache
def workspace(device: int, stream: int, num_floats: int, num_flags: int) -> tuple[Tensor, Tensor]:
    """Partial sums and flags for one stream: launches on one stream never overlap."""
    where = torch.device("cuda", device)
    return (
        torch.empty(num_floats, dtype=torch.float32, device=where),
        torch.zeros(num_flags, dtype=torch.int32, device=where),
    )


@cache
def num_multiprocessors(device: int) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count

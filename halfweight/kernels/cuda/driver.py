"""From a kernel's text to its launch: NVRTC, the driver, and what the kernels take as a problem.

Machine code is kept in the cache folder, by compiler, options and text.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from halfweight.cache_folder import cache_folder, write_whole
from halfweight.errors import HalfweightError
from halfweight.kernels.cuda.card import Card, products_per_clock
from halfweight.kernels.cuda.schedule import Plan

COMPILERS = 8
"""Threads that make machine code before it is needed; NVRTC works in as many as there are."""
_being_made: defaultdict[str, Lock] = defaultdict(Lock)


class Problem(ctypes.Structure):
    """`Problem` of schedule.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "exponents", "bias", "y")),
        *((name, ctypes.c_void_p) for name in ("partials", "flags", "steps")),
        *((name, ctypes.c_int) for name in ("num_tokens", "out_features", "in_features")),
        *((name, ctypes.c_int) for name in ("group_size", "num_groups", "tiles_m", "tiles_n")),
        *((name, ctypes.c_int) for name in ("tile_rows", "k_blocks", "whole_waves", "num_workers")),
        *((name, ctypes.c_int) for name in ("steps_stride", "share", "spare")),
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
    """Machine code of `text`, from the cache where this compiler has made it before.

    One that another thread is making is waited for.
    """
    from cuda.bindings import nvrtc

    version = check(nvrtc.nvrtcVersion(), "version")
    name = sha256(repr((version, _options(architecture), text)).encode()).hexdigest()
    path = cache_folder() / "cuda" / f"{name}.cubin"
    with _being_made[name]:
        if path.is_file():
            return path.read_bytes()
        compiled = compile_cubin(text, architecture)
        with suppress(OSError):  # a cache that cannot be written is no reason to stop
            write_whole(path, compiled)
        return compiled


def compile_ahead(texts: Iterable[str], architecture: str) -> None:
    """Begin to make the machine code of these texts, and return; errors are for who needs it."""
    threads = ThreadPoolExecutor(COMPILERS, thread_name_prefix="halfweight-nvrtc")
    for text in texts:
        threads.submit(cubin, text, architecture)
    threads.shutdown(wait=False)


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


@cache
def card_of(device: int) -> Card:
    """What the driver says of a device."""
    from cuda.bindings import driver

    capability = torch.cuda.get_device_capability(device)  # initializes the driver, too
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
        products_per_clock(capability),
    )


@dataclass(frozen=True)
class Start:
    """How a plan is launched on one stream: what does not change from call to call."""

    kernel: Any
    launch: Any
    device: int
    """Index of the device."""
    partials: Tensor | None = None
    flags: Tensor | None = None


def prepare(
    kernel: Any,
    sizes: tuple[int, int, int],
    stream: int,
    device: int,
    space: tuple[Tensor, Tensor] | None = None,
    *,
    is_early: bool = False,
) -> Start:
    """The start of a kernel by blocks, threads of a block and dynamic shared bytes.

    `space`, where it needs one, is of `workspace`. With `is_early` it may start before the kernel
    ahead of it has ended.
    """
    from cuda.bindings import driver

    launch = driver.CUlaunchConfig()
    launch.gridDimX, launch.gridDimY, launch.gridDimZ = sizes[0], 1, 1
    launch.blockDimX, launch.blockDimY, launch.blockDimZ = sizes[1], 1, 1
    launch.sharedMemBytes = sizes[2]
    launch.hStream = stream
    if is_early:
        early = driver.CUlaunchAttribute()
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        value = driver.CUlaunchAttributeValue()
        value.programmaticStreamSerializationAllowed = 1
        early.value = value
        launch.attrs, launch.numAttrs = [early], 1
    return Start(kernel, launch, device, *(space or ()))


def launch(start: Start, *arguments: int) -> None:
    """Start a kernel, on its device, with arguments at these addresses."""
    from cuda.bindings import driver

    if start.device != torch.cuda.current_device():
        with torch.cuda.device(start.device):
            launch(start, *arguments)
        return
    given = (ctypes.c_void_p * len(arguments))(*arguments)
    where = ctypes.addressof(given)
    check(driver.cuLaunchKernelEx(start.launch, start.kernel, where, 0), "launch")


def problem_of(
    plan: Plan[Any],
    start: Start,
    x: Tensor,
    scales: Tensor,
    exponents: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    steps: Tensor | None = None,
) -> Problem:
    """What a kernel must know of y [M, N] = x [M, K] W^T, with scales [N, K/G]."""
    (num_tokens, in_features), num_groups = x.shape, scales.shape[1]
    return Problem(
        *map(address, (scales, exponents, bias, y, start.partials, start.flags, steps)),
        *(num_tokens, y.shape[1], in_features, in_features // num_groups, num_groups),
        *(plan.tiles_m, plan.tiles_n, plan.rows, plan.k_blocks),
        *(plan.whole_waves, plan.num_workers),
        0 if steps is None else steps.shape[-1],
        *divmod(plan.shared_blocks, plan.num_workers),
    )


def operands(
    x: Tensor, packed: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x as rows [M, K] that 16-byte copies can read, y [M, N] to fill, the bias in x's dtype."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if rows.data_ptr() % 16:
        rows = rows.clone()
    y = torch.empty(rows.shape[0], packed.shape[0], dtype=x.dtype, device=x.device)
    return rows, y, None if bias is None else bias.to(x.dtype).contiguous()


def unavailable(
    device: torch.device, is_fit: Callable[[tuple[int, int]], bool], needed: str
) -> str | None:
    """Why kernels for the compute capability `needed` cannot run on `device`, or None."""
    if device.type != "cuda":
        return "needs a CUDA device"
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if not is_fit(capability):
        return f"needs compute capability {needed}, this GPU has {capability[0]}.{capability[1]}"
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return "needs the package cuda-bindings"
    return _compiler_lacks()


@cache
def _compiler_lacks() -> str | None:
    """Why nothing can be compiled, or None."""
    from cuda.bindings import nvrtc

    try:
        nvrtc.nvrtcVersion()
    except Exception as error:  # of a class that differs between versions of cuda-bindings
        return f"needs NVRTC, CUDA's run-time compiler: {' '.join(str(error).split())[:120]}"
    return None

"""Kernels on torch's own threads.

Two thread pools in one process fight for the cores: the idle one spins. So a kernel here is a C
callback that Numba compiles, and it is started on the OpenMP threads that torch itself uses: the
function GOMP_parallel of the runtime that libtorch_cpu is linked with (libgomp, LLVM's and Intel's
runtimes all have it). A start costs 1 to 2 us while the threads are warm. Where torch has no
OpenMP, a kernel runs in the calling thread.

A kernel gets one argument, the address of an array of int64 (`Arguments`): sizes and addresses.
Threads share work by tickets (`fetch_add`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numba
import torch
from numba import types


class Arguments:
    """The int64 cells that a kernel is given."""

    def __init__(self, *cells: int) -> None:
        self.cells = (ctypes.c_int64 * len(cells))(*cells)


class CFunction:
    """A Numba function of int64 as a C function, compiled at first use, cached on disk."""

    signature = types.int64(*[types.int64] * 9)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    @cached_property
    def compiled(self) -> Any:
        """The compiled callback."""
        return numba.cfunc(self.signature, cache=True, error_model="numpy")(self._function)

    @cached_property
    def address(self) -> int:
        """Where it is."""
        return int(self.compiled.address)


class Kernel(CFunction):
    """A Numba function `kernel(address)` that threads run together."""

    signature = types.void(types.voidptr)

    @cached_property
    def _call(self) -> Any:
        return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.address)

    def run(self, arguments: Arguments, num_threads: int) -> None:
        """Run on `num_threads` threads at once; each gets the same arguments."""
        parallel = _parallel()
        if num_threads == 1 or parallel is None:
            self._call(arguments.cells)
        else:
            parallel(self.address, arguments.cells, num_threads, 0)


@cache
def _openmp() -> ctypes.CDLL | None:
    """torch's CPU library, by which its OpenMP runtime is found, or None if it has none."""
    for library in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        loaded = ctypes.CDLL(str(library))
        if hasattr(loaded, "GOMP_parallel"):
            return loaded
    return None


@cache
def _parallel() -> Any:
    runtime = _openmp()
    if runtime is None:
        return None
    function = runtime.GOMP_parallel
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


def num_threads() -> int:
    """torch's number of threads, 1 where its threads cannot be used."""
    return torch.get_num_threads() if _parallel() is not None else 1

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
import hashlib
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from numba import types
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc

SOURCES = (
    *("attention_products", "attention_tiles"),
    *(f"batch_{name}" for name in ("attention", "cells", "loops", "step", "tiles")),
    *("between_products", "decode_products", "dot_tiles", "llvm", "llvm_vectors", "matrix_unit"),
    "prefill_products",
)
"""Modules that kernels are made of."""


class Arguments:
    """The int64 cells that a kernel is given."""

    def __init__(self, *cells: int) -> None:
        self.cells = (ctypes.c_int64 * len(cells))(*cells)


class _SourceCache(FunctionCache):  # type: ignore[misc]
    """Numba's cache on disk, which looks at a function's own file, for kernels made of several."""

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return (*super()._index_key(sig, codegen), sources_digest())


@cache
def sources_digest() -> str:
    """A digest of the files that kernels are made of."""
    files = (Path(__file__).with_name(f"{name}.py") for name in SOURCES)
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


class CFunction:
    """A Numba function of int64 as a C function, compiled at first use, cached on disk."""

    signature = types.int64(*[types.int64] * 9)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    @cached_property
    def compiled(self) -> Any:
        """The compiled callback."""
        result, arguments = self.signature.return_type, self.signature.args
        options = {"error_model": "numpy"}
        function: Any = CFunc(self._function, (arguments, result), locals={}, options=options)
        function._cache = _SourceCache(self._function)
        function.compile()
        return function

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

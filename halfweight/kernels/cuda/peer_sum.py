"""Sums over the GPUs of one machine that reach each other's memory: peer_sum.cu.

One kernel on each GPU, which CUDA graphs record like any other, and which may start while the one
before it ends. It waits for the other ranks' kernels, until told that none will come: `give_up`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfweight.kernels.cuda import driver

MIN_CAPABILITY = (8, 0)
EARLY_CAPABILITY = (9, 0)
"""From which on a kernel may start before the one ahead of it has ended."""
BLOCKS, THREADS = 64, 512
POLLS = 4096
"""Between two looks of a warp whether all is over: 1 to 2 ms.

A look reads the host's memory, half a microsecond or more. Warps look in turns, so that no line
forms: with all at once and 512 polls the GPU that looked kept the other one waiting until that
looked too, and so on; some graphs took 300 us for each sum of 256 KiB.
"""
MOST_RANKS = 8
VECTOR_BYTES = 16
TURN_BYTES = 8 << 20
BUFFER_BYTES = 2 * TURN_BYTES
"""Of a rank: what the others write in two calls."""
HOP_BYTES = 640 << 10
"""What a GPU sends while numbers go one hop further: 1.7 us of NVLink, by reckoning."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Operands(ctypes.Structure):
    """`Operands` of peer_sum.cu."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("buffers", ctypes.c_void_p * MOST_RANKS),
        ("turns", ctypes.c_void_p),
        ("is_over", ctypes.c_void_p),
        *((name, ctypes.c_uint32) for name in ("num_vectors", "turn_vectors", "rank")),
    ]


def source(
    ranks: int, dtype: torch.dtype, blocks: int = BLOCKS, threads: int = THREADS, polls: int = POLLS
) -> str:
    """The kernels' text: compile-time choices, instructions, kernels."""
    folder = Path(__file__).parent
    sizes = {"RANKS": ranks, "BLOCKS": blocks, "THREADS": threads, "POLLS": polls}
    return "\n".join(
        [
            f"#define BF16 {int(dtype == torch.bfloat16)}",
            f"#define F32 {int(dtype == torch.float32)}",
            *((folder / name).read_text() for name in ("ptx.cuh", "peers.cuh")),
            *(f"constexpr u32 {name} = {size};" for name, size in sizes.items()),
            (folder / "peer_sum.cu").read_text(),
        ]
    )


def way(ranks: int, num_bytes: int) -> str | None:
    """The kernel that sums so many bytes over so many ranks, or None: see peer_sum.cu.

    One shot sends (ranks - 1) times x, two shots 2 (ranks - 1) / ranks times, a hop later.
    """
    if ranks > MOST_RANKS or num_bytes % VECTOR_BYTES or num_bytes == 0:
        return None
    more = (ranks - 1) * (ranks - 2) * num_bytes // ranks
    if more <= HOP_BYTES and (ranks - 1) * num_bytes <= TURN_BYTES:
        return "one_shot"
    part = -(-num_bytes // (ranks * VECTOR_BYTES)) * VECTOR_BYTES
    return "two_shots" if ranks > 2 and (2 * ranks - 1) * part <= TURN_BYTES else None


def unavailable(device: torch.device) -> str | None:
    """Why these kernels cannot run on `device`, or None."""
    return driver.unavailable(device, lambda found: found >= MIN_CAPABILITY, "8.0")


class PeerSum:
    """One rank's kernels, and what they keep from call to call.

    All ranks make the same calls, one after another on the device.
    """

    def __init__(self, rank: int, buffers: Sequence[Tensor]) -> None:
        """`buffers` are BUFFER_BYTES of each rank, all within this GPU's reach; its own is filled.

        No rank may call `sum` before all have got here. Raises HalfweightError where the kernels
        do not compile.
        """
        self._rank, self._buffers = rank, buffers
        self._places = (ctypes.c_void_p * MOST_RANKS)(*(each.data_ptr() for each in buffers))
        self._device = buffers[rank].device
        buffers[rank].fill_(0xFF)
        self._turns = torch.zeros(BLOCKS, dtype=torch.int32, device=self._device)
        self._is_over = torch.zeros(1, dtype=torch.int32).pin_memory()
        self._starts: dict[tuple[torch.dtype, str, int], driver.Start] = {}
        for dtype in DTYPES:
            for name in ("one_shot", "two_shots"):
                _kernel(len(buffers), dtype, name, self._device.index)
        torch.cuda.synchronize(self._device)

    def takes(self, x: Tensor) -> bool:
        """Whether `sum` adds such tensors; the same on all ranks."""
        return x.dtype in DTYPES and way(len(self._buffers), x.nbytes) is not None

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the ranks' contiguous x, the same bits on all; in place, if x is aligned."""
        if x.data_ptr() % VECTOR_BYTES:
            x = x.clone()
        name = way(len(self._buffers), x.nbytes)
        assert name is not None
        given = Operands(
            x.data_ptr(),
            self._places,
            self._turns.data_ptr(),
            self._is_over.data_ptr(),
            *(x.nbytes // VECTOR_BYTES, TURN_BYTES // VECTOR_BYTES, self._rank),
        )
        driver.launch(self._start(x.dtype, name), ctypes.addressof(given))
        return x

    def give_up(self) -> None:
        """Have all calls end that wait, and all later ones; their sums are worth nothing.

        Asks nothing of the driver, which may wait for the kernels that run.
        """
        with torch.inference_mode():  # in which it may have been made
            self._is_over.fill_(1)

    def _start(self, dtype: torch.dtype, name: str) -> driver.Start:
        stream = torch.cuda.current_stream(self._device).cuda_stream
        found = self._starts.get((dtype, name, stream))
        if found is None:
            kernel = _kernel(len(self._buffers), dtype, name, self._device.index)
            is_early = torch.cuda.get_device_capability(self._device) >= EARLY_CAPABILITY
            sizes = BLOCKS, THREADS, 0
            found = driver.prepare(kernel, sizes, stream, self._device.index, is_early=is_early)
            self._starts[dtype, name, stream] = found
        return found


@cache
def _kernel(ranks: int, dtype: torch.dtype, name: str, device: int) -> Any:
    major, minor = torch.cuda.get_device_capability(device)
    return driver.load(source(ranks, dtype), f"sm_{major}{minor}", name.encode(), 0, device)

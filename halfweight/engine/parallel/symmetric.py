"""Sums between GPUs of one machine that reach each other's memory: torch's symmetric memory.

A step of few tokens waits for 160 small sums in a 70B. Here each GPU reads the others' numbers
itself, in one kernel (one shot); from some size on each adds a part and all read the sums (two
shots). CUDA graphs record both like any kernel. NVLink's multicast is not used.

What stands in a kernel and waits for a rank that is lost never ends by itself: `let_go`.
"""

from __future__ import annotations

import logging
import os
import time
from datetime import timedelta
from typing import Any, cast

import torch
from torch import Tensor

BUFFER_BYTES = 8 << 20
"""Of a rank; larger sums are NCCL's."""
ONE_SHOT_BYTES = 192 << 10
"""Two H200s: at 64 KiB one shot was as fast as two, at 256 KiB two were faster."""
ALIGNMENT = 16
DTYPES = (torch.bfloat16, torch.float32)
"""That torch's kernels add."""
MEETING = timedelta(seconds=25)
"""In which ranks whose sums have met already tell each other of their devices."""
LETTING_GO_SECONDS = 20.0
log = logging.getLogger("halfweight")
_c10d: Any = torch._C._distributed_c10d


class SymmetricSum:
    """Sums of a group of ranks through a buffer that each can read."""

    def __init__(self, name: str, group: Any, device: torch.device) -> None:
        """All ranks together; `group` is known to torch by its name.

        Raises RuntimeError where the devices cannot, AttributeError where this torch cannot.
        """
        self._rank, self._ranks, self._device = group.rank(), group.size(), device
        self._name, self._group = name, group
        ops, memory = torch.ops.symm_mem, _c10d._SymmetricMemory
        self._one_shot: Any = ops.one_shot_all_reduce_copy
        self._two_shot: Any = ops.two_shot_all_reduce_
        size = (BUFFER_BYTES,), (1,), torch.uint8
        self._buffer: Tensor = memory.empty_strided_p2p(*size, device, name)
        self._handle = memory.rendezvous(self._buffer, name)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._words = self._words_that_release()

    @classmethod
    def make(
        cls, store: Any, rank: int, ranks: int, device: torch.device, nccl: Any
    ) -> SymmetricSum | None:
        """Of all ranks, where each GPU can read the others' memory; `nccl` is their group.

        Whether all ranks have one, and what it reads is right, is for the caller to check. Raises
        DistError, of the store, where a rank does not come.
        """
        where = _c10d.PrefixStore("symmetric", store)
        where.set(f"device of {rank}", "" if _is_off() else str(device.index))
        places = [f"device of {other}" for other in range(ranks)]
        where.wait(places, MEETING)
        devices = [where.get(place).decode() for place in places]
        if not _reach_each_other(devices):
            return None
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        if rank == 0:  # which may have other groups; the others are told its name for this one
            where.set("name", f"halfweight-{os.getpid()}-{time.monotonic_ns()}")
        where.wait(["name"], MEETING)
        name = where.get("name").decode()
        group = _c10d.ProcessGroup(where, rank, ranks)
        group._register_backend(device, _c10d.ProcessGroup.BackendType.NCCL, nccl)
        group._set_group_name(name)
        _c10d._register_process_group(name, group)
        try:
            return cls(name, group, device)
        except (RuntimeError, AttributeError) as error:
            log.info("no symmetric memory on rank %d: %s", rank, str(error).partition("\n")[0])
            _c10d._unregister_process_group(name)
            return None

    def takes(self, x: Tensor) -> bool:
        """Whether `sum` adds such tensors; the same on all ranks."""
        return x.dtype in DTYPES and 0 < x.nbytes <= BUFFER_BYTES and x.nbytes % ALIGNMENT == 0

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the ranks' contiguous x, the same bits on all; may be in place."""
        flat = x.view(-1)
        shared = self._buffer[: x.nbytes].view(x.dtype)
        if x.nbytes <= ONE_SHOT_BYTES:
            found = self._one_shot(shared, flat, "sum", self._name)
            return cast(Tensor, found).view_as(x)
        shared.copy_(flat)
        self._two_shot(shared, "sum", self._name)
        flat.copy_(shared)
        return x

    def let_go(self) -> None:
        """Let kernels end that wait for a rank that is lost. What they add is worth nothing.

        A kernel waits until a word of its rank's is 1, which it makes 0, and before it until the
        word that it sets to 1 on each rank is 0: both are given until nothing waits any more.
        """
        end = time.monotonic() + LETTING_GO_SECONDS
        while self.is_waiting and time.monotonic() < end:
            self._release()

    @property
    def is_waiting(self) -> bool:
        """Whether anything still runs here."""
        return not torch.cuda.default_stream(self._device).query()

    def close(self) -> None:
        """Have torch forget the group; nothing waits in its kernels any more."""
        _c10d._unregister_process_group(self._name)

    def _words_that_release(self) -> list[tuple[Tensor, Tensor]]:
        """Pads of words that kernels wait for, and, in pinned memory, what lets these go on.

        Of this rank's both, in turn: in a word between itself and itself a kernel may wait for
        either.
        """
        pads = [self._handle.get_signal_pad(r).view(torch.int32) for r in range(self._ranks)]
        zeros, ones = (torch.full(pads[0].shape, i, dtype=torch.int32).pin_memory() for i in (0, 1))
        return [(pads[self._rank], ones), *((pad, zeros) for pad in pads)]

    def _release(self) -> None:
        """By copies alone: a kernel may have to be loaded first, which waits for those that run."""
        with torch.cuda.stream(self._stream):
            for pad, words in self._words:
                pad.copy_(words, non_blocking=True)
        self._stream.synchronize()


def _is_off() -> bool:
    """By HALFWEIGHT_PEER_READS=0, or where NCCL is told not to use it either."""
    ask = os.environ.get
    return ask("HALFWEIGHT_PEER_READS") == "0" or ask("NCCL_P2P_DISABLE") == "1"


def _reach_each_other(devices: list[str]) -> bool:
    """Whether each of these GPUs, one a rank, can read the memory of each other one."""
    if "" in devices or len(set(devices)) < len(devices):
        return False
    pairs = ((int(one), int(other)) for one in devices for other in devices if one != other)
    return all(torch.cuda.can_device_access_peer(*pair) for pair in pairs)

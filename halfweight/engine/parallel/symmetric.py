"""Sums between GPUs of one machine that write into each other's memory, which torch maps for them.

A step of few tokens waits for 160 small sums in a 70B. The kernel that adds is our own
(kernels/cuda/peer_sum.cu); what torch calls symmetric memory is the buffer of each rank that all
others can reach. NVLink's multicast is not used.

A kernel that waits for a rank that is lost ends when it is told: `let_go`.
"""

from __future__ import annotations

import logging
import os
import time
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from halfweight.errors import HalfweightError
from halfweight.kernels.cuda.peer_sum import BUFFER_BYTES, PeerSum, unavailable

MEETING = timedelta(seconds=25)
"""In which ranks whose sums have met already tell each other of their devices."""
log = logging.getLogger("halfweight")
_c10d: Any = torch._C._distributed_c10d


class SymmetricSum:
    """Sums of a group of ranks through buffers that each can write into."""

    def __init__(self, name: str, group: Any, device: torch.device) -> None:
        """All ranks together; `group` is known to torch by its name.

        Raises RuntimeError where the devices cannot, AttributeError where this torch cannot,
        HalfweightError where the kernels do not compile.
        """
        self._name, self._group = name, group
        memory, size = _c10d._SymmetricMemory, (BUFFER_BYTES,)
        self._buffer: Tensor = memory.empty_strided_p2p(size, (1,), torch.uint8, device, name)
        self._handle = memory.rendezvous(self._buffer, name)
        ranks = range(group.size())
        buffers = [self._handle.get_buffer(rank, size, torch.uint8) for rank in ranks]
        self._kernels = PeerSum(group.rank(), buffers)

    @classmethod
    def make(
        cls, store: Any, rank: int, ranks: int, device: torch.device, nccl: Any
    ) -> SymmetricSum | None:
        """Of all ranks, where each GPU can reach the others' memory; `nccl` is their group.

        Whether all ranks have one, and what it adds is right, is for the caller to check, in this
        order: `sum` is for when all have one. Raises DistError, of the store, where a rank does
        not come.
        """
        where = _c10d.PrefixStore("symmetric", store)
        where.set(f"device of {rank}", str(device.index) if _is_able(device) else "")
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
        except (RuntimeError, AttributeError, HalfweightError) as error:
            log.info("no sums by memory on rank %d: %s", rank, str(error).partition("\n")[0])
            _c10d._unregister_process_group(name)
            return None

    def takes(self, x: Tensor) -> bool:
        """Whether `sum` adds such tensors; the same on all ranks."""
        return self._kernels.takes(x)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the ranks' contiguous x, the same bits on all; may be in place."""
        return self._kernels.sum(x)

    def let_go(self) -> None:
        """Let kernels end that wait for a rank that is lost, now and later. Waits for nothing."""
        self._kernels.give_up()

    def close(self) -> None:
        """Have torch forget the group; nothing waits in its kernels any more."""
        _c10d._unregister_process_group(self._name)


def _is_able(device: torch.device) -> bool:
    """Whether a rank on this GPU would take part."""
    if _is_off():
        return False
    reason = unavailable(device)
    if reason is not None:
        log.info("no sums by memory on %s: %s", device, reason)
    return reason is None


def _is_off() -> bool:
    """By HALFWEIGHT_PEER_READS=0, or where NCCL is told not to use it either."""
    ask = os.environ.get
    return ask("HALFWEIGHT_PEER_READS") == "0" or ask("NCCL_P2P_DISABLE") == "1"


def _reach_each_other(devices: list[str]) -> bool:
    """Whether each of these GPUs, one a rank, can reach the memory of each other one."""
    if "" in devices or len(set(devices)) < len(devices):
        return False
    pairs = ((int(one), int(other)) for one in devices for other in devices if one != other)
    return all(torch.cuda.can_device_access_peer(*pair) for pair in pairs)

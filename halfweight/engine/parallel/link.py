"""What goes between ranks inside a forward, by a process group of torch's: NCCL or gloo.

The groups are made as they are, without torch's global default group, so that a process may hold
several engines, or be a rank of something else.

Gloo's sums lie in the host's memory, also those of tensors on a GPU: it is what ranks on CPUs use,
and ranks that share a GPU, which NCCL refuses. A CUDA graph holds NCCL's calls alone.
"""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from halfweight.engine.parallel.faults import RankError

CONNECTING = timedelta(seconds=25)
"""In which ranks that have all said hello reach each other."""
MAKING = timedelta(minutes=10)
"""Of a call while runners are made: one may compile kernels that another has in its cache."""
STEPPING = timedelta(seconds=25)
"""Of a call in a step."""
CHECKED_NUMBERS = 1 << 18
_c10d: Any = torch._C._distributed_c10d
"""Where torch keeps the options of its groups' calls."""


class GroupLink:
    """`Link` (model/share.py) by a process group."""

    def __init__(self, group: Any, rank: int, ranks: int, device: torch.device) -> None:
        """Checks that a megabyte arrives as it was sent: a peer's memory may answer and be wrong.

        Raises RankError where it does not.
        """
        self._group, self._ranks, self._device = group, ranks, device
        self.can_be_recorded = self._is_nccl = group.name() == "nccl"
        self._sum, self._least = _c10d.AllreduceOptions(), _c10d.AllreduceOptions()
        self._least.reduceOp = dist.ReduceOp.MIN
        self._gather, self._first = _c10d.AllgatherOptions(), _c10d.BroadcastOptions()
        self._first.rootRank = self._first.rootTensor = 0
        self.set_timeout(CONNECTING)
        self._check(rank)

    def set_timeout(self, timeout: timedelta) -> None:
        """How long a call waits for the other ranks; NCCL's have STEPPING from the start."""
        for options in (self._sum, self._least, self._gather, self._first):
            options.timeout = timeout

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the ranks' x, in place."""
        here = self._reachable(x)
        self._group.allreduce([here], self._sum).wait()
        return x if here is x else x.copy_(here)

    def gather(self, x: Tensor) -> Tensor:
        """[..., N] of each rank as [..., ranks * N]."""
        here = self._reachable(x)
        *rows, width = here.shape
        found = here.new_empty(self._ranks * math.prod(rows), width)
        self._group._allgather_base(found, here.view(-1, width), self._gather).wait()
        side_by_side = found.view(self._ranks, -1, width).transpose(0, 1)
        return side_by_side.reshape(*rows, self._ranks * width).to(x.device)

    def from_first(self, x: Tensor) -> Tensor:
        """Rank 0's x, in place."""
        here = self._reachable(x)
        self._group.broadcast([here], self._first).wait()
        return x if here is x else x.copy_(here)

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers; waits for the device."""
        found = torch.tensor([number], device=self._device if self._is_nccl else "cpu")
        self._group.allreduce([found], self._least).wait()
        return int(found)

    def close(self) -> None:
        """Leave the group, without waiting for those that are lost."""
        self._group.abort()

    def _reachable(self, x: Tensor) -> Tensor:
        """x where the group can read and write it."""
        x = x.contiguous()
        return x if self._is_nccl or x.device.type == "cpu" else x.cpu()

    def _check(self, rank: int) -> None:
        numbers = torch.arange(CHECKED_NUMBERS, device=self._device, dtype=torch.float32) % 1021
        expected = numbers * (self._ranks * (self._ranks + 1) // 2)
        if not torch.equal(self.sum(numbers * (rank + 1)), expected):
            raise RankError(
                f"a sum over {self._ranks} ranks came out wrong on rank {rank} ({self._device})",
                hint="set NCCL_P2P_DISABLE=1: these GPUs reach each other's memory wrongly",
            )


def make_link(
    store: Any, rank: int, ranks: int, device: torch.device, *, backend: str, is_local: bool
) -> GroupLink:
    """The link of a rank; returns when all ranks have made theirs.

    `backend` is "nccl" or "gloo"; `is_local` where all ranks are on this machine.
    """
    made: Any
    if backend == "nccl":
        options: Any = dist.ProcessGroupNCCL.Options()
        options._timeout = STEPPING
        made = dist.ProcessGroupNCCL(store, rank, ranks, options)
    else:
        options = _c10d.ProcessGroupGloo._Options()
        host = {"hostname": "127.0.0.1"} if is_local else {}
        options._devices = [_gloo_device(**host)]
        options._timeout = CONNECTING
        made = _c10d.ProcessGroupGloo(store, rank, ranks, options)
    return GroupLink(made, rank, ranks, device)


def _gloo_device(**host: str) -> Any:
    """The network that gloo uses: GLOO_SOCKET_IFNAME where there are several machines."""
    import os

    make: Any = _c10d.ProcessGroupGloo
    if host:
        return make.create_device(**host)
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    return make.create_device(interface=interface) if interface else make.create_default_device()


def choose_backend(devices: list[torch.device]) -> str:
    """NCCL among GPUs of which each has one rank, else gloo."""
    on_gpus = all(device.type == "cuda" for device in devices)
    return "nccl" if on_gpus and len(set(devices)) == len(devices) else "gloo"

"""What goes between ranks inside a forward, by a process group of torch's: NCCL or gloo.

The groups are made as they are, without torch's global default group, so that a process may hold
several engines, or be a rank of something else.

Small sums of GPUs that reach each other's memory take a way of their own (`symmetric.py`), if what
arrives by it is right.

Gloo's sums lie in the host's memory, also those of tensors on a GPU: it is what ranks on CPUs use,
and ranks that share a GPU, which NCCL refuses. A CUDA graph holds NCCL's calls alone.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from datetime import timedelta
from threading import Event, Thread, Timer
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from halfweight.engine.parallel.faults import BrokenLinkError, RankError
from halfweight.engine.parallel.symmetric import SymmetricSum
from halfweight.errors import HalfweightError

log = logging.getLogger("halfweight")

CONNECTING = timedelta(seconds=25)
"""In which ranks that have all said hello reach each other."""
MAKING = timedelta(minutes=10)
"""Of a call while runners are made: one may compile kernels that another has in its cache."""
STEPPING = timedelta(seconds=25)
"""Of a call in a step."""
NCCL_STEPPING = timedelta(minutes=2)
LEAVING_SECONDS = 20
NEAR_SECONDS = 10
"""In which known numbers are added by memory: what never arrives is waited for so long."""
CHECKED_NUMBERS = (1 << 10, 1 << 18, 1 << 22)
"""Of sums in float32 that are checked: each way that a sum may take."""
OnFault = Callable[[Callable[[HalfweightError], None]], None]
_c10d: Any = torch._C._distributed_c10d
"""Where torch keeps the options of its groups' calls."""


class GroupLink:
    """`Link` (model/share.py) by a process group. Calls raise BrokenLinkError."""

    def __init__(
        self, group: Any, rank: int, ranks: int, device: torch.device, *, is_nccl: bool
    ) -> None:
        """Of rank `rank` of a group; waits for none of the others."""
        self._group, self._rank, self._ranks, self._device = group, rank, ranks, device
        self._near: SymmetricSum | None = None
        self._leaving: Thread | None = None
        self.can_be_recorded = self._is_nccl = is_nccl
        self._sum, self._least = _c10d.AllreduceOptions(), _c10d.AllreduceOptions()
        self._least.reduceOp = dist.ReduceOp.MIN
        self._gather, self._first = _c10d.AllgatherOptions(), _c10d.BroadcastOptions()
        self._first.rootRank = self._first.rootTensor = 0
        for options in (self._sum, self._least, self._gather, self._first):
            options.asyncOp = False  # NCCL then runs on the stream of what is around it
        self.set_timeout(MAKING)

    def check(self) -> None:
        """Check that sums come out right: a peer's memory may answer and be wrong.

        Raises RankError where they do not.
        """
        if not self._is_right():
            raise RankError(
                f"a sum over {self._ranks} ranks came out wrong on rank {self._rank} "
                f"({self._device})",
                hint="set NCCL_P2P_DISABLE=1: these GPUs reach each other's memory wrongly",
            )

    def add_near(self, near: SymmetricSum | None) -> None:
        """Take this rank's `near` for the sums that it takes, if all have one and it is right.

        Closes it where it is not taken.
        """
        if self.least(int(near is not None)) and near is not None:
            self._near = near
            if not self.least(int(self._is_near_right(near))):
                self._near = None
                log.warning(
                    "sums by each other's memory do not come out right here (-v says why); "
                    "NCCL's are used"
                )
        if near is not None and self._near is None:
            near.close()
        if self._rank == 0:
            way = "NCCL" if self._near is None else "peer_sum.cu"
            log.info("sums of few tokens between %d GPUs: %s", self._ranks, way)

    def set_timeout(self, timeout: timedelta) -> None:
        """How long a call waits for the other ranks.

        NCCL's end the process then, so they are left time to compile a kernel; a rank that is lost
        is found by the watch, which calls `let_go`.
        """
        if self._is_nccl:
            self._group._set_default_timeout(max(timeout, NCCL_STEPPING))
        for options in (self._sum, self._least, self._gather, self._first):
            options.timeout = timeout

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the ranks' x; may be in place."""
        here = self._reachable(x)
        if self._near is not None and self._near.takes(here):
            return self._near.sum(here)
        self._call(self._group.allreduce, [here], self._sum)
        return x if here is x else x.copy_(here)

    def gather(self, x: Tensor) -> Tensor:
        """[..., N] of each rank as [..., ranks * N]."""
        here = self._reachable(x)
        *rows, width = here.shape
        if not here.numel():  # of a step that wants no logits
            return x.new_empty(*rows, self._ranks * width)
        found = here.new_empty(self._ranks * math.prod(rows), width)
        self._call(self._group._allgather_base, found, here.view(-1, width), self._gather)
        side_by_side = found.view(self._ranks, -1, width).transpose(0, 1)
        return side_by_side.reshape(*rows, self._ranks * width).to(x.device)

    def from_first(self, x: Tensor) -> Tensor:
        """Rank 0's x, in place."""
        here = self._reachable(x)
        self._call(self._group.broadcast, [here], self._first)
        return x if here is x else x.copy_(here)

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers; waits for the device."""
        found = torch.tensor([number], device=self._device if self._is_nccl else "cpu")
        self._call(self._group.allreduce, [found], self._least)
        return int(found)

    def let_go(self) -> None:
        """End what waits for a rank that is lost, without waiting for it. Call `close` after."""
        self._leaving = Thread(target=self._leave, daemon=True)
        self._leaving.start()

    def close(self) -> None:
        """Leave the group; those that are lost are waited for LEAVING_SECONDS."""
        if self._leaving is None:
            self._leave()
        else:
            self._leaving.join(LEAVING_SECONDS)
            if self._leaving.is_alive():
                log.error("rank %d: %s still waits for a rank", self._rank, self._device)
                return
        if self._near is not None:
            self._near.close()

    def _leave(self) -> None:
        """Sums by memory are let go of first: leaving may free memory, which waits for all."""
        try:
            if self._near is not None:
                self._near.let_go()
        finally:
            self._group.abort()

    def _call(self, collective: Callable[..., Any], *operands: Any) -> None:
        try:
            work = collective(*operands)
            if work is not None:  # NCCL's are in the order of the stream, and some torch give none
                work.wait()
        except RuntimeError as error:
            raise _broken(error) from error

    def _reachable(self, x: Tensor) -> Tensor:
        """x where the group can read and write it."""
        x = x.contiguous()
        return x if self._is_nccl or x.device.type == "cpu" else x.cpu()

    def _is_near_right(self, near: SymmetricSum) -> bool:
        is_late = Event()

        def give_up() -> None:  # what one GPU writes never arrives at the other
            is_late.set()
            near.let_go()

        timer = Timer(NEAR_SECONDS, give_up)
        timer.daemon = True
        timer.start()
        try:
            found = self._is_right(near.takes)
        except RankError:  # another rank is lost
            raise
        except (RuntimeError, HalfweightError) as error:
            log.info("sums by memory: %s", str(error).partition("\n")[0])
            found = False
        finally:
            timer.cancel()
            timer.join()
        if is_late.is_set():
            log.info("sums by memory: nothing has come within %d s", NEAR_SECONDS)
        return found and not is_late.is_set()

    def _is_right(self, is_checked: Callable[[Tensor], bool] = lambda x: True) -> bool:
        """Of sums of numbers that `is_checked`, which all ranks choose alike."""
        total = self._ranks * (self._ranks + 1) // 2
        found = []
        for count in CHECKED_NUMBERS:
            numbers = torch.arange(count, device=self._device, dtype=torch.float32) % 1021
            if is_checked(numbers):
                found.append(torch.equal(self.sum(numbers * (self._rank + 1)), numbers * total))
        return all(found)


def make_link(
    store: Any,
    rank: int,
    ranks: int,
    device: torch.device,
    *,
    backend: str,
    is_local: bool,
    on_fault: OnFault | None = None,
) -> GroupLink:
    """The link of a rank; returns when all ranks have made theirs.

    `backend` is "nccl" or "gloo"; `is_local` where all ranks are on this machine. `on_fault` is
    given what is to be called when a rank is lost, from then on: what waits on a device for one
    never ends by itself. Raises BrokenLinkError where one does not come, RankError where sums are
    wrong; the group is left then.
    """
    is_nccl = backend == "nccl"
    try:
        group = _make_group(store, rank, ranks, backend, is_local=is_local)
    except RuntimeError as error:
        raise _broken(error) from error
    link = GroupLink(group, rank, ranks, device, is_nccl=is_nccl)
    if is_nccl and on_fault is not None:
        on_fault(lambda fault: link.let_go())
    try:
        link.check()
        if is_nccl and is_local:
            link.add_near(_make_near(store, rank, ranks, device, group))
    except BaseException:
        link.close()
        raise
    return link


def _make_near(
    store: Any, rank: int, ranks: int, device: torch.device, group: Any
) -> SymmetricSum | None:
    try:
        return SymmetricSum.make(store, rank, ranks, device, group)
    except dist.DistError as error:  # of the store: a rank has not come
        raise _broken(error) from error


def _broken(error: Exception) -> BrokenLinkError:
    return BrokenLinkError(str(error).strip().partition("\n")[0])


def _make_group(store: Any, rank: int, ranks: int, backend: str, *, is_local: bool) -> Any:
    if backend == "nccl":
        options: Any = dist.ProcessGroupNCCL.Options()
        options._timeout = MAKING
        return dist.ProcessGroupNCCL(store, rank, ranks, options)
    options = _c10d.ProcessGroupGloo._Options()
    host = {"hostname": "127.0.0.1"} if is_local else {}
    options._devices = [_gloo_device(**host)]
    options._timeout = CONNECTING
    return _c10d.ProcessGroupGloo(store, rank, ranks, options)


def _gloo_device(**host: str) -> Any:
    """The network that gloo uses: GLOO_SOCKET_IFNAME where there are several machines."""
    make: Any = _c10d.ProcessGroupGloo
    if host:
        return make.create_device(**host)
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    return make.create_device(interface=interface) if interface else make.create_default_device()


def choose_backend(devices: list[torch.device]) -> str:
    """NCCL among GPUs of which each has one rank, else gloo."""
    on_gpus = all(device.type == "cuda" for device in devices)
    return "nccl" if on_gpus and len(set(devices)) == len(devices) else "gloo"

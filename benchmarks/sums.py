"""Sums between GPUs of one machine: our kernel, torch's symmetric memory, NCCL, side by side.

    python benchmarks/sums.py                # two GPUs, 8 KiB to 8 MiB of bfloat16
    python benchmarks/sums.py --ranks 4

Microseconds of a sum, on all ranks at once, in a CUDA graph of 100: the median of some replays.
`own` is peer_sum.cu, `one_shot` and `two_shots` are torch's with the copies into and out of its
buffer. `_us` is of sums one after the other, `_between_us` of sums with the engine's norm before
each, less the norms alone: what a sum adds to a step, in which kernels may start early. The slowest
replay of both is `_slowest_us`.
"""

from __future__ import annotations

import argparse
import socket
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from envelope import RESULTS, envelope, write_result
from torch import Tensor, multiprocessing
from torch import distributed as dist

from halfweight.engine.parallel.link import GroupLink, make_link
from halfweight.kernels.triton.launch import launch

SIZES = [8 << 10 << i for i in range(11)]
"""Bytes."""
NUM_SUMS, NUM_REPLAYS = 100, 7
HIDDEN_SIZE = 4096
Sum = Callable[[Tensor], object]


def torch_ways(near: Any, device: torch.device) -> dict[str, Sum]:
    """Torch's kernels over a buffer of their own; none where this torch has none."""
    memory, ops = torch._C._distributed_c10d._SymmetricMemory, torch.ops.symm_mem
    buffer = memory.empty_strided_p2p((max(SIZES),), (1,), torch.uint8, device, near._name)
    memory.rendezvous(buffer, near._name)

    def one_shot(x: Tensor) -> object:
        shared = buffer[: x.nbytes].view(x.dtype)
        return ops.one_shot_all_reduce_copy(shared, x, "sum", near._name)

    def two_shots(x: Tensor) -> None:
        shared = buffer[: x.nbytes].view(x.dtype)
        shared.copy_(x)
        ops.two_shot_all_reduce_(shared, "sum", near._name)
        x.copy_(shared)

    return {"one_shot": one_shot, "two_shots": two_shots}


def microseconds(
    link: GroupLink, run: Callable[[], object], device: torch.device
) -> tuple[float, float]:
    """Of one of NUM_SUMS runs in a graph: the median of the replays, and the slowest."""
    run()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(NUM_SUMS):
            run()
    times = []
    for _ in range(NUM_REPLAYS):
        link.least(0)  # the ranks begin together
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / NUM_SUMS)
    return statistics.median(times[2:]), max(times[2:])


def norm(hidden: Tensor, x: Tensor, weight: Tensor) -> None:
    """x becomes the norm of hidden + x, as between two products of a layer."""
    tokens, size = hidden.shape
    operands = (hidden, x, weight, x, 1e-5)
    meta = {"SIZE": size, "BLOCK": size, "HAS_DELTA": True, "num_warps": 8}
    launch("add_norm", (tokens, 1), tokens, operands, **meta)


def row(link: GroupLink, ways: dict[str, Sum], size: int, device: torch.device) -> dict[str, Any]:
    """All ways for one size, which each takes."""
    x, hidden = (
        torch.zeros(size // (2 * HIDDEN_SIZE), HIDDEN_SIZE, dtype=torch.bfloat16, device=device)
        for _ in range(2)
    )
    weight = torch.ones(HIDDEN_SIZE, dtype=torch.bfloat16, device=device)
    norms, _ = microseconds(link, partial(norm, hidden, x, weight), device)
    found: dict[str, Any] = {"bytes": size, "norm_us": norms}
    for name, add in ways.items():

        def both(add: Sum = add) -> None:
            norm(hidden, x, weight)
            add(x.view(-1))

        found[f"{name}_us"], slowest = microseconds(link, partial(add, x.view(-1)), device)
        between, slowest_between = microseconds(link, both, device)
        found[f"{name}_between_us"] = between - norms
        found[f"{name}_slowest_us"] = max(slowest, slowest_between - norms)
    return found


def free_port() -> int:
    """Where ranks of this machine may meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def joined(rank: int, ranks: int, port: int) -> tuple[GroupLink, torch.device]:
    """A rank's link and GPU."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = dist.TCPStore("127.0.0.1", port, ranks, is_master=rank == 0)
    return make_link(store, rank, ranks, device, backend="nccl", is_local=True), device


def measure(rank: int, ranks: int, port: int, name: str, out: Path) -> None:
    """One rank; the first writes the result."""
    link, device = joined(rank, ranks, port)
    near: Any = link._near
    if near is None:
        raise SystemExit("these GPUs have no sums by memory: see the log")
    ways: dict[str, Sum] = {"own": near.sum, **torch_ways(near, device)}
    ways["nccl"] = lambda x: link._group.allreduce([x], link._sum)
    found = []
    for size in SIZES:
        x = torch.empty(size // 2, dtype=torch.bfloat16, device=device)
        taken = {name: add for name, add in ways.items() if name != "own" or near.takes(x)}
        found.append({"ranks": ranks} | row(link, taken, size, device))
        if rank == 0:
            print(found[-1], flush=True)
            write_result(name, envelope(device, {"nvlink_gb_per_second": 450.0}), found, out=out)
    link.least(0)
    link.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="sums")
    options = parser.parse_args()
    if torch.cuda.device_count() < options.ranks:
        raise SystemExit(f"needs {options.ranks} GPUs, found {torch.cuda.device_count()}")
    given = (options.ranks, free_port(), options.name, options.out)
    multiprocessing.spawn(measure, given, options.ranks)


if __name__ == "__main__":
    main()

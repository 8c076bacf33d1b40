"""Ranks, a process and a GPU each, that check sums by memory with torch's arithmetic."""

from __future__ import annotations

import time

import sums
import torch
from torch import multiprocessing

SIZES = [
    (torch.bfloat16, 8),
    (torch.float16, 8192),
    (torch.bfloat16, 8192),
    (torch.float32, 4100),
    (torch.bfloat16, 8 * 12343),
    (torch.float32, 1 << 18),
    (torch.bfloat16, 1 << 20),
    (torch.float16, 1 << 21),
]
"""To 4 MiB, which all numbers of ranks sum by memory."""


def on_gpus(function, ranks, *arguments, seconds):
    """Run `function(rank, ranks, port, *arguments)` in so many processes, at most so long."""
    given = (ranks, sums.free_port(), *arguments)
    started = multiprocessing.spawn(function, given, ranks, join=False)
    end = time.monotonic() + seconds
    try:
        while not started.join(timeout=1):
            assert time.monotonic() < end, "the ranks have not ended"
    finally:
        for process in started.processes:
            process.kill()


class Case:
    """Numbers that change with a count on the device, their sum, and how many came out wrong."""

    def __init__(self, near, rank, ranks, dtype, size, count):
        self.near, self.rank, self.ranks, self.dtype, self.count = near, rank, ranks, dtype, count
        self.places = torch.arange(size, device=count.device)
        self.wrong = torch.zeros((), dtype=torch.int64, device=count.device)

    def of_rank(self, rank):
        mixed = (self.places * 7919 + self.count * 104729 + rank * 1299709) % 65521
        return ((mixed - 32760).float() / 509).to(self.dtype)

    def begin(self):
        parts = [self.of_rank(rank) for rank in range(self.ranks)]
        total = torch.zeros_like(parts[0], dtype=torch.float32)
        for part in parts:
            total += part.float()
        self.x, self.expected = parts[self.rank].clone(), total.to(self.dtype)

    def add(self):
        self.found = self.near.sum(self.x)

    def end(self):
        self.wrong += (self.found != self.expected).sum()


def check_sums(rank, ranks, port, replays):
    """Sums in a graph that is replayed, and between, on ranks of which now and then one is late."""
    link, device = sums.joined(rank, ranks, port)
    near = link._near
    assert near is not None
    count = torch.zeros((), dtype=torch.int64, device=device)
    cases = [Case(near, rank, ranks, *size, count) for size in SIZES]
    assert all(near.takes(case.of_rank(0)) for case in cases)

    def run_all():
        count.add_(1)
        for do in (Case.begin, Case.add, Case.end):  # sums behind sums start early
            for case in cases:
                do(case)

    run_all()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run_all()
    for i in range(replays):
        if (i * 2654435761 >> 7) % (3 * ranks) == rank:
            torch.cuda._sleep(200_000)
        graph.replay()
        if i % 100 == 0:
            run_all()
    torch.cuda.synchronize()
    assert int(count) == 1 + replays + -(-replays // 100)
    wrong = {(str(case.dtype), len(case.places)): int(case.wrong) for case in cases}
    assert not any(wrong.values()), wrong
    link.close()


def check_giving_up(rank, ranks, port):
    """A rank that makes no call is waited for until the others are told, and never again."""
    link, device = sums.joined(rank, ranks, port)
    x = torch.ones(8192, dtype=torch.bfloat16, device=device)
    link.sum(x.clone())
    torch.cuda.synchronize()
    link.least(0)
    if rank > 0:
        time.sleep(3)  # its memory stays
        link.close()
        return
    for _ in range(320):
        link.sum(x.clone())
    time.sleep(0.5)
    assert not torch.cuda.current_stream().query()
    begin = time.monotonic()
    link._near.let_go()
    torch.cuda.synchronize()
    seconds = time.monotonic() - begin
    print(f"320 sums let go of in {seconds:.3f} s")
    assert seconds < 2
    link.close()

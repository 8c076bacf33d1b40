"""How products are timed: cold caches, no launch gaps, rivals in turn, medians.

One round of a kernel runs it over enough copies of its weight that no cache serves them, as layers
of a model follow one another. On a GPU the round is captured in a CUDA graph and its replays are
timed with device events; elsewhere it is called and timed by the clock. Rivals are replayed in
turn, so that a change of clock speed meets all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import Tensor

from halfweight.kernels import operations
from halfweight.quantization.numerics import QuantizedTensor

Call = Callable[[], object]
_cuda: Any = torch.cuda
"""torch.cuda, whose stubs leave events and streams untyped."""

COLD_BYTES = 400_000_000
"""Copies of a weight take at least this much together: eight times an H100's L2 cache."""
MAX_COPIES = 32
BANDWIDTH_BYTES = 2 << 30
READ_BLOCK_BYTES = 32 << 10


class Round:
    """Calls that run one after the other, timed as one."""

    def __init__(self, calls: Sequence[Call], device: torch.device) -> None:
        self.num_calls = len(calls)
        self._device = device
        self._replay: Call = _capture(calls) if device.type == "cuda" else _sequence(calls)

    def microseconds(self) -> float:
        """Mean time of a call in one run of the round."""
        if self._device.type != "cuda":
            begin = time.perf_counter()
            self._replay()
            return (time.perf_counter() - begin) * 1e6 / self.num_calls
        begin_event = _cuda.Event(enable_timing=True)
        end_event = _cuda.Event(enable_timing=True)
        begin_event.record()
        self._replay()
        end_event.record()
        end_event.synchronize()
        return float(begin_event.elapsed_time(end_event)) * 1e3 / self.num_calls


def _sequence(calls: Sequence[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    run()
    return run


def _capture(calls: Sequence[Call]) -> Call:
    run = _sequence(calls)
    stream = _cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):  # torch.cuda.graph would collect garbage and empty the cache
        graph.capture_begin()
        run()
        graph.capture_end()
    return graph.replay


def interleaved(rounds: Mapping[str, Round], repeats: int = 20) -> dict[str, float]:
    """Median microseconds a call of each rival, all replayed in turn `repeats` times."""
    for candidate in rounds.values():
        candidate.microseconds()
    samples: dict[str, list[float]] = {name: [] for name in rounds}
    for _ in range(repeats):
        for name, candidate in rounds.items():
            samples[name].append(candidate.microseconds())
    return {name: median(values) for name, values in samples.items()}


def num_copies(num_bytes: int) -> int:
    """How many copies of a weight of `num_bytes` keep it out of every cache."""
    return max(2, min(MAX_COPIES, -(-COLD_BYTES // num_bytes) + 1))


def random_weight(
    shape: tuple[int, int], device: torch.device, group_size: int = 128
) -> QuantizedTensor:
    """A random weight [N, K] in grid8 of the size of a trained layer's."""
    out_features, in_features = shape
    groups = (out_features, in_features // group_size)
    return QuantizedTensor(
        torch.randint(1, 256, shape, dtype=torch.uint8, device=device),
        torch.randint(64, 256, groups, dtype=torch.uint8, device=device),
        torch.randint(-20, -18, (out_features,), dtype=torch.int8, device=device),
    )


def random_weights(shape: tuple[int, int], device: torch.device) -> list[QuantizedTensor]:
    """So many random weights that calls in turn find none in a cache."""
    return [random_weight(shape, device) for _ in range(num_copies(shape[0] * shape[1]))]


VENDOR = "torch 16-bit"
COMPARED = ("cuda", "sm80", "triton", "cpu")


@dataclass(frozen=True)
class ProductTime:
    """One product of x [tokens, in_features] and a weight [out_features, in_features], timed.

    `speedup` is over torch's product with a 16-bit weight in the same run; bytes are those of
    the weight.
    """

    name: str
    out_features: int
    in_features: int
    tokens: int
    microseconds: float
    bytes_per_second: float
    fraction_of_read_bandwidth: float
    speedup: float


def compare(device: torch.device, shape: tuple[int, int], tokens: int) -> list[ProductTime]:
    """Every backend that runs on `device` beside torch's 16-bit product, on random weights."""
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    x = torch.randn(tokens, shape[1], device=device, dtype=dtype)
    num_bytes = {VENDOR: 2 * shape[0] * shape[1]}
    rounds = {VENDOR: _vendor_round(x, shape)}
    weights = random_weights(shape, device)
    for name in COMPARED:
        if operations.backend(name).unavailable(device) is None:
            rounds[name] = Round([_product(name, x, weight) for weight in weights], device)
            num_bytes[name] = weights[0].num_bytes
    times, peak = interleaved(rounds), read_bandwidth(device)
    rates = {name: num_bytes[name] / us * 1e6 for name, us in times.items()}
    return [
        ProductTime(name, *shape, tokens, us, rates[name], rates[name] / peak, times[VENDOR] / us)
        for name, us in times.items()
    ]


def _vendor_round(x: Tensor, shape: tuple[int, int]) -> Round:
    copies = num_copies(2 * shape[0] * shape[1])
    weights = [torch.randn(shape, device=x.device, dtype=x.dtype) for _ in range(copies)]

    def call(weight: Tensor) -> Call:
        return lambda: torch.nn.functional.linear(x, weight)

    return Round([call(weight) for weight in weights], x.device)


def _product(name: str, x: Tensor, weight: QuantizedTensor) -> Call:
    parts = (weight.packed, weight.scales, weight.exponents)
    linear = operations.backend(name).linear
    return lambda: linear(x, *parts, None)


@cache
def read_bandwidth(device: torch.device) -> float:
    """Bytes a second of reading a large contiguous buffer: the ceiling of a decode product."""
    if device.type != "cuda":
        data = torch.ones(BANDWIDTH_BYTES // 16, dtype=torch.float32)
        return data.nbytes / _best_microseconds(data.sum, device) * 1e6
    from halfweight.kernels.triton import tiled

    words = torch.randint(1 << 30, (BANDWIDTH_BYTES // 4,), dtype=torch.int32, device=device)
    sums = torch.empty(BANDWIDTH_BYTES // READ_BLOCK_BYTES, dtype=torch.int32, device=device)

    def read() -> None:
        tiled.read[(sums.numel(),)](words, sums, BLOCK=READ_BLOCK_BYTES // 4, num_warps=8)

    return BANDWIDTH_BYTES / _best_microseconds(read, device) * 1e6


def _best_microseconds(call: Call, device: torch.device) -> float:
    candidate = Round([call], device)
    return min(candidate.microseconds() for _ in range(20))

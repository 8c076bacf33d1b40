"""Measure which configuration is fastest for each batch and shape, for the table of a GPU."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product as combinations

import torch

from halfweight.kernels import timing
from halfweight.kernels.triton import backend as triton
from halfweight.kernels.triton.launch import device_info
from halfweight.kernels.triton.tables import Config, Entry, Table, table_for
from halfweight.quantization.numerics import QuantizedTensor

log = logging.getLogger("halfweight")

SHAPES = ((6144, 4096), (28672, 4096), (4096, 14336), (57344, 8192), (4096, 4096))
"""Weights [N, K] of Llama-3-8B and of Llama-3-70B's widest layer."""
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
INT8_BATCHES = (16, 64, 256, 1024, 4096)
REPEATS = 8


def exact_candidates(tokens: int, shape: tuple[int, int]) -> list[Config]:
    """Configurations worth a measurement for 16-bit activations."""
    found = list(_gemv_candidates()) if tokens <= triton.MAX_GEMV_TOKENS else []
    found = [c for c in found if triton.takes(c, torch.float16, tokens, shape[1])]
    if tokens > 1:
        found += _tiles("matmul", tokens, shape) + _tiles("two_int8", tokens, shape)
    if tokens >= 128:
        found.append(Config("dequantize"))
    return found


def int8_candidates(tokens: int, shape: tuple[int, int]) -> list[Config]:
    """Configurations worth a measurement for int8 activations."""
    return _tiles("int8", tokens, shape)


def _gemv_candidates() -> Iterator[Config]:
    for rows, warps, programs in combinations((2, 4, 8), (8, 16), (1, 2, 4, 8)):
        for stages in (1, 3):
            yield Config("gemv", rows=rows, warps=warps, per_processor=programs, stages=stages)


def _tiles(kernel: str, tokens: int, shape: tuple[int, int]) -> list[Config]:
    widths = [t for t in (16, 32, 64, 128) if t < 2 * max(16, tokens)][-2:]
    splits = (1, 2, 4, 8) if tokens <= 256 and shape[0] < 16384 else (1, 2)[: 1 + (tokens <= 64)]
    return [
        Config(kernel, tokens=width, rows=rows, split=split, warps=warps, stages=stages)  # type: ignore[arg-type]
        for width, rows, split, stages in combinations(widths, (64, 128), splits, (3, 4))
        for warps in ((4,) if width * rows < 8192 else (4, 8))
    ]


def tune(
    device: torch.device,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    *,
    limit_seconds: float = 3600,
    progress: Callable[[str], None] = lambda line: None,
) -> Table:
    """The fastest configuration of each batch and shape, measured on `device`.

    After `limit_seconds` the shapes and batches not yet measured are left out; the batch order is
    that of BATCHES, so a short run covers decode first. `progress` gets a line a measurement.
    """
    deadline = time.monotonic() + limit_seconds
    exact = _measure(device, shapes, BATCHES, exact_candidates, deadline, progress)
    int8 = _measure(device, shapes, INT8_BATCHES, int8_candidates, deadline, progress)
    fallback = table_for(device_info(device).architecture)
    return Table(exact or fallback.exact, int8 or fallback.int8)


def _measure(
    device: torch.device,
    shapes: Sequence[tuple[int, int]],
    batches: Sequence[int],
    candidates: Callable[[int, tuple[int, int]], list[Config]],
    deadline: float,
    progress: Callable[[str], None],
) -> tuple[Entry, ...]:
    entries = []
    for tokens, shape in combinations(batches, shapes):
        if time.monotonic() > deadline:
            break
        times = measure_configs(device, shape, tokens, candidates(tokens, shape))
        if times:
            best = min(times, key=lambda config: times[config])
            entries.append(Entry(tokens, *shape, best))
            progress(f"{tokens} tokens, {shape[0]} x {shape[1]}: {times[best]:.1f} us, {best}")
    return tuple(entries)


def measure_configs(
    device: torch.device, shape: tuple[int, int], tokens: int, configs: Sequence[Config]
) -> dict[Config, float]:
    """Median microseconds of each configuration that compiles and runs on `device`."""
    weights = [
        timing.random_weight(shape, device) for _ in range(timing.num_copies(shape[0] * shape[1]))
    ]
    x = torch.randn(tokens, shape[1], device=device, dtype=torch.float16)
    times = {}
    for config in configs:
        try:
            calls = [_call(x, weight, config) for weight in weights]
            found = timing.interleaved({"it": timing.Round(calls, device)}, REPEATS)
        except Exception as error:  # a tile too large for this GPU: any class of the compiler's
            log.info("%s: %s", config, error)
            continue
        times[config] = found["it"]
    return times


def _call(x: torch.Tensor, weight: QuantizedTensor, config: Config) -> timing.Call:
    parts = (weight.packed, weight.scales, weight.exponents)
    return lambda: triton.product(x, *parts, None, lambda *_: config)

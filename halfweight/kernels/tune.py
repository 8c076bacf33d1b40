"""Measure which configuration is fastest for each batch and shape, for the table of a GPU; and how
far the forms of w8a16.cu are from what their model says.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product as combinations
from statistics import median

import torch

from halfweight.errors import HalfweightError
from halfweight.kernels import timing
from halfweight.kernels.cuda import backend as cuda
from halfweight.kernels.cuda import driver, schedule, tiles
from halfweight.kernels.cuda.schedule import Plan
from halfweight.kernels.triton import backend as triton
from halfweight.kernels.triton.launch import device_info
from halfweight.kernels.triton.tables import Config, Entry, Table, table_for
from halfweight.quantization.numerics import QuantizedTensor

log = logging.getLogger("halfweight")

SHAPES = ((6144, 4096), (28672, 4096), (4096, 14336), (57344, 8192), (4096, 4096))
"""Weights [N, K] of Llama-3-8B and of Llama-3-70B's widest layer."""
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
INT8_BATCHES = (16, 64, 256, 1024, 4096)
TILE_BATCHES = (8, 16, 32, 64, 128, 256)
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
    weights = timing.random_weights(shape, device)
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


def tune_tiles(
    device: torch.device,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    *,
    limit_seconds: float = 3600,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[tiles.Shape, float]:
    """Of each form of w8a16.cu that runs on `device`: measured times as multiples of estimates, the
    median over batches and shapes. `limit_seconds` and `progress` as for `tune`.
    """
    deadline = time.monotonic() + limit_seconds
    ratios: dict[tiles.Shape, list[float]] = {}
    for tokens, shape in combinations(TILE_BATCHES, shapes):
        if time.monotonic() > deadline:
            break
        times = measure_plans(device, shape, tokens, _plans(device, shape, tokens))
        for plan, us in times.items():
            estimate = tiles.LAUNCH_US + plan.microseconds
            ratios.setdefault(plan.config.shape, []).append(us / estimate)
        if times:
            best = min(times, key=lambda plan: times[plan])
            name = best.config.shape.name
            progress(f"{tokens} tokens, {shape[0]} x {shape[1]}: {times[best]:.1f} us, {name}")
    return {shape: median(found) for shape, found in ratios.items()}


def _plans(device: torch.device, shape: tuple[int, int], tokens: int) -> list[Plan[tiles.Form]]:
    """The most promising plan of each form."""
    card = driver.card_of(device.index)
    return [
        min(schedule.plans(form, tokens, *shape, card), key=schedule.preference)
        for form in tiles.forms(card, tokens, scaled=True)
    ]


def measure_plans(
    device: torch.device, shape: tuple[int, int], tokens: int, plans: Sequence[Plan[tiles.Form]]
) -> dict[Plan[tiles.Form], float]:
    """Median microseconds of each plan, in turn; of those that fail none."""
    weights = timing.random_weights(shape, device)
    x = torch.randn(tokens, shape[1], device=device, dtype=torch.float16)
    y = torch.empty(tokens, shape[0], device=device, dtype=torch.float16)
    rounds = {}
    for plan in plans:
        try:
            calls = [_tile_call(x, weight, y, plan) for weight in weights]
            rounds[plan] = timing.Round(calls, device)
        except HalfweightError as error:
            log.info("%s: %s", plan.config, error)
    names = {plan.config.shape.name: plan for plan in rounds}
    found = timing.interleaved({n: rounds[plan] for n, plan in names.items()}, REPEATS)
    return {names[name]: us for name, us in found.items()}


def _tile_call(
    x: torch.Tensor, weight: QuantizedTensor, y: torch.Tensor, plan: Plan[tiles.Form]
) -> timing.Call:
    parts = (weight.packed, weight.scales, weight.exponents)
    return lambda: cuda.launch(x, *parts, None, y, plan)


def _call(x: torch.Tensor, weight: QuantizedTensor, config: Config) -> timing.Call:
    parts = (weight.packed, weight.scales, weight.exponents)
    return lambda: triton.product(x, *parts, None, lambda *_: config)

"""The times of all tiles and schedules of the Hopper kernels, and the constants that explain them.

    python benchmarks/hopper_tiles.py                     # measure, on a GPU
    python benchmarks/hopper_tiles.py --fit benchmarks/results/hopper_tiles.json

`halfweight/kernels/hopper.py` estimates the time of a product from a few constants. --fit searches
for those under which its choice loses the least against the fastest that was measured, and says how
much that is; without --fit, the same for the constants of today.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from envelope import RESULTS, envelope, write_result
from kernels import SHAPES
from torch import Tensor

from halfweight.activations import MULTIPROCESSORS
from halfweight.kernels import cuda, hopper, timing
from halfweight.kernels.hopper import LARGE, SMALL, Config, Plan, Small, plans

BATCHES = (8, 16, 32, 64, 128, 256, 512, 1024, 4096)
GROUP_SIZE = 128
TRIES = 20_000
SHAPE_LIST = {**SHAPES, "o": (4096, 4096)}


def label(plan: Plan) -> str:
    """One name for a configuration and its schedule."""
    config = plan.config
    sizes = [str(getattr(config, f.name)) for f in fields(config) if f.name != "block_us"]
    schedule = f"{plan.whole_waves}x{plan.num_workers}"
    return "-".join([type(config).__name__, *sizes, schedule])


def all_plans(tokens: int, shape: tuple[int, int]) -> list[Plan]:
    """Every schedule of every configuration that may be chosen for such a product."""
    configs = hopper.candidates(tokens, shape[1], GROUP_SIZE)
    return [p for c in configs for p in plans(c, tokens, *shape, MULTIPROCESSORS)]


def measure(tokens: int, shape: tuple[int, int], device: torch.device) -> dict[str, float]:
    """Microseconds of each plan, in turn, and of the vendor's 16-bit product."""
    copies = timing.num_copies(shape[0] * shape[1])
    weights = [timing.random_weight(shape, device, GROUP_SIZE) for _ in range(copies)]
    x = torch.randn(tokens, shape[1], device=device, dtype=torch.float16)
    y = torch.empty(tokens, shape[0], device=device, dtype=torch.float16)
    dense = [torch.randn(shape, device=device, dtype=torch.float16) for _ in range(copies // 2 + 1)]
    rounds = {"float16": timing.Round([lambda w=w: torch.mm(x, w.T) for w in dense], device)}
    for plan in all_plans(tokens, shape):
        calls = [lambda w=w, plan=plan: _launch(x, w, y, plan) for w in weights]
        rounds[label(plan)] = timing.Round(calls, device)
    return timing.interleaved(rounds, repeats=10)


def _launch(x: Tensor, weight: Any, y: Tensor, plan: Plan) -> None:
    cuda._launch(x, weight.packed, weight.scales, weight.exponents, None, y, plan)


def losses(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """Of each product: how much slower than the best the plan is that would be chosen."""
    for row in rows:
        times, shape = row["microseconds"], SHAPE_LIST[row["shape"]]
        found = [p for p in all_plans(row["tokens"], shape) if label(p) in times]
        if not found:
            continue
        chosen = min(found, key=lambda p: p.microseconds)
        best = min(times[label(p)] for p in found)
        yield f"{row['shape']} {row['tokens']}", times[label(chosen)] / best - 1


def penalty(rows: Sequence[Mapping[str, Any]]) -> float:
    """Mean loss plus a fifth of the worst."""
    values = [loss for _, loss in losses(rows)]
    return sum(values) / len(values) + 0.2 * max(values)


def with_times(configs: Sequence[Config], factors: Mapping[Config, float]) -> tuple[Config, ...]:
    """The configurations, their stages slower by factors."""
    return tuple(replace(c, block_us=round(c.block_us * factors[c], 3)) for c in configs)


def fit(rows: Sequence[Mapping[str, Any]], seed: int = 0) -> tuple[Config, ...]:
    """Stage times, near those of today, under which the choice loses the least."""
    chance = random.Random(seed)
    best = (*SMALL, *LARGE)
    least = penalty(rows)
    for _ in range(TRIES):
        factors = dict.fromkeys(best, 1.0)
        for config in chance.sample(best, 2):
            factors[config] = math.exp(chance.gauss(0, 0.05))
        tried = with_times(best, factors)
        small = tuple(c for c in tried if isinstance(c, Small))
        with mock.patch.multiple(hopper, SMALL=small, LARGE=tried[len(small) :]):
            found = penalty(rows)
        if found < least:
            best, least = tried, found
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", type=Path, help="a result of this benchmark")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.fit:
        rows = json.loads(options.fit.read_text())["results"]
        for config in fit(rows):
            print(config)
    else:
        device, rows = torch.device("cuda", 0), []
        facts = envelope(device, {"read_bytes_per_second": timing.read_bandwidth(device)})
        for tokens in options.batches:
            for name, shape in SHAPE_LIST.items():
                times = measure(tokens, shape, device)
                rows.append({"shape": name, "tokens": tokens, "microseconds": times})
                write_result("hopper_tiles", facts, rows, out=options.out)
    for name, loss in losses(rows):
        print(f"{name}: {loss:.1%}")


if __name__ == "__main__":
    main()

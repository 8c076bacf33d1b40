"""The times of all tiles and schedules of the Hopper kernels, and the constants that explain them.

    python benchmarks/hopper_tiles.py                     # measure, on a GPU
    python benchmarks/hopper_tiles.py --fit benchmarks/results/hopper_tiles.json
    python benchmarks/hopper_tiles.py --markdown benchmarks/results/hopper_tiles.json

`halfweight/kernels/hopper/tiles.py` estimates the time of a product from a few constants. --fit
searches for those under which its choice loses the least against the fastest that was measured, and
says how much that is; without --fit, the same for the constants of today. --markdown prints the
table of the tiles that are chosen.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from envelope import RESULTS, envelope, write_result
from kernels import SHAPES
from torch import Tensor

from halfweight.kernels import timing
from halfweight.kernels.cuda import driver, schedule
from halfweight.kernels.hopper import backend as cuda
from halfweight.kernels.hopper import tiles
from halfweight.kernels.hopper.tiles import Config, Int8, Plan, Small, plans

BATCHES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
GROUP_SIZE = 128
TRIES = 20_000
REPEATS = 10
SHAPE_LIST = {**SHAPES, "o": (4096, 4096)}

PlansOf = Callable[[int, tuple[int, int], int], list[Plan]]


def label(plan: Plan) -> str:
    """One name for a configuration and its schedule."""
    config = plan.config
    sizes = [str(getattr(config, f.name)) for f in fields(config) if f.name != "block_us"]
    schedule = f"{plan.rows}-{plan.whole_waves}x{plan.num_workers}"
    return "-".join([type(config).__name__, *sizes, schedule])


def all_plans(tokens: int, shape: tuple[int, int], multiprocessors: int) -> list[Plan]:
    """Every schedule of every configuration that may be chosen for such a product."""
    configs = tiles.candidates(tokens, shape[1], GROUP_SIZE)
    return [p for c in configs for p in plans(c, tokens, *shape, multiprocessors)]


def int8_plans(tokens: int, shape: tuple[int, int], multiprocessors: int) -> list[Plan]:
    """The same for activations in int8."""
    if tokens < cuda.INT8_TOKENS:
        return []
    return [p for c in tiles.INT8 for p in plans(c, tokens, *shape, multiprocessors)]


def measure(tokens: int, shape: tuple[int, int], device: torch.device) -> dict[str, float]:
    """Microseconds of each plan, in turn, and of the vendor's 16-bit product."""
    copies = timing.num_copies(shape[0] * shape[1])
    weights = [timing.random_weight(shape, device, GROUP_SIZE) for _ in range(copies)]
    x = torch.randn(tokens, shape[1], device=device, dtype=torch.float16)
    y = torch.empty(tokens, shape[0], device=device, dtype=torch.float16)
    dense = [torch.randn(shape, device=device, dtype=torch.float16) for _ in range(copies // 2 + 1)]
    rounds = {"float16": timing.Round([lambda w=w: torch.mm(x, w.T) for w in dense], device)}
    processors = driver.num_multiprocessors(0)
    exact, int8 = (of(tokens, shape, processors) for of in (all_plans, int8_plans))
    rounded = {config: cuda.rounded_for(config, x) for config in {plan.config for plan in int8}}
    for plan in exact + int8:
        operand, steps = rounded.get(plan.config, (x, None))
        calls = [partial(_launch, operand, steps, w, y, plan) for w in weights]
        rounds[label(plan)] = timing.Round(calls, device)
    return timing.interleaved(rounds, repeats=REPEATS)


def _launch(x: Tensor, steps: Tensor | None, weight: Any, y: Tensor, plan: Plan) -> None:
    cuda._launch(x, weight.packed, weight.scales, weight.exponents, None, y, plan, steps)


def chosen(row: Mapping[str, Any], plans_of: PlansOf) -> tuple[float, float] | None:
    """Microseconds of the plan that would be chosen and of the fastest; None if none was timed."""
    times = row["microseconds"]
    known = plans_of(row["tokens"], SHAPE_LIST[row["shape"]], row["multiprocessors"])
    found = [plan for plan in known if label(plan) in times]
    if not found:
        return None
    first = min(found, key=schedule.preference)
    return times[label(first)], min(times[label(plan)] for plan in found)


def losses(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """Of each product: how much slower than the best the plan is that would be chosen."""
    for row in rows:
        for name, plans_of in (("", all_plans), (" int8", int8_plans)):
            found = chosen(row, plans_of)
            if found is not None:
                yield f"{row['shape']} {row['tokens']}{name}", found[0] / found[1] - 1


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Speed of the chosen plans over the vendor's 16-bit product, a line a shape."""
    tokens = sorted({row["tokens"] for row in rows})
    lines = ["| | " + " | ".join(f"M={m}" for m in tokens) + " |", "|---" * (len(tokens) + 1) + "|"]
    for name in dict.fromkeys(row["shape"] for row in rows):
        for kind, plans_of in (("", all_plans), (" int8", int8_plans)):
            cells = {}
            for row in rows:
                found = chosen(row, plans_of) if row["shape"] == name else None
                if found is not None:
                    cells[row["tokens"]] = f"{row['microseconds']['float16'] / found[0]:.2f}"
            lines.append(f"| {name}{kind} | " + " | ".join(cells.get(m, "") for m in tokens) + " |")
    return "\n".join(lines)


def penalty(rows: Sequence[Mapping[str, Any]]) -> float:
    """Mean loss plus a fifth of the worst."""
    values = [loss for _, loss in losses(rows)]
    return sum(values) / len(values) + 0.2 * max(values)


def with_times(configs: Sequence[Config], factors: Mapping[Config, float]) -> tuple[Config, ...]:
    """The configurations, their stages slower by factors."""
    return tuple(replace(c, block_us=round(c.block_us * factors[c], 3)) for c in configs)


@contextmanager
def using(configs: Sequence[Config]) -> Iterator[None]:
    """Choose among these instead."""
    small = tuple(c for c in configs if isinstance(c, Small))
    int8 = tuple(c for c in configs if isinstance(c, Int8))
    large = tuple(c for c in configs if not isinstance(c, Int8 | Small))
    with mock.patch.multiple(tiles, SMALL=small, LARGE=large, INT8=int8):
        yield


def fit(rows: Sequence[Mapping[str, Any]], seed: int = 0) -> tuple[Config, ...]:
    """Stage times, near those of today, under which the choice loses the least."""
    chance = random.Random(seed)
    best = (*tiles.SMALL, *tiles.LARGE, *tiles.INT8)
    least = penalty(rows)
    for _ in range(TRIES):
        factors = dict.fromkeys(best, 1.0)
        for config in chance.sample(best, 2):
            factors[config] = math.exp(chance.gauss(0, 0.05))
        tried = with_times(best, factors)
        with using(tried):
            found = penalty(rows)
        if found < least:
            best, least = tried, found
    return best


def summary(row: Mapping[str, Any], most: int = 5) -> str:
    """The fastest plans of a product, and its speed over the vendor's 16-bit one."""
    times = row["microseconds"]
    fastest = sorted(times, key=lambda name: times[name])[:most]
    lines = [f"{row['shape']} {row['tokens']}: {times['float16']:.1f} us in float16"]
    lines += [f"  {times['float16'] / times[n]:.3f} x, {times[n]:.1f} us {n}" for n in fastest]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", type=Path, help="a result of this benchmark")
    parser.add_argument("--markdown", type=Path, help="print the table of a result and stop")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--shapes", nargs="+", choices=SHAPE_LIST, default=list(SHAPE_LIST))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.markdown:
        print(markdown(json.loads(options.markdown.read_text())["results"]))
        return
    if options.fit:
        rows = json.loads(options.fit.read_text())["results"]
        for config in fit(rows):
            print(config)
    else:
        device, rows = torch.device("cuda", 0), []
        facts = envelope(device, {"read_bytes_per_second": timing.read_bandwidth(device)})
        for tokens in options.batches:
            for name in options.shapes:
                times = measure(tokens, SHAPE_LIST[name], device)
                processors = driver.num_multiprocessors(0)
                heading = {"shape": name, "tokens": tokens, "multiprocessors": processors}
                rows.append({**heading, "microseconds": times})
                print(summary(rows[-1]), flush=True)
                write_result("hopper_tiles", facts, rows, out=options.out)
    for name, loss in losses(rows):
        print(f"{name}: {loss:.1%}")


if __name__ == "__main__":
    main()

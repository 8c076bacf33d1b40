"""The times of all tiles and schedules of a family of CUDA kernels, and what explains them.

    python benchmarks/tiles.py hopper                     # measure, on a GPU
    python benchmarks/tiles.py sm80 --limit-seconds 120 --repeats 5
    python benchmarks/tiles.py hopper --fit benchmarks/results/hopper_tiles_h200.json
    python benchmarks/tiles.py sm80 --fit benchmarks/results/sm80_tiles.json --tries 3000
    python benchmarks/tiles.py hopper --markdown benchmarks/results/hopper_tiles_h200.json

`halfweight/kernels/hopper/tiles.py` and `halfweight/kernels/cuda/tiles.py` estimate the time of a
product from a few constants. --fit searches for those under which the choice loses the least
against the fastest that was measured, and says how much that is (--tries 0: for the constants of
today, as after a sweep). --markdown prints the table of the tiles that are chosen.

All forms are compiled first, in parallel. A product's plans are the most promising by the estimate,
each form at least once; a plan whose result is wrong or fails is recorded with its error.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from itertools import chain
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Any
from unittest import mock

import tiles_fit
import tiles_sm80
import torch
from envelope import RESULTS, envelope, write_result
from kernels import SHAPES
from torch import Tensor

from halfweight.kernels import timing
from halfweight.kernels.cuda import backend as sm80
from halfweight.kernels.cuda import driver, schedule
from halfweight.kernels.cuda import tiles as sm80_tiles
from halfweight.kernels.cuda.card import Card
from halfweight.kernels.hopper import backend as cuda
from halfweight.kernels.hopper import tiles
from halfweight.kernels.hopper.tiles import Config, Int8
from halfweight.quantization.numerics import QuantizedTensor, dequantize

GROUP_SIZE = 128
SHAPE_LIST = {**SHAPES, "o": (4096, 4096)}
H100 = Card(132, 232448, 233472, 50 << 20, 3_352_000, 1980, 1300)
"""What was measured before results named their card."""
NEAR = 1.3
"""Plans so much slower than the fastest matter to a fit."""
ALIKE = 1.01
"""Estimates so near the least might be the least if a constant were rounded."""
RATES = (0.96, 1.0, 1.04)
"""Of a card's memory: cards of a kind differ by so much, and the choice should not turn on it."""
MOST_ERROR = 2e-3
"""Relative, of a float16 product to the exact one."""

Plan = schedule.Plan[Any]
PlansOf = Callable[[int, tuple[int, int], Card], list[Plan]]


@dataclass(frozen=True)
class Family:
    """Kernels that one model chooses among.

    ways: name of a way to compute -> its plans. choices: -> those that may be chosen. x_of: a
    configuration and x -> x as the kernel takes it and the steps it was rounded with. launch: (x,
    packed, scales, exponents, bias, y, plan[, steps]). text: a plan and a card's architecture ->
    the kernel's text and what it is compiled for.
    """

    batches: Sequence[int]
    ways: Mapping[str, PlansOf]
    choices: Mapping[str, PlansOf]
    model: tiles_fit.Model[Any]
    x_of: Callable[[Any, Tensor], tuple[Tensor, Tensor | None]]
    launch: Callable[..., None]
    text: Callable[[Plan, str], tuple[str, str]]


def hopper_plans(tokens: int, shape: tuple[int, int], card: Card) -> list[Plan]:
    """Every schedule of every configuration that may be chosen for such a product."""
    configs = tiles.candidates(tokens, shape[1], GROUP_SIZE)
    return [p for c in configs for p in tiles.plans(c, tokens, *shape, card)]


def int8_plans(tokens: int, shape: tuple[int, int], card: Card) -> list[Plan]:
    """The same for activations in int8."""
    if tokens < cuda.INT8_TOKENS:
        return []
    return [p for c in tiles.INT8 for p in tiles.plans(c, tokens, *shape, card)]


def hopper_x(config: Config, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """x [M, K], rounded where the kernel's products are of integers."""
    return cuda.rounded_for(config, x) if isinstance(config, Int8) else (x, None)


def hopper_text(plan: Plan, architecture: str) -> tuple[str, str]:
    """The text of a plan's kernel; all of them need the same architecture."""
    groups = plan.config.groups(GROUP_SIZE)
    return cuda.source(plan.config, groups, torch.float16), cuda.ARCHITECTURE


FAMILIES = {
    "hopper": Family(
        (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
        {"": hopper_plans, " int8": int8_plans},
        {"": hopper_plans, " int8": int8_plans},
        tiles_fit.HOPPER,
        hopper_x,
        cuda._launch,
        hopper_text,
    ),
    "sm80": Family(
        (16, 64, 128, 8, 256, 32, 1, 96, 192, 4, 2),
        {"": tiles_sm80.plans},
        {"": tiles_sm80.choices},
        tiles_fit.SM80,
        lambda config, x: (x, None),
        sm80.launch,
        tiles_sm80.text,
    ),
}
"""Batches in the order in which they are measured, so that a cut run is useful."""


def label(plan: Plan) -> str:
    """One name for a configuration and its schedule."""
    config = getattr(plan.config, "shape", plan.config)
    named = [f.name for f in fields(config) if f.name not in ("block_us", "factor", "scaled")]
    sizes = [str(getattr(config, name)) for name in named]
    sizes += ["scaled"] if getattr(config, "scaled", False) else []
    dealt = f"{plan.rows}-{plan.whole_waves}x{plan.num_workers}"
    return "-".join([type(config).__name__, *sizes, dealt])


def kind_of(name: str) -> str:
    """The class of a labelled plan's configuration."""
    return name.split("-")[0]


def promising(plans: Sequence[Plan], most: int) -> list[Plan]:
    """At most so many plans by estimate, and each configuration's best."""
    ordered = sorted(plans, key=schedule.preference)
    best = {plan.config: plan for plan in reversed(ordered)}
    return list(dict.fromkeys([*ordered[:most], *best.values()]))


def compile_all(family: Family, plans: Iterable[Plan], architecture: str) -> None:
    """Machine code of every form into the cache folder."""
    texts = {family.text(plan, architecture) for plan in plans}
    begin = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda text: driver.cubin(*text), texts))
    print(f"{len(texts)} forms compiled in {time.monotonic() - begin:.1f} s", flush=True)


@dataclass(frozen=True)
class Weights:
    """Copies of a weight [N, K], quantized and in float16, that no cache holds together."""

    quantized: list[QuantizedTensor]
    dense: list[Tensor]


@cache
def weights_of(shape: tuple[int, int], device: torch.device) -> Weights:
    """Random weights of a shape."""
    quantized = timing.random_weights(shape, device)
    make = partial(torch.randn, shape, device=device, dtype=torch.float16)
    return Weights(quantized, [make() for _ in range(len(quantized) // 2 + 1)])


def measure(
    family: Family, plans: Sequence[Plan], tokens: int, weights: Weights, repeats: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Microseconds of each plan, in turn, and of the vendor's 16-bit product; errors of others."""
    device, (rows, columns) = weights.dense[0].device, weights.dense[0].shape
    x = torch.randn(tokens, columns, device=device, dtype=torch.float16)
    y = torch.empty(tokens, rows, device=device, dtype=torch.float16)
    exact = x.float() @ dequantize(weights.quantized[0]).T
    vendor = [partial(torch.mm, x, w.T) for w in weights.dense]
    rounds, errors = {"float16": timing.Round(vendor, device)}, {}
    taken_as = {config: family.x_of(config, x) for config in {plan.config for plan in plans}}
    for plan in plans:
        taken, steps = taken_as[plan.config]
        calls = [partial(_launch, family, taken, steps, w, y, plan) for w in weights.quantized]
        most = MOST_ERROR if steps is None else 10 * MOST_ERROR
        try:
            check(calls[0], y, exact, most)
            rounds[label(plan)] = timing.Round(calls, device)
        except Exception as error:
            errors[label(plan)] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return timing.interleaved(rounds, repeats=repeats), errors


def _launch(
    family: Family, x: Tensor, steps: Tensor | None, w: QuantizedTensor, y: Tensor, plan: Plan
) -> None:
    rounded = () if steps is None else (steps,)
    family.launch(x, w.packed, w.scales, w.exponents, None, y, plan, *rounded)


def check(call: timing.Call, y: Tensor, exact: Tensor, most: float) -> None:
    """Raises ValueError if `call` does not fill y with the exact product, rounded."""
    y.fill_(torch.nan)
    call()
    error = float((y.float() - exact).norm() / exact.norm())
    if not error <= most:
        raise ValueError(f"relative error {error}")


@dataclass(frozen=True)
class Choice:
    """Microseconds of the plan that would be chosen, of the fastest, of those whose estimates are
    alike in the mean; and how far the estimates of those near the fastest are off, as a part of its
    time.
    """

    microseconds: float
    fastest: float
    alike: float
    deviation: float

    @property
    def loss(self) -> float:
        """How much slower than the fastest."""
        return self.microseconds / self.fastest - 1


def chosen(row: Mapping[str, Any], family: Family, way: str) -> Choice | None:
    """What would be chosen for a product; None if none of its plans was timed."""
    times, asked = row["microseconds"], (row["tokens"], SHAPE_LIST[row["shape"]], card_of(row))
    known = {label(plan): plan for plan in family.choices[way](*asked)}
    found = {name: plan for name, plan in known.items() if name in times}
    if not found:
        return None
    kinds = {kind_of(name) for name in found}
    fastest = min(us for name, us in times.items() if kind_of(name) in kinds)
    first = min(found.values(), key=schedule.preference)
    good = [name for name in found if times[name] < NEAR * fastest]
    off = [times[name] - found[name].microseconds for name in good] or [0.0]
    most = ALIKE * first.microseconds
    alike = fmean(times[name] for name, plan in found.items() if plan.microseconds <= most)
    return Choice(times[label(first)], fastest, alike, pstdev(off, median(off)) / fastest)


def card_of(row: Mapping[str, Any]) -> Card:
    """The card that a row was measured on."""
    return Card(**row["card"]) if "card" in row else H100


def choices(family: Family, rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Choice]]:
    """Of each product what would be chosen."""
    for row in rows:
        for way in family.ways:
            found = chosen(row, family, way)
            if found is not None:
                yield f"{row['shape']} {row['tokens']}{way}", found


def told_losses(family: Family, rows: Sequence[Mapping[str, Any]]) -> str:
    """Of each product how much slower than the fastest the chosen plan is; the mean, the most."""
    found = {name: choice.loss for name, choice in choices(family, rows)}
    lines = [f"{name}: {loss:.1%}" for name, loss in found.items()]
    worst = max(found, key=lambda name: found[name])
    lines.append(f"mean {fmean(found.values()):.2%}, most {found[worst]:.1%} ({worst})")
    return "\n".join(lines)


def markdown(family: Family, rows: Sequence[Mapping[str, Any]]) -> str:
    """Speed of the chosen plans over the vendor's 16-bit product, a line a shape."""
    tokens = sorted({row["tokens"] for row in rows})
    lines = ["| | " + " | ".join(f"M={m}" for m in tokens) + " |", "|---" * (len(tokens) + 1) + "|"]
    for name in dict.fromkeys(row["shape"] for row in rows):
        for kind in family.ways:
            cells = {}
            for row in rows:
                found = chosen(row, family, kind) if row["shape"] == name else None
                if found is not None:
                    speedup = row["microseconds"]["float16"] / found.microseconds
                    cells[row["tokens"]] = f"{speedup:.2f}"
            lines.append(f"| {name}{kind} | " + " | ".join(cells.get(m, "") for m in tokens) + " |")
    return "\n".join(lines)


def rated(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Each row as if it were of cards whose memory has RATES of its own."""
    cards = ((row, card_of(row)) for row in rows)
    return [
        {**row, "card": asdict(replace(card, memory_bytes_per_us=card.memory_bytes_per_us * rate))}
        for row, card in cards
        for rate in RATES
    ]


def penalty(family: Family, rows: Sequence[Mapping[str, Any]]) -> float:
    """Mean loss plus a fifth of the worst, the mean of what is chosen if constants are rounded,
    and a tenth of how far estimates are off.
    """
    found = [choice for _, choice in choices(family, rows)]
    losses = [choice.loss for choice in found]
    off = fmean(choice.deviation for choice in found)
    alike = fmean(choice.alike / choice.fastest - 1 for choice in found)
    return fmean(losses) + 0.2 * max(losses) + alike + 0.1 * off


def summary(row: Mapping[str, Any], most: int = 5) -> str:
    """The fastest plans of a product, and its speed over the vendor's 16-bit one."""
    times = row["microseconds"]
    fastest = sorted(times, key=lambda name: times[name])[:most]
    lines = [f"{row['shape']} {row['tokens']}: {times['float16']:.1f} us in float16"]
    lines += [f"  {times['float16'] / times[n]:.3f} x, {times[n]:.1f} us {n}" for n in fastest]
    lines += [f"  {name}: {error}" for name, error in row["errors"].items()]
    return "\n".join(lines)


def sweep(name: str, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Measure products until the time is over, and write the result after each."""
    deadline = time.monotonic() + options.limit_seconds
    family, card = FAMILIES[name], driver.card_of(device.index)
    major, minor = torch.cuda.get_device_capability(device)
    products = [(tokens, shape) for tokens in options.batches for shape in options.shapes]
    plans = {
        (tokens, shape): [
            plan
            for plans_of in family.ways.values()
            for plan in promising(plans_of(tokens, SHAPE_LIST[shape], card), options.most)
        ]
        for tokens, shape in products
    }
    compile_all(family, chain.from_iterable(plans.values()), f"sm_{major}{minor}")
    facts = envelope(device, {"read_bytes_per_second": timing.read_bandwidth(device)})
    rows: list[dict[str, Any]] = []
    for tokens, shape in products:
        if time.monotonic() > deadline:
            break
        weights = weights_of(SHAPE_LIST[shape], device)
        times, errors = measure(family, plans[tokens, shape], tokens, weights, options.repeats)
        heading = {"shape": shape, "tokens": tokens, "card": asdict(card)}
        rows.append({**heading, "microseconds": times, "errors": errors})
        print(f"{deadline - time.monotonic():.0f} s left. {summary(rows[-1])}", flush=True)
        write_result(f"{name}_tiles", facts, rows, out=options.out)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--fit", type=Path, nargs="+", help="results, of one card or several")
    parser.add_argument("--tries", type=int, default=20_000, help="steps of --fit")
    parser.add_argument("--markdown", type=Path, help="print the table of a result and stop")
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--shapes", nargs="+", choices=SHAPE_LIST, default=list(SHAPE_LIST))
    parser.add_argument("--most", type=int, default=1000, help="plans of a product")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--limit-seconds", type=float, default=3600)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    family = FAMILIES[options.family]
    options.batches = options.batches or family.batches
    if options.markdown:
        print(markdown(family, json.loads(options.markdown.read_text())["results"]))
        return
    if options.fit:
        rows = [row for path in options.fit for row in json.loads(path.read_text())["results"]]
        best = tiles_fit.fit(family.model, partial(penalty, family, rated(rows)), options.tries)
        print(*family.model.told(best), sep="\n")
        with family.model.using(best):
            print(told_losses(family, rows))
        return
    shapes = (*sm80_tiles.SHAPES, *tiles_sm80.TRIED)
    with mock.patch.object(sm80, "SHAPES", shapes):  # the workspace is for all of them
        rows = sweep(options.family, options, torch.device("cuda", 0))
    print(told_losses(family, rows))


if __name__ == "__main__":
    main()

"""Every form of the CUDA kernels on a shape that no tile divides, for compute-sanitizer.

    python benchmarks/edge_shapes.py                       # first: compiles all, in parallel
    compute-sanitizer --report-api-errors no python benchmarks/edge_shapes.py --only w8a16.cu
    compute-sanitizer --tool racecheck python benchmarks/edge_shapes.py --only w8a16.cu
    compute-sanitizer --tool racecheck python benchmarks/edge_shapes.py --only hopper_small.cu \
        --arrive-by-lane

racecheck takes an arrival at a barrier to be that of its own lane: where one lane arrives for its
warp, it reports the reads of the others as races with the copies that fill a stage again. With
--arrive-by-lane every lane arrives for itself, and nothing else is another.

Each configuration of Hopper's kernels runs with whole tiles, with its last schedule, which shares
them where it can, and with that of two blocks, which have several tiles one after the other, in
float16; every ring goes round. Each form of w8a16.cu runs with its last, in float16 and bfloat16,
with scales of one byte and, where it takes them, of float16. Results are compared with the float64
product; tests do that at length, this is so that a tool's silence is not that of kernels that did
nothing.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from halfweight.kernels.cuda import backend as sm80
from halfweight.kernels.cuda import driver, schedule
from halfweight.kernels.cuda import tiles as sm80_tiles
from halfweight.kernels.cuda.card import Card
from halfweight.kernels.cuda.schedule import Plan
from halfweight.kernels.hopper import backend as cuda
from halfweight.kernels.hopper import gemv, tiles
from halfweight.kernels.hopper.tiles import Config, Int8, Small
from halfweight.quantization.numerics import QuantizedTensor, dequantize, quantize
from halfweight.quantization.scheme import Scheme

DEVICE = torch.device("cuda")
OUT_FEATURES, IN_FEATURES, GROUP_SIZE = 333, 1536, 128
LONG_FEATURES = 4224
"""No stage of Hopper's kernels divides it, and it has more of them than a ring."""
FEW_MULTIPROCESSORS = 2
MOST_ERROR = {torch.float16: 1e-3, torch.bfloat16: 4e-3}
BY_LANE = (
    ("barrier_init(empty + 8 * i, CONSUMERS / 32);", "barrier_init(empty + 8 * i, CONSUMERS);"),
    ("if (lane == 0) barrier_arrive(", "barrier_arrive("),
    (
        "barrier_init(s.empty + 8 * threadIdx.x, WARPS);",
        "barrier_init(s.empty + 8 * threadIdx.x, CONSUMERS);",
    ),
    (
        "barrier_init(place.empty(), 4 * WGS * CLUSTER);",
        "barrier_init(place.empty(), 128 * WGS * CLUSTER);",
    ),
    ("if (lane < CLUSTER)", "for (lane = 0; lane < CLUSTER; ++lane)"),
)
"""What becomes of the texts of Hopper's kernels where every lane arrives for itself."""

Fill = Callable[[Tensor, QuantizedTensor, Tensor], Tensor]
"""(x [M, K], weight, y [M, N]) -> float64 x as it is multiplied, y filled."""


@dataclass(frozen=True)
class Launch:
    """One launch of a form of a kernel; `text` is what is compiled for it, and for which device."""

    name: str
    tokens: int
    text: tuple[str, str]
    fill: Fill
    dtype: torch.dtype = torch.float16
    scale_format: str = "grid8"
    rows: int = OUT_FEATURES
    columns: int = IN_FEATURES

    @property
    def kind(self) -> tuple[tuple[int, int], str]:
        """Of its weight: [N, K], and the format of its scales."""
        return (self.rows, self.columns), self.scale_format


def hopper(card: Card) -> Iterator[Launch]:
    """hopper_small.cu, hopper_large.cu, hopper_int8.cu."""
    for config in (*tiles.SMALL, *tiles.LARGE, *tiles.INT8):
        tokens = config.tokens if isinstance(config, Small) else config.tokens + 1
        text = cuda.source(config, config.groups(GROUP_SIZE), torch.float16), cuda.ARCHITECTURE
        for plan in hopper_plans(config, tokens, card):
            name = f"{config.file} {config} {plan.whole_waves}x{plan.num_workers}"
            fill = partial(fill_on_hopper, plan)
            yield Launch(name, tokens, text, fill, columns=LONG_FEATURES)


def hopper_plans(config: Config, tokens: int, card: Card) -> list[Plan[Config]]:
    """Whole tiles on the card, the last schedule, and that of few blocks, where they suffice."""
    sizes = tokens, OUT_FEATURES, LONG_FEATURES
    found = tiles.plans(config, *sizes, card)
    few = tiles.plans(config, *sizes, replace(card, multiprocessors=FEW_MULTIPROCESSORS))
    return [found[0], found[-1], *few[-1:]]


def one_or_two(card: Card) -> Iterator[Launch]:
    """hopper_gemv.cu, with so many rows that every block fills its ring again."""
    for tokens in gemv.TOKENS:
        form = gemv.Form(tokens, IN_FEATURES, IN_FEATURES // GROUP_SIZE)
        rows = card.multiprocessors * form.rows * (form.stages + 1) + 5
        for dtype in MOST_ERROR:
            text = gemv.source(form.defines, dtype), gemv.ARCHITECTURE
            name = f"hopper_gemv.cu {form} {dtype}"
            yield Launch(name, tokens, text, partial(fill_by_gemv, form), dtype, rows=rows)


def fill_by_gemv(form: gemv.Form, x: Tensor, weight: QuantizedTensor, y: Tensor) -> Tensor:
    """By hopper_gemv.cu, with a bias of zeros at an odd address."""
    assert weight.exponents is not None
    bias = torch.zeros(y.shape[1] + 1, dtype=y.dtype, device=DEVICE)[1:]
    gemv.launch(form, x, weight.packed, weight.scales, weight.exponents, bias, y)
    return x.double()


def fill_on_hopper(plan: Plan[Config], x: Tensor, weight: QuantizedTensor, y: Tensor) -> Tensor:
    """By a plan of Hopper's kernels."""
    config, operand, steps, values = plan.config, x, None, x.double()
    if isinstance(config, Int8):
        operand, steps = cuda.rounded_for(config, x)
        by_column = steps[1, :, : len(x)].double().T.repeat_interleave(config.k_bytes, dim=1)
        values = operand.double() * by_column[:, : x.shape[1]]
    parts = (weight.packed, weight.scales, weight.exponents, None)
    cuda._launch(operand, *parts, y, plan, steps)
    return values


def ampere(card: Card) -> Iterator[Launch]:
    """w8a16.cu; a tile's tokens and one more, so that there are two, one almost empty."""
    run = sm80_tiles.run_of(GROUP_SIZE, IN_FEATURES // GROUP_SIZE)
    architecture = sm80._architecture(0)
    for shape in sm80_tiles.SHAPES:
        form = sm80_tiles.form_on(card, shape)
        plan = schedule.plans(form, shape.tokens + 1, OUT_FEATURES, IN_FEATURES, card)[-1]
        for dtype in MOST_ERROR:
            for scale_format, scales in (("grid8", torch.uint8), ("float16", torch.float16)):
                if shape.scaled and not sm80_tiles.may_scale(run, scale_format == "grid8"):
                    continue
                text = sm80.source(form, run, scales, dtype), architecture
                name = f"w8a16.cu {shape.name} {dtype} {scale_format}"
                fill = partial(fill_on_ampere, plan)
                yield Launch(name, shape.tokens + 1, text, fill, dtype, scale_format)


def fill_on_ampere(
    plan: Plan[sm80_tiles.Form], x: Tensor, weight: QuantizedTensor, y: Tensor
) -> Tensor:
    """By a plan of w8a16.cu."""
    sm80.launch(x, weight.packed, weight.scales, weight.exponents, None, y, plan)
    return x.double()


FAMILIES = (hopper, one_or_two, ampere)


def error(launch: Launch, weight: QuantizedTensor) -> float:
    """Relative error of a launch, on fresh input and a poisoned result."""
    x = torch.randn(launch.tokens, launch.columns, device=DEVICE).to(launch.dtype)
    y = torch.full((launch.tokens, launch.rows), torch.nan, device=DEVICE, dtype=launch.dtype)
    expected = launch.fill(x, weight, y) @ dequantize(weight).double().T
    return float((y.double() - expected).norm() / expected.norm())


def compile_all(launches: Sequence[Launch]) -> None:
    """Machine code of all into the cache folder, where it is not there."""
    texts = {launch.text for launch in launches}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda text: driver.cubin(*text), texts))
    print(f"{len(texts)} forms compiled", flush=True)


def by_lane(source: Callable[..., str]) -> Callable[..., str]:
    """The same texts with BY_LANE."""

    def changed(*names: object) -> str:
        text = source(*names)
        for old, new in BY_LANE:
            text = text.replace(old, new)
        return text

    return changed


def run(only: str) -> None:
    """All launches whose names contain `only`."""
    card = driver.card_of(0)
    launches = [each for family in FAMILIES for each in family(card) if only in each.name]
    compile_all(launches)
    kinds = {launch.kind for launch in launches}
    weights = {
        (sizes, scale_format): quantize(
            torch.randn(sizes, device=DEVICE), Scheme(GROUP_SIZE, scale_format)
        )
        for sizes, scale_format in kinds
    }
    for launch in launches:
        result = error(launch, weights[launch.kind])
        print(f"{launch.name}: {result:.1e}", flush=True)
        assert result < MOST_ERROR[launch.dtype], launch.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="launches whose names contain this")
    parser.add_argument("--arrive-by-lane", action="store_true", help="as racecheck wants it")
    options = parser.parse_args()
    with ExitStack() as stack:
        if options.arrive_by_lane:
            for module in (cuda, gemv):
                patched = mock.patch.object(module, "source", by_lane(module.source))
                stack.enter_context(patched)
        run(options.only)


if __name__ == "__main__":
    main()

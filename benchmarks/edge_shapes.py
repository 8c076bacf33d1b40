"""Every tile of the Hopper kernels on a shape that no tile divides, for compute-sanitizer.

    compute-sanitizer --tool memcheck python benchmarks/edge_shapes.py
    compute-sanitizer --tool racecheck python benchmarks/edge_shapes.py

Each configuration runs with its first and its last schedule (whole tiles, and shared ones where it
has them). Results are compared with the float64 product; tests do that at length, this is so that
a tool's silence is not that of kernels that did nothing.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from halfweight.kernels.cuda import driver
from halfweight.kernels.hopper import backend as cuda
from halfweight.kernels.hopper import tiles
from halfweight.kernels.hopper.tiles import Config, Int8, Plan, Small
from halfweight.quantization.numerics import QuantizedTensor, dequantize, quantize
from halfweight.quantization.scheme import Scheme

DEVICE = torch.device("cuda")
OUT_FEATURES, IN_FEATURES, GROUP_SIZE = 333, 1536, 128
MOST_ERROR = 1e-3


def num_tokens(config: Config) -> int:
    """One more than a tile has, or as many where there is but one tile."""
    return config.tokens if isinstance(config, Small) else config.tokens + 1


def error(plan: Plan, tensor: QuantizedTensor, exact: Tensor) -> float:
    """Relative error of one launch, on fresh input and a poisoned result."""
    config = plan.config
    x = torch.randn(num_tokens(config), IN_FEATURES, device=DEVICE).half()
    operand, steps, values = x, None, x.double()
    if isinstance(config, Int8):
        operand, steps = cuda.rounded_for(config, x)
        by_column = steps[1, :, : len(x)].double().T.repeat_interleave(config.k_bytes, dim=1)
        values = operand.double() * by_column[:, :IN_FEATURES]
    y = torch.full((len(x), OUT_FEATURES), torch.nan, device=DEVICE).half()
    cuda._launch(operand, tensor.packed, tensor.scales, tensor.exponents, None, y, plan, steps)
    expected = values @ exact.T
    return float((y.double() - expected).norm() / expected.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="configurations whose names contain this")
    options = parser.parse_args()
    scheme = Scheme(GROUP_SIZE, "grid8")
    tensor = quantize(torch.randn(OUT_FEATURES, IN_FEATURES, device=DEVICE), scheme)
    exact = dequantize(tensor).double()
    card = driver.card_of(0)
    for config in (*tiles.SMALL, *tiles.LARGE, *tiles.INT8):
        if options.only not in str(config):
            continue
        sizes = num_tokens(config), OUT_FEATURES, IN_FEATURES, card
        found = tiles.plans(config, *sizes)
        for plan in (found[0], found[-1]):
            result = error(plan, tensor, exact)
            print(f"{config} {plan.whole_waves}x{plan.num_workers}: {result:.1e}", flush=True)
            assert result < MOST_ERROR, plan


if __name__ == "__main__":
    main()

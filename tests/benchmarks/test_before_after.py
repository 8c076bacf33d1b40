"""The pair of kernels that docs/kernels.md shows: both right, one with half the bytes."""

import runpy
from pathlib import Path

import torch

from halfweight.quantization.numerics import dequantize, quantize
from halfweight.quantization.scheme import Scheme

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_both_kernels_compute_their_product():
    example = runpy.run_path(str(ROOT / "examples/before_after.py"))
    weight = torch.randn(40, 1152, device=DEVICE).half()
    x = torch.randn(1152, device=DEVICE).half()
    (before, bytes_before), (after, bytes_after) = example["products"](x, weight)
    exact = weight.double() @ x.double()
    rounded = dequantize(quantize(weight, Scheme())).double() @ x.double()
    assert (before.double() - exact).norm() / exact.norm() < 1e-3
    assert (after.double() - rounded).norm() / rounded.norm() < 1e-3
    assert bytes_before == 40 * 1152 * 2
    assert bytes_after == 40 * 1152 + 40 * 9 + 40


def test_the_page_shows_the_code_that_runs():
    code = (ROOT / "examples/before_after.py").read_text()
    page = (ROOT / "docs/kernels.md").read_text()
    for name in ("before", "after"):
        start = code.index(f"@triton.jit\ndef {name}(")
        kernel = code[start : code.index("\n\n\n", start)]
        assert kernel in page

"""hopper_gemv.cu without a GPU: in an emulator, and what it takes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from halfweight.kernels.hopper import gemv

EMULATOR = Path(__file__).parents[1] / "helpers" / "emulated_gpu.hpp"
ENTRY = """
static Operands operands;
extern "C" int run(const Operands* o, int blocks, int threads, int bytes, unsigned seed) {
    operands = *o;
    return launch([] { w8a16_gemv(operands); }, blocks, threads, bytes, seed);
}
"""
F16, BF16 = torch.float16, torch.bfloat16
MULTIPROCESSOR_BYTES = 233472

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """(form, dtype, changes of the text) -> the kernel on the CPU."""
    folder, built = tmp_path_factory.mktemp("gemv"), {}

    def build(form, dtype, changes=()):
        defines = form.defines(dtype)
        key = (*defines.items(), changes)
        if key not in built:
            text = gemv.source(defines)
            begin, end = text.index("// Instructions that"), text.index("// y[M, N] =")
            text = text[:begin] + EMULATOR.read_text() + text[end:] + ENTRY
            for old, new in changes:
                assert old in text
                text = text.replace(old, new)
            path = folder / f"{len(built)}.cpp"
            path.write_text(text)
            command = ["g++", "-O1", "-std=c++17", "-w", "-shared", "-fPIC", "-o"]
            subprocess.run([*command, path.with_suffix(".so"), path], check=True)
            built[key] = ctypes.CDLL(str(path.with_suffix(".so"))).run
        return built[key]

    return build


def operands(sizes, group_size, dtype):
    """x, packed, scales, exponents, bias, and the product in float64."""
    tokens, rows, columns = sizes
    x = torch.randn(tokens, columns).to(dtype)
    packed = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    scales = torch.randint(1, 256, (rows, columns // group_size), dtype=torch.uint8)
    exponents = torch.randint(-14, -10, (rows,), dtype=torch.int8)
    factors = torch.ldexp(scales.double(), exponents.double()[:, None])
    bias = torch.randn(rows).to(dtype)
    weight = (packed.double() - 128) * factors.repeat_interleave(group_size, 1)
    return x, packed, scales, exponents, bias, x.double() @ weight.T + bias.double()


def product(kernel, form, workers, x, packed, scales, exponents, bias, seed=0):
    """The emulated product; y begins as NaN, shared memory as noise."""
    y = torch.full((x.shape[0], packed.shape[0]), torch.nan, dtype=x.dtype)
    given = gemv.operands_of(form, workers, x, packed, scales, exponents, bias, y)
    assert kernel(ctypes.byref(given), workers, gemv.THREADS, form.shared_bytes, seed) == 0
    return y


def error(y, expected):
    return ((y.double() - expected).norm() / expected.norm()).item()


@needs_gxx
@pytest.mark.parametrize(
    ("sizes", "group_size", "workers", "dtype"),
    [
        ((1, 48, 4096), 128, 2, F16),
        ((1, 33, 14336), 128, 3, BF16),
        ((2, 45, 4096), 256, 1, F16),
        ((3, 80, 1024), 64, 3, F16),
        ((4, 48, 8192), 512, 2, BF16),
        ((1, 7, 28672), 128, 5, F16),
        ((2, 16, 576), 32, 2, F16),
    ],
)
def test_the_product_is_the_exact_one_rounded(emulated, sizes, group_size, workers, dtype):
    *given, expected = operands(sizes, group_size, dtype)
    form = gemv.form_for(sizes[0], sizes[2], sizes[2] // group_size, MULTIPROCESSOR_BYTES)
    y = product(emulated(form, dtype), form, workers, *given)
    assert y.isfinite().all()
    assert error(y, expected) < (3e-4 if dtype == F16 else 2.4e-3)

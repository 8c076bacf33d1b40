"""hopper_gemv.cu without a GPU: in an emulator, and what it takes."""

from __future__ import annotations

import ctypes
import subprocess
from functools import cache

import emulated_gpu
import pytest
import torch
from emulated_gpu import error, needs_gxx, needs_nvcc, operands

from halfweight.kernels.hopper import gemv

ENTRY = """
static Operands operands;
extern "C" int run(const Operands* o, int blocks, int threads, int bytes, unsigned seed) {
    operands = *o;
    return launch([] { w8a16_gemv(operands); }, blocks, threads, bytes, seed);
}
"""
F16, BF16, GRID8 = torch.float16, torch.bfloat16, torch.uint8
MOST_ERROR = {F16: 6e-4, BF16: 4.5e-3}
"""Half a step of each result, were all at their worst, and a tenth of it for x in two bytes."""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """(form, dtype, changes of the text) -> the kernel on the CPU."""

    @cache
    def build(names, dtype, changes):
        text, folder = gemv.source(dict(names), dtype), tmp_path_factory.mktemp("gemv")
        return emulated_gpu.compiled(text, "// Bytes at any address", ENTRY, changes, folder)

    return lambda form, dtype, changes=(): build(tuple(form.defines.items()), dtype, changes)


def product(kernel, form, workers, x, packed, scales, exponents, bias, seed=0):
    """The emulated product, NaN where it is not written or all wait for ever."""
    y = torch.full((x.shape[0], packed.shape[0]), torch.nan, dtype=x.dtype)
    given = gemv.operands_of(form, workers, x, packed, scales, exponents, bias, y)
    ended = kernel(ctypes.byref(given), workers, gemv.THREADS, form.shared_bytes, seed) == 0
    return y if ended else torch.full_like(y, torch.nan)


CASES = [
    # tokens, rows, columns; group size; blocks
    ((1, 48, 4096), 128, 2, F16),
    ((1, 33, 14336), 128, 3, BF16),
    ((2, 45, 4096), 256, 1, F16),
    ((2, 24, 8192), 8192, 2, BF16),
    ((1, 7, 28672), 128, 5, F16),
    ((2, 17, 576), 32, 2, F16),
]


@needs_gxx
@pytest.mark.parametrize(("sizes", "group_size", "workers", "dtype"), CASES)
def test_the_product_is_the_exact_one_rounded(emulated, sizes, group_size, workers, dtype):
    *given, expected = operands(sizes, group_size, GRID8, dtype)
    form = gemv.form_for(sizes[0], sizes[2], sizes[2] // group_size)
    for seed in range(2):
        y = product(emulated(form, dtype), form, workers, *given, seed=seed)
        assert y.isfinite().all()
        assert error(y, expected) < MOST_ERROR[dtype]


@needs_gxx
def test_numbers_of_very_different_size_keep_their_products(emulated):
    """Sixteen columns share a step: a number a million times the others blinds no other sixteen."""
    x, packed, scales, exponents, _, _ = operands((1, 16, 4096), 128, GRID8, F16)
    x = x * 1e-3
    x[0, 1000] = 1000.0
    factors = torch.ldexp(scales.double(), exponents.double()[:, None])
    weight = (packed.double() - 128) * factors.repeat_interleave(128, 1)
    packed[:, 1000] = 128  # the large one meets zeros
    weight[:, 1000] = 0
    x_near = x.double().clone()
    x_near[0, 992:1008] = 0  # these round to nothing beside it
    form = gemv.form_for(1, 4096, 32)
    y = product(emulated(form, F16), form, 2, x, packed, scales, exponents, None)
    assert error(y, x_near @ weight.T) < 1e-3


def moved(tensor, by):
    """The same numbers so many elements behind an aligned address."""
    room = torch.empty(tensor.numel() + by + 8, dtype=tensor.dtype)
    return room[by : by + tensor.numel()].view(tensor.shape).copy_(tensor)


@needs_gxx
@pytest.mark.parametrize("by", [1, 2, 3])
def test_codes_and_ends_of_rows_lie_at_any_address(emulated, by):
    x, packed, *ends, expected = operands((1, 33, 160), 32, GRID8, F16)
    form = gemv.form_for(1, 160, 5)
    y = product(emulated(form, F16), form, 2, x, packed, *(moved(t, by) for t in ends))
    assert error(y, expected) < MOST_ERROR[F16]


@needs_gxx
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e38])
def test_what_is_no_number_stays_none(emulated, value):
    """Infinite numbers, and those beyond float32 in a sum, are infinite or none, not 0."""
    _, packed, scales, exponents, _, _ = operands((1, 16, 4096), 128, GRID8, BF16)
    x = torch.zeros(1, 4096, dtype=BF16)
    x[0, 77] = value
    packed[:, 77], scales[:, 0] = 255, 255
    form = gemv.form_for(1, 4096, 32)
    y = product(emulated(form, BF16), form, 2, x, packed, scales, exponents, None)
    assert not y.isfinite().any()
    assert value == 1e38 or y.isnan().all()  # what the sign of an infinite number was is lost


@needs_gxx
@pytest.mark.parametrize("value", [0.0, 1e-33, 1e-29, 1e-6])
def test_the_smallest_numbers_keep_their_size(emulated, value):
    _, packed, scales, exponents, _, _ = operands((1, 16, 4096), 128, GRID8, BF16)
    x = torch.zeros(1, 4096, dtype=BF16)
    x[0, 77], packed[:, 77] = value, 255
    form = gemv.form_for(1, 4096, 32)
    y = product(emulated(form, BF16), form, 2, x, packed, scales, exponents, None)
    expected = x[0, 77].double() * 127 * torch.ldexp(scales[:, 0].double(), exponents.double())
    assert torch.allclose(y[0].double(), expected, rtol=2e-2, atol=0)


@needs_gxx
@pytest.mark.parametrize(
    "change",
    [
        ("arrive_when_copied(full);", "barrier_arrive(full);"),
        ("barrier_wait(s.full + 8 * stage, phase);", ""),
        ("named_sync<1, CONSUMERS>();", ""),
        ("barrier_wait(s.empty + 8 * stage, phase ^ 1);", ""),
    ],
    ids=["codes not waited for", "no wait", "warps do not meet", "stages filled too soon"],
)
def test_the_emulator_sees(emulated, change):
    sizes, group_size, workers, dtype = (1, 96, 4096), 128, 1, F16
    *given, expected = operands(sizes, group_size, GRID8, dtype)
    form = gemv.form_for(sizes[0], sizes[2], sizes[2] // group_size)
    y = product(emulated(form, dtype, changes=(change,)), form, workers, *given)
    assert not error(y, expected) < 3e-2


@pytest.mark.parametrize("columns", [576, 2048, 3072, 4096, 5120, 8192, 11008, 14336, 28672])
def test_the_ring_fits_and_holds_what_the_memory_needs(columns):
    for tokens in gemv.TOKENS:
        form = gemv.form_for(tokens, columns, columns // 32)
        if form is None:
            assert tokens * columns > gemv.MOST_SEGMENTS * gemv.COLUMNS
            continue
        assert form.shared_bytes <= gemv.MOST_SHARED_BYTES
        assert form.stages == gemv.MOST_STAGES or form.stages * form.stage_bytes >= 100 << 10


def test_more_tokens_and_longer_rows_are_for_others():
    assert gemv.form_for(3, 4096, 32) is None
    assert gemv.form_for(1, 1 << 16, 512) is None


@needs_nvcc
@pytest.mark.parametrize(("tokens", "segments"), [(1, 1), (1, 4), (2, 1), (2, 4), (1, 7)])
def test_nothing_spills(tokens, segments, tmp_path):
    path = tmp_path / "kernel.cu"
    rows = gemv.rows_of(segments * gemv.COLUMNS)
    path.write_text(gemv.source(gemv.names_of(tokens, segments, rows), BF16))
    command = ["nvcc", "-cubin", "-std=c++17", f"-arch={gemv.ARCHITECTURE}", "-Xptxas", "-v", "-o"]
    done = subprocess.run(
        [*command, path.with_suffix(".cubin"), path], capture_output=True, text=True, check=True
    )
    assert "0 bytes stack frame, 0 bytes spill stores" in done.stderr

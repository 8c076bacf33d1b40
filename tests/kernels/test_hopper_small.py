"""hopper_small.cu without a GPU: in an emulator, over its forms and schedules."""

from __future__ import annotations

import ctypes
from functools import cache

import emulated_gpu
import pytest
import torch
from emulated_gpu import error, needs_gxx, operands

from halfweight.kernels.cuda import driver
from halfweight.kernels.cuda.card import Card
from halfweight.kernels.hopper import backend
from halfweight.kernels.hopper.tiles import SMALL, Small, plans

FEW = Card(5, 232448, 233472, 50 << 20, 3_352_000, 1980, 1300)
ENTRY = """
static TensorMap maps[2];
static Problem problem;
extern "C" int run(const TensorMap* w, const TensorMap* x, const Problem* p, int blocks,
                   int threads, int bytes, unsigned seed) {
    maps[0] = *w, maps[1] = *x, problem = *p;
    return launch([] { w8a16_small(maps[0], maps[1], problem); }, blocks, threads, bytes, seed);
}
"""
MEMORY = ("extern __shared__ u8 raw[];", "u8* raw = shared_memory();")
F16, BF16, GRID8 = torch.float16, torch.bfloat16, torch.uint8
MOST_ERROR = {F16: 3e-4, BF16: 2.4e-3}
"""Half a step of each result, were all at their worst."""


class TensorMap(ctypes.Structure):
    """`TensorMap` of emulated_gpu.hpp."""

    _fields_ = [
        ("at", ctypes.c_void_p),
        *((name, ctypes.c_uint64 * 3) for name in ("sizes", "strides")),
        ("box", ctypes.c_uint32 * 3),
        ("element", ctypes.c_uint32),
    ]


def tensor_map(tensor, rows, boxes):
    """A matrix [M, K] as [rows, K / line, line] for boxes of `boxes` lines of 128 bytes."""
    size, (count, columns) = tensor.element_size(), tensor.shape
    line = 128 // size
    sizes, strides = (line, count, columns // line), (size, columns * size, 128)
    return TensorMap(tensor.data_ptr(), sizes, strides, (line, rows, boxes), size)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """(form, groups, dtype, changes of the text) -> the kernel on the CPU."""

    @cache
    def build(form, groups, dtype, changes=()):
        text, folder = backend.source(form, groups, dtype), tmp_path_factory.mktemp("small")
        changes = (MEMORY, *changes)
        return emulated_gpu.compiled(text, "// A product as every", ENTRY, changes, folder)

    return build


def product(kernel, plan, x, packed, scales, exponents, bias, seed=0):
    """The emulated product; NaN where it is not written or all wait for ever."""
    form = plan.config
    y = torch.full((x.shape[0], packed.shape[0]), torch.nan, dtype=x.dtype)
    partials = torch.full((plan.num_workers * form.partial_floats,), torch.nan)
    flags = torch.zeros(plan.num_workers, dtype=torch.int32)
    start = driver.Start(None, None, -1, partials, flags)
    problem = driver.problem_of(plan, start, x, scales, exponents, bias, y)
    boxes = form.k_bytes // 128
    maps = tensor_map(packed, form.rows, boxes), tensor_map(x, form.tokens, 2 * boxes)
    given = [ctypes.byref(each) for each in (*maps, problem)]
    ended = kernel(*given, plan.num_workers, form.threads, form.shared_bytes, seed) == 0
    return y if ended and not flags.any() else torch.full_like(y, torch.nan)


def schedules(form, sizes):
    """Plans of every kind for five blocks: whole tiles, a shared rest, all tiles shared."""
    return {plan.whole_waves: plan for plan in plans(form, *sizes, FEW)}.values()


CASES = [
    # tokens, rows, columns; group size; dtype
    ((5, 70, 1152), 128, F16),
    ((3, 205, 1280), 64, BF16),
    ((8, 150, 1792), 256, F16),
    ((11, 75, 1152), 1152, BF16),
    ((16, 107, 1408), 128, F16),
    ((9, 130, 1280), 64, F16),
    ((16, 260, 1152), 128, BF16),
    ((17, 70, 1152), 128, BF16),
    ((32, 130, 1024), 64, F16),
    ((27, 270, 1280), 256, F16),
    ((61, 150, 1152), 128, F16),
]
"""One for each form, in their order."""


@needs_gxx
@pytest.mark.parametrize(("form", "case"), list(zip(SMALL, CASES, strict=True)), ids=str)
def test_the_product_is_the_exact_one_rounded(emulated, form: Small, case):
    sizes, group_size, dtype = case
    *given, expected = operands(sizes, group_size, GRID8, dtype)
    kernel = emulated(form, form.groups(group_size), dtype)
    found = schedules(form, sizes)
    assert found
    for plan in found:
        y = product(kernel, plan, *given, seed=plan.whole_waves)
        assert y.isfinite().all(), plan
        assert error(y, expected) < MOST_ERROR[dtype], plan


@needs_gxx
@pytest.mark.parametrize("by", [1, 2, 3])
def test_codes_lie_at_any_address(emulated, by):
    """Of a row and a stage four, in two words or three."""
    form = SMALL[0]
    x, packed, scales, *ends, expected = operands((4, 33, 1152), 128, GRID8, F16)
    room = torch.empty(scales.numel() + by + 8, dtype=torch.uint8)
    moved = room[by : by + scales.numel()].view(scales.shape).copy_(scales)
    (plan, *_) = schedules(form, (4, 33, 1152))
    y = product(emulated(form, 1, F16), plan, x, packed, moved, *ends)
    assert error(y, expected) < MOST_ERROR[F16]


@needs_gxx
@pytest.mark.parametrize(
    "change",
    [
        ("arrive_when_copied(full + 8 * stage);", "barrier_arrive(full + 8 * stage);"),
        ("barrier_wait(full + 8 * stage, phase);", ""),
        ("if (lane == 0) barrier_arrive(empty + 8 * stage);", ""),
        ("k * KB >> shift, end);", "0, end);"),
    ],
    ids=["codes not waited for", "no wait", "stages are not released", "codes of the first stage"],
)
def test_the_emulator_sees(emulated, change):
    form, sizes = SMALL[2], (8, 150, 1792)
    *given, expected = operands(sizes, 128, GRID8, F16)
    (plan, *_) = schedules(form, sizes)
    y = product(emulated(form, 1, F16, changes=(change,)), plan, *given)
    assert not error(y, expected) < 1e-2

"""Products by a form of hopper_small.cu or hopper_large.cu on the CPU, in emulated_gpu.hpp."""

from __future__ import annotations

import ctypes
from functools import cache

import emulated_gpu
import torch

from halfweight.kernels.cuda import driver
from halfweight.kernels.cuda.card import Card
from halfweight.kernels.hopper import backend
from halfweight.kernels.hopper.tiles import Small, plans

FEW = Card(5, 232448, 233472, 50 << 20, 3_352_000, 1980, 1300)
ENTRY = """
static TensorMap maps[2];
static Problem problem;
extern "C" int run(const TensorMap* w, const TensorMap* x, const Problem* p, int blocks,
                   int threads, int bytes, unsigned seed) {
    maps[0] = *w, maps[1] = *x, problem = *p;
    return launch([] { %s(maps[0], maps[1], problem); }, blocks, threads, bytes, seed);
}
"""
MEMORY = ("extern __shared__ u8 raw[];", "u8* raw = shared_memory() + 1;")
"""Begins at an address that needs all of the alignment, as on a GPU never at 0."""
MOST_ERROR = {torch.float16: 3e-4, torch.bfloat16: 2.4e-3}
"""Half a step of each result, were all at their worst."""


class TensorMap(ctypes.Structure):
    """`TensorMap` of emulated_gpu.hpp."""

    _fields_ = [
        ("at", ctypes.c_void_p),
        *((name, ctypes.c_uint64 * 3) for name in ("sizes", "strides")),
        ("box", ctypes.c_uint32 * 3),
        ("element", ctypes.c_uint32),
    ]


def lines_map(tensor, rows, boxes):
    """A matrix [M, K] as [K / line, M, line], for boxes of [boxes, rows] lines of 128 bytes."""
    size, (count, columns) = tensor.element_size(), tensor.shape
    line = 128 // size
    sizes, strides = (line, count, columns // line), (size, columns * size, 128)
    return TensorMap(tensor.data_ptr(), sizes, strides, (line, rows, boxes), size)


def rows_map(tensor, columns, rows):
    """A matrix [M, K] as it is, for boxes of [rows, columns]."""
    size, (count, width) = tensor.element_size(), tensor.shape
    sizes, strides = (width, count, 1), (size, width * size, 0)
    return TensorMap(tensor.data_ptr(), sizes, strides, (columns, rows, 1), size)


def maps(plan, packed, x):
    """Of the weights and the activations, as backend.py makes them."""
    form = plan.config
    if isinstance(form, Small):
        boxes = form.k_bytes // 128
        return lines_map(packed, form.rows, boxes), lines_map(x, form.tokens, 2 * boxes)
    return rows_map(packed, form.columns, plan.rows), rows_map(x, 64, form.tokens)


def kernels(tmp_path_factory):
    """(form, groups, dtype, changes of the text) -> the kernel on the CPU, each compiled once."""

    @cache
    def build(form, groups, dtype, changes=()):
        return _compiled(form, groups, dtype, changes, tmp_path_factory.mktemp("hopper"))

    return build


def _compiled(form, groups, dtype, changes, folder):
    text = backend.source(form, groups, dtype)
    fixed = [MEMORY]
    if not isinstance(form, Small):
        kind = "bf16" if dtype == torch.bfloat16 else "f16"
        fixed.append((backend._wgmma(form, kind), ""))  # the emulator has its own
    entry = ENTRY % form.entry.decode()
    return emulated_gpu.compiled(text, "// A product as every", entry, (*fixed, *changes), folder)


def schedules(form, sizes):
    """Plans of every kind for five blocks: whole tiles, a shared rest, all tiles shared."""
    return {plan.whole_waves: plan for plan in plans(form, *sizes, FEW)}.values()


def product(kernel, plan, x, packed, scales, exponents, bias, seed=0):
    """The emulated product; NaN where it is not written, or all of it where all wait for ever."""
    form = plan.config
    y = torch.full((x.shape[0], packed.shape[0]), torch.nan, dtype=x.dtype)
    partials = torch.full((plan.num_workers * form.partial_floats,), torch.nan)
    flags = torch.zeros(plan.num_workers, dtype=torch.int32)
    start = driver.Start(None, None, -1, partials, flags)
    problem = driver.problem_of(plan, start, x, scales, exponents, bias, y)
    given = [ctypes.byref(each) for each in (*maps(plan, packed, x), problem)]
    ended = kernel(*given, plan.num_workers, form.threads, form.shared_bytes, seed) == 0
    return y if ended and not flags.any() else torch.full_like(y, torch.nan)

"""hopper_large.cu without a GPU: forms that need no cluster in an emulator, where products of the
tensor cores are made as late as they may be.
"""

from __future__ import annotations

import pytest
import torch
from emulated_gpu import error, needs_gxx, operands
from emulated_hopper import MOST_ERROR, kernels, product, schedules

from halfweight.kernels.hopper.tiles import LARGE, Large

F16, BF16, GRID8 = torch.float16, torch.bfloat16, torch.uint8
ALONE = [form for form in LARGE if form.cluster == form.split == 1]
ROUNDED_TWICE = 1.42
"""A weight is rounded as well, by as much as a result: the square root of two."""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return kernels(tmp_path_factory)


CASES = [
    # form; tokens, rows, columns; group size; dtype
    (ALONE[0], (70, 150, 896), 128, F16),
    (ALONE[0], (33, 77, 672), 32, BF16),
    (ALONE[1], (40, 205, 800), 32, F16),
    (ALONE[2], (64, 300, 704), 64, BF16),
    (ALONE[3], (130, 140, 608), 608, BF16),
    (ALONE[4], (100, 205, 512), 256, F16),
    (ALONE[5], (257, 40, 704), 64, F16),
    (ALONE[5], (200, 150, 640), 128, BF16),
    (ALONE[5], (65, 40, 544), 32, F16),
]


@needs_gxx
def test_every_form_that_needs_no_cluster_has_a_case():
    assert {form for form, *_ in CASES} == set(ALONE)


@needs_gxx
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_product_is_the_exact_one_rounded(emulated, case):
    form, sizes, group_size, dtype = case
    *given, expected = operands(sizes, group_size, GRID8, dtype)
    kernel = emulated(form, form.groups(group_size), dtype)
    found = schedules(form, sizes)
    assert found
    for plan in found:
        y = product(kernel, plan, *given, seed=plan.whole_waves)
        assert y.isfinite().all(), plan
        assert error(y, expected) < ROUNDED_TWICE * MOST_ERROR[dtype], plan


FAULTS = [
    ("        wgmma_wait<1>();\n", ""),
    ("        held = taken;\n", "        held = taken;\n        release(), held = 0;\n"),
    ("        barrier_wait(here.full(), here.phase);\n        read<0>", "        read<0>"),
    ("arrive_when_copied(here.full());", "barrier_arrive(here.full());"),
    ("k == s.k_begin || codes_change(k, shift)", "k == s.k_begin"),
    ("(begin[h] + group & 3)", "(begin[h] & 3)"),
]


@needs_gxx
@pytest.mark.parametrize(
    "change",
    FAULTS,
    ids=[
        "fragments overwritten",
        "released before multiplied",
        "read before copied",
        "codes not waited for",
        "codes of the first group",
        "codes a place before",
    ],
)
def test_the_emulator_sees(emulated, change):
    form: Large = ALONE[5]
    sizes, group_size = (200, 70, 640), 128
    *given, expected = operands(sizes, group_size, GRID8, F16)
    (plan, *_) = schedules(form, sizes)
    y = product(emulated(form, 1, F16, changes=(change,)), plan, *given)
    assert not error(y, expected) < 1e-2

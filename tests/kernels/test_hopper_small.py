"""hopper_small.cu without a GPU: in an emulator, over its forms and schedules."""

from __future__ import annotations

import pytest
import torch
from emulated_gpu import error, needs_gxx, operands
from emulated_hopper import MOST_ERROR, kernels, product, schedules

from halfweight.kernels.hopper.tiles import SMALL, Small

F16, BF16, GRID8 = torch.float16, torch.bfloat16, torch.uint8


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return kernels(tmp_path_factory)


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

"""The definition itself: error bounds, edge rules, exactness of grid8 in bfloat16."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from schemes import all_schemes

from halfweight.errors import CheckpointError
from halfweight.quantization import numerics
from halfweight.quantization.numerics import (
    MAX_EXPONENT,
    MIN_EXPONENT,
    dequantize,
    grid8_from_scales,
    quantize,
    scales_float32,
)
from halfweight.quantization.scheme import Scheme

ROUNDING = 1 + 2**-15
"""The float32 reciprocal can move a weight this far past half a scale."""


def errors_in_scales(weight, tensor):
    error = (dequantize(tensor) - weight).abs().reshape(*tensor.scales.shape, -1)
    return error / scales_float32(tensor.scales, tensor.exponents).unsqueeze(-1)


@pytest.mark.parametrize("scheme", all_schemes(), ids=str)
def test_error_is_at_most_half_a_stored_scale_unless_clipped(scheme):
    weight = torch.distributions.StudentT(3.0).sample((24, 512))
    tensor = quantize(weight, scheme)
    assert tensor.packed.dtype == torch.uint8
    assert tensor.packed.min() >= 1
    clipped = (tensor.packed.int() - 128).abs() == 127
    errors = errors_in_scales(weight, tensor).reshape(weight.shape)
    assert errors[~clipped].max() <= 0.5 * ROUNDING
    if scheme.scale_choice == "absmax":
        assert errors.max() <= 1.0  # a scale rounded down in its format clips by half a step
    squared = (dequantize(tensor) - weight).reshape(*tensor.scales.shape, -1).square().sum(-1)
    absmax = weight.abs().reshape(*tensor.scales.shape, -1).amax(-1) / 127
    # Least squares may clip, but never to lose more than the unclipped choice could.
    step = 2.0 ** torch.frexp(absmax.amax(-1, keepdim=True))[1] / 256
    unclipped = (absmax + step) / 2
    assert (squared <= weight.numel() / squared.numel() * unclipped.square()).all()


def test_least_squares_is_never_worse_than_absmax_in_any_group():
    weight = torch.distributions.StudentT(4.0).sample((64, 1024))
    squared = {}
    for choice in ("absmax", "least_squares"):
        error = dequantize(quantize(weight, Scheme(scale_choice=choice))) - weight
        squared[choice] = error.reshape(64, -1, 128).square().sum(-1)
    assert (squared["least_squares"] <= squared["absmax"] * (1 + 1e-5)).all()
    assert squared["least_squares"].sum() < 0.98 * squared["absmax"].sum()


def test_grid8_is_no_worse_than_float32_absmax_scales():
    for weight in (torch.randn(512, 4096), torch.distributions.StudentT(4.0).sample((512, 4096))):
        grid8 = (dequantize(quantize(weight, Scheme())) - weight).norm()
        textbook = Scheme(scale_format="float32", scale_choice="absmax")
        assert grid8 < (dequantize(quantize(weight, textbook)) - weight).norm()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from((32, 64, 128)), st.integers(-100, 100))
def test_grid8_survives_bfloat16_exactly(seed, group_size, log2):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 256, generator=generator) * 2.0**log2
    weight *= torch.rand(3, 256, generator=generator) ** 8
    tensor = quantize(weight, Scheme(group_size))
    scales = scales_float32(tensor.scales, tensor.exponents)
    assert torch.equal(scales.bfloat16().float(), scales)
    recovered = grid8_from_scales(scales.bfloat16())
    assert recovered is not None
    assert torch.equal(scales_float32(*recovered), scales)


def test_scales_off_the_grid_are_told_apart():
    assert grid8_from_scales(torch.tensor([[1.0, 1 / 3]])) is None
    assert grid8_from_scales(torch.tensor([[1.0, 0.0]])) is None
    assert grid8_from_scales(torch.tensor([[1.0, float("nan")]])) is None
    assert grid8_from_scales(torch.tensor([[256.0, 255.0]])) is None
    assert grid8_from_scales(torch.tensor([[254.0, 1.0]])) is not None


def codes_by_definition(row):
    """Codes 1..255 and the exponent of one row of floats, by arithmetic; None off the grid."""
    if not all(math.isfinite(v) and v > 0 for v in row):
        return None
    exponent = math.frexp(max(row))[1] - 8
    codes = [v / 2.0**exponent for v in row]
    fits = all(c == int(c) and 1 <= c <= 255 for c in codes)
    return (codes, exponent) if fits and MIN_EXPONENT <= exponent <= MAX_EXPONENT else None


@pytest.mark.parametrize("by_torch", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_are_those_of_the_definition(dtype, by_torch, monkeypatch):
    if by_torch:  # as on a GPU
        of_bits = numerics.grid8_from_bits
        as_on_a_gpu = lambda bits, _: of_bits(torch.from_numpy(bits), torch)  # noqa: E731
        monkeypatch.setattr(numerics, "grid8_from_bits", as_on_a_gpu)
    exponents = range(-24, 8) if dtype == torch.float16 else range(-128, 121)
    rows = [
        torch.tensor([[float(code), float(most)]]).double() * 2.0**exponent
        for exponent in exponents
        for most in (128, 200, 255)
        for code in (0, 1, 2, 127, 255, -3, 0.5, math.inf, math.nan)
    ]
    seen = set()
    for row in (r.to(dtype) for r in rows):
        found, expected = grid8_from_scales(row), codes_by_definition(row[0].tolist())
        seen.add(found is None)
        if expected is None:
            assert found is None, row
            continue
        assert (found[0].tolist(), found[1].tolist()) == ([expected[0]], [expected[1]]), row
    assert seen == {True, False}


@pytest.mark.parametrize("scheme", all_schemes(), ids=str)
def test_zero_groups_are_exact_and_tiny_groups_keep_a_scale(scheme):
    weight = torch.randn(4, 512)
    weight[0] = 0
    weight[1, :256] = 0
    weight[2, :256] = 1e-38
    weight[3] = 1e-42
    tensor = quantize(weight, scheme)
    back = dequantize(tensor)
    assert torch.isfinite(back).all()
    assert (back[0] == 0).all()
    assert (back[1, :256] == 0).all()
    assert (scales_float32(tensor.scales, tensor.exponents) > 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_name_tensor_index_and_count(value):
    weight = torch.randn(4, 128)
    weight[2, 7] = weight[3, 1] = value
    with pytest.raises(CheckpointError, match=r"tensor lm_head: 2 of 512 .* at \[2, 7\]"):
        quantize(weight, Scheme(), name="lm_head")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_source_dtype_does_not_matter(dtype):
    weight = torch.randn(8, 256).to(dtype)
    assert torch.equal(quantize(weight, Scheme()).packed, quantize(weight.float(), Scheme()).packed)

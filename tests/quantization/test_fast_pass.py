"""The fused pass equals the definition to the bit: dtypes, formats, groups, edge values."""

import numpy as np
import pytest
import torch
from schemes import all_schemes

from halfweight.quantization import fast_pass, numerics
from halfweight.quantization.fast_pass import as_float32, quantize_rows
from halfweight.quantization.scheme import Scheme

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def raw(weight):
    return weight.contiguous().reshape(-1).view(torch.uint8).numpy()


def edge_weights():
    """Rows of ordinary, heavy-tailed, tiny, huge, zero, denormal, constant and spiked weights."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(14, 512, generator=generator) * 0.02
    weight[1] = torch.distributions.StudentT(2.0).sample((512,)) * 0.02
    weight[2] *= 1e-4
    weight[3] *= 1e4
    weight[4] = 0
    weight[5, :256] = 0
    weight[6] = 1e-38
    weight[7] = 1e-42
    weight[8] = -0.5
    weight[9, 100] = 6e4
    weight[10] = torch.arange(512) / 512
    weight[11] = -0.0
    weight[12] *= 2.0**-14
    weight[13] = 2.0 ** torch.arange(-16, 16).repeat(16)
    return weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", [s for s in all_schemes() if s.group_size != "tensor"], ids=str)
def test_bits_are_those_of_the_definition(scheme, dtype):
    weight = edge_weights().to(DTYPES[dtype])
    expected = numerics.quantize(weight, scheme)
    found = quantize_rows(raw(weight), dtype, scheme, 512)
    assert torch.equal(torch.from_numpy(found.packed), expected.packed)
    scales = numerics.scales_float32(expected.scales, expected.exponents)
    assert torch.equal(torch.from_numpy(found.scales), scales)
    assert not found.statistics["bad"].any()
    error = numerics.dequantize(expected).double() - weight.double()
    assert np.allclose(found.statistics["squared_error"], error.square().sum(1), rtol=1e-4)
    assert np.allclose(found.statistics["squared_norm"], weight.double().square().sum(1), rtol=1e-4)


@pytest.mark.parametrize("scale_format", ["grid8", "float16"])
@pytest.mark.parametrize("seed", range(2))
def test_many_random_groups(seed, scale_format):
    """A hundred thousand least-squares choices a case: near-ties fall the same way."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1024, 32 * 100, generator=generator).bfloat16()
    scheme = Scheme(32, scale_format)
    expected = numerics.quantize(weight, scheme)
    found = quantize_rows(raw(weight), "BF16", scheme, weight.shape[1])
    assert np.array_equal(found.packed, expected.packed.numpy())
    scales = numerics.scales_float32(expected.scales, expected.exponents)
    assert np.array_equal(found.scales, scales.numpy())


def test_constants_are_those_of_the_definition():
    assert fast_pass.QMAX == numerics.QMAX
    assert fast_pass.LANES == numerics.SUM_LANES
    assert fast_pass.MAX_ORDERED_GROUP == numerics.MAX_ORDERED_GROUP
    assert tuple(fast_pass.CODE_OFFSETS) == numerics.CODE_OFFSETS
    assert tuple(fast_pass.SCALE_FACTORS) == numerics.SCALE_FACTORS
    limits = (fast_pass.MIN_EXPONENT, fast_pass.MAX_EXPONENT)
    assert limits == (numerics.MIN_EXPONENT, numerics.MAX_EXPONENT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [64, "row"])
def test_non_finite_weights_are_counted_by_row(dtype, group_size):
    weight = torch.randn(4, 512)
    weight[1, 3] = float("nan")
    weight[1, 4] = float("inf")
    weight[3, 511] = -float("inf")
    found = quantize_rows(raw(weight.to(DTYPES[dtype])), dtype, Scheme(group_size), 512)
    assert found.statistics["bad"].tolist() == [0, 2, 0, 1]


@pytest.mark.parametrize("group_size", [128, "row"])
def test_crushed_groups_are_counted(group_size):
    weight = torch.randn(3, 512) * 0.01
    weight[1, 7] = 100.0
    found = quantize_rows(raw(weight), "F32", Scheme(group_size), 512)
    assert found.statistics["crushed_groups"].tolist() == [0, 1, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_finite_value_is_decoded_exactly(dtype):
    if dtype in ("F16", "BF16"):
        bits = torch.arange(-(2**15), 2**15).to(torch.int16)
        weight = bits.view(DTYPES[dtype])
    else:
        weight = torch.randn(1000, dtype=DTYPES[dtype])
    finite = weight[torch.isfinite(weight)]
    assert np.array_equal(as_float32(raw(finite), dtype), finite.float().numpy())

"""The CPU backend against the reference, over odd shapes, formats and dtypes."""

import pytest
import torch

from halfweight import kernels
from halfweight.kernels import cpu, reference
from halfweight.numerics import QuantizedTensor, quantize
from halfweight.scheme import SCALE_FORMATS, Scheme

SHAPES = [(1, 32), (7, 64), (48, 576), (33, 1536), (130, 896), (5, 4864)]
DTYPES = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def weight(shape=(48, 576), group_size=64, scale_format="grid8"):
    generator = torch.Generator().manual_seed(sum(shape))
    rows = torch.exp(torch.randn(shape[0], 1, generator=generator))
    return quantize(
        torch.randn(shape, generator=generator) * rows, Scheme(group_size, scale_format)
    )


def assert_equal_products(x, tensor: QuantizedTensor, bias=None):
    """Row by row: the error is bounded by rounding of the products' magnitudes, not of y."""
    parts = (tensor.packed, tensor.scales, tensor.exponents)
    y = kernels.linear(x, *parts, bias, "cpu")
    expected = reference.linear(x.double(), *parts, bias)
    assert y.shape == expected.shape
    assert y.dtype == x.dtype
    error = (y.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error < DTYPES[x.dtype]


def test_cpu_is_chosen_on_the_cpu():
    assert kernels.choose_backend("cpu") == "cpu"
    assert cpu.unavailable(torch.device("cuda")) == "needs the CPU"


@pytest.mark.parametrize("tokens", [1, 2, 5, 40])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_shapes(shape, tokens):
    assert_equal_products(torch.randn(tokens, shape[1]), weight(shape, 32))


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, "row", "tensor"])
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_scale_formats_and_groups(scale_format, group_size, tokens):
    if group_size == "tensor" and scale_format == "grid8":
        return
    tensor = weight((37, 768), group_size, scale_format)
    assert_equal_products(torch.randn(tokens, 768), tensor, torch.randn(37))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 4, 33])
def test_activation_dtypes_and_bias(dtype, tokens):
    bias = torch.randn(48, dtype=dtype)
    assert_equal_products(torch.randn(tokens, 576).to(dtype), weight(), bias)


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_strides_and_leading_dimensions(tokens):
    x = torch.randn(576, 2, tokens).permute(1, 2, 0)
    assert_equal_products(x, weight())
    assert_equal_products(torch.randn(tokens, 3, 576)[:, 1], weight())
    assert_equal_products(torch.randn(576), weight())


def test_rows_of_a_larger_weight():
    tensor = weight((64, 256), 64)
    part = QuantizedTensor(tensor.packed[8:40], tensor.scales[8:40], tensor.exponents[8:40])
    assert_equal_products(torch.randn(2, 256), part)


def test_no_tokens():
    tensor = weight()
    parts = (tensor.packed, tensor.scales, tensor.exponents)
    assert kernels.linear(torch.empty(2, 0, 576), *parts, None, "cpu").shape == (2, 0, 48)
    ids = torch.empty(0, dtype=torch.int64)
    assert kernels.embedding(ids, *parts, torch.float32, "cpu").shape == (0, 576)


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_equals_the_reference(scale_format, dtype):
    tensor = weight((50, 576), 64, scale_format)
    parts = (tensor.packed, tensor.scales, tensor.exponents)
    ids = torch.tensor([[3, 0, 49], [3, 7, 7]])
    rows = kernels.embedding(ids, *parts, dtype, "cpu")
    assert torch.equal(rows, reference.embedding(ids, *parts, dtype))

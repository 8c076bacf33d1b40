"""Registration, choice, and every backend against the reference."""

import pytest
import torch

from halfweight import kernels
from halfweight.errors import UsageError
from halfweight.numerics import dequantize, quantize
from halfweight.scheme import Scheme


def test_reference_equals_the_float64_product():
    tensor = quantize(torch.randn(24, 256), Scheme())
    x, bias = torch.randn(2, 5, 256), torch.randn(24)
    y = kernels.linear(x, tensor.packed, tensor.scales, tensor.exponents, bias, "reference")
    exact = x.double() @ dequantize(tensor).double().T + bias
    assert (y - exact).norm() / exact.norm() < 1e-6


def test_reference_embedding_reads_the_rows():
    tensor = quantize(torch.randn(24, 256), Scheme())
    ids = torch.tensor([[3, 0], [23, 3]])
    rows = kernels.embedding(
        ids, tensor.packed, tensor.scales, tensor.exponents, torch.float32, "reference"
    )
    assert torch.equal(rows, dequantize(tensor)[ids])


def test_opcheck():
    tensor = quantize(torch.randn(16, 128), Scheme())
    parts = (tensor.packed, tensor.scales, tensor.exponents)
    torch.library.opcheck(kernels.linear, (torch.randn(3, 128), *parts, None, "reference"))
    ids = torch.tensor([1, 2])
    torch.library.opcheck(kernels.embedding, (ids, *parts, torch.float16, "reference"))


def test_unknown_and_unsuitable_backends_are_refused():
    with pytest.raises(UsageError, match="'fast' is not known"):
        kernels.choose_backend("cpu", "fast")
    tensor = quantize(torch.randn(16, 128), Scheme())
    parts = (tensor.packed, tensor.scales, tensor.exponents)
    with pytest.raises(UsageError, match="no int8 activations"):
        kernels.linear(torch.randn(3, 128), *parts, None, "reference", True)

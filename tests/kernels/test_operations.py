"""Registration, choice, and every backend against the reference."""

from types import SimpleNamespace

import pytest
import torch

from halfweight.errors import UsageError
from halfweight.kernels import operations
from halfweight.quantization.numerics import dequantize, quantize
from halfweight.quantization.scheme import Scheme


def test_reference_equals_the_float64_product():
    tensor = quantize(torch.randn(24, 256), Scheme())
    x, bias = torch.randn(2, 5, 256), torch.randn(24)
    y = operations.linear(x, tensor.packed, tensor.scales, tensor.exponents, bias, "reference")
    exact = x.double() @ dequantize(tensor).double().T + bias
    assert (y - exact).norm() / exact.norm() < 1e-6


def test_reference_embedding_reads_the_rows():
    tensor = quantize(torch.randn(24, 256), Scheme())
    ids = torch.tensor([[3, 0], [23, 3]])
    rows = operations.embedding(
        ids, tensor.packed, tensor.scales, tensor.exponents, torch.float32, "reference"
    )
    assert torch.equal(rows, dequantize(tensor)[ids])


def test_opcheck():
    tensor = quantize(torch.randn(16, 128), Scheme())
    parts = (tensor.packed, tensor.scales, tensor.exponents)
    torch.library.opcheck(operations.linear, (torch.randn(3, 128), *parts, None, "reference"))
    ids = torch.tensor([1, 2])
    torch.library.opcheck(operations.embedding, (ids, *parts, torch.float16, "reference"))


def test_unknown_and_unsuitable_backends_are_refused():
    with pytest.raises(UsageError, match="'fast' is not known"):
        operations.choose_backend("cpu", "fast")
    tensor = quantize(torch.randn(16, 128), Scheme())
    parts = (tensor.packed, tensor.scales, tensor.exponents)
    with pytest.raises(UsageError, match="no int8 activations"):
        operations.linear(torch.randn(3, 128), *parts, None, "reference", True)


def test_a_backend_that_cannot_run_where_the_tensors_lie_says_so():
    tensor = quantize(torch.randn(16, 128), Scheme())
    parts = (tensor.packed, tensor.scales, tensor.exponents)
    with pytest.raises(UsageError, match="'cuda' cannot run on cpu: needs a CUDA device") as raised:
        operations.linear(torch.randn(3, 128), *parts, None, "cuda")
    assert raised.value.hint
    with pytest.raises(UsageError, match="'cuda' cannot run on cpu: needs a CUDA device"):
        operations.embedding(torch.tensor([1, 2]), *parts, torch.float16, "cuda")


def test_tensors_on_two_devices_are_refused():
    here, there = (SimpleNamespace(device=torch.device(name)) for name in ("cpu", "cuda:0"))
    for x, weight in ((here, there), (there, here)):
        with pytest.raises(UsageError, match=r"the input lies on \S+, the weight on \S+") as raised:
            operations._check_devices("cpu", x, weight)
        assert "model.to" in raised.value.hint
    with pytest.raises(UsageError, match="backend 'cpu' cannot run on cuda:0: needs the CPU"):
        operations._check_devices("cpu", there, there)
    operations._check_devices("reference", there, there)


def test_meta_tensors_ask_no_backend():
    tensor = quantize(torch.randn(16, 128), Scheme())
    parts = [part.to("meta") for part in (tensor.packed, tensor.scales, tensor.exponents)]
    y = operations.linear(torch.randn(3, 128, device="meta"), *parts, None, "cuda")
    assert (y.shape, y.device.type) == ((3, 16), "meta")


@pytest.mark.gpu
def test_the_cpu_backend_does_not_follow_a_gpus_addresses():
    tensor = quantize(torch.randn(16, 128), Scheme())
    parts = [part.cuda() for part in (tensor.packed, tensor.scales, tensor.exponents)]
    with pytest.raises(UsageError, match="backend 'cpu' cannot run on cuda:0"):
        operations.linear(torch.randn(3, 128, device="cuda"), *parts, None, "cpu")
    with pytest.raises(UsageError, match="the input lies on cpu, the weight on cuda:0"):
        operations.linear(torch.randn(3, 128), *parts, None, "cpu")

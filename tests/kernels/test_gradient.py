"""The gradient of the quantized product: to x and bias, as of the dequantized weight."""

import pytest
import torch

from halfweight.kernels import gradient, operations
from halfweight.quantization.numerics import dequantize, quantize
from halfweight.quantization.scheme import Scheme

SCHEMES = [Scheme(32), Scheme(64, "bfloat16"), Scheme("row"), Scheme("tensor", "float32")]


def weight_of(scheme, shape=(24, 192)):
    generator = torch.Generator().manual_seed(1)
    return quantize(torch.randn(shape, generator=generator), scheme)


def parts(weight):
    return weight.packed, weight.scales, weight.exponents


def relative_error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("rows", [(1,), (3, 5)])
def test_gradients_equal_the_float64_product(backend, scheme, rows):
    weight = weight_of(scheme)
    x = torch.randn(*rows, 192, requires_grad=True)
    bias, dy = torch.randn(24, requires_grad=True), torch.randn(*rows, 24)
    operations.linear(x, *parts(weight), bias, backend).backward(dy)
    expected = dy.double() @ dequantize(weight).double()
    assert x.grad.shape == x.shape
    assert relative_error(x.grad, expected) < 1e-6
    assert relative_error(bias.grad, dy.double().reshape(-1, 24).sum(0)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_16_bits_are_rounded_once(dtype):
    weight = weight_of(Scheme(32))
    x = torch.randn(7, 192, dtype=dtype, requires_grad=True)
    bias = torch.randn(24, dtype=dtype, requires_grad=True)
    dy = torch.randn(7, 24, dtype=dtype)
    operations.linear(x, *parts(weight), bias, "cpu").backward(dy)
    assert x.grad.dtype == bias.grad.dtype == dtype
    exact = dy.double() @ dequantize(weight).double()
    assert relative_error(x.grad, exact) < torch.finfo(dtype).eps
    assert relative_error(bias.grad, dy.double().sum(0)) < torch.finfo(dtype).eps


def test_the_weight_is_made_floats_in_blocks_of_bounded_size(monkeypatch):
    weight, dy = weight_of(Scheme(32), (40, 512)), torch.randn(3, 40, dtype=torch.bfloat16)
    whole = gradient.input_gradient(dy, *parts(weight))
    sizes = []

    def recording(block, dtype):
        sizes.append(4 * block.packed.numel())
        return dequantize(block, dtype)

    monkeypatch.setattr(gradient, "dequantize", recording)
    for limit, most in ((3 * 4 * 40 * 32, 3 * 4 * 40 * 32), (1, 4 * 40 * 32)):
        monkeypatch.setattr(gradient, "BLOCK_BYTES", limit)
        sizes.clear()
        found = gradient.input_gradient(dy, *parts(weight))
        assert max(sizes) == most
        assert sum(sizes) == 4 * weight.packed.numel()
        assert relative_error(found, whole.double()) < 2**-9


def test_nothing_of_x_is_kept_for_it():
    weight, x = weight_of(Scheme(32)), torch.randn(50, 192, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = operations.linear(x, *parts(weight), None, "cpu")
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in parts(weight)}
    y.sum().backward()
    assert x.grad is not None


def test_only_what_is_asked_for_has_a_gradient():
    weight, x = weight_of(Scheme(32)), torch.randn(2, 192)
    bias = torch.zeros(24, requires_grad=True)
    operations.linear(x, *parts(weight), bias, "cpu").sum().backward()
    assert torch.equal(bias.grad, torch.full((24,), 2.0))
    assert x.grad is None
    assert not operations.linear(x, *parts(weight), None, "cpu").requires_grad


def test_rounded_activations_have_the_gradient_of_exact_ones():
    weight, dy = weight_of(Scheme(64)), torch.randn(4, 24)
    grads = []
    for int8_activations in (False, True):
        x = torch.linspace(-1, 1, 4 * 192).view(4, 192).requires_grad_()
        operations.linear(x, *parts(weight), None, "cpu", int8_activations).backward(dy)
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_a_compiled_product_has_the_same_gradients():
    weight, dy = weight_of(Scheme(32)), torch.randn(5, 24)

    def scaled(x, bias):
        return operations.linear(2 * x, *parts(weight), bias, "cpu")

    found = []
    for function in (scaled, torch.compile(scaled, fullgraph=True, backend="aot_eager")):
        x = torch.linspace(-1, 1, 5 * 192).view(5, 192).requires_grad_()
        bias = torch.zeros(24, requires_grad=True)
        function(x, bias).backward(dy)
        found.append((x.grad, bias.grad))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("backend", "scheme"), [("reference", Scheme(32, "bfloat16")), ("cpu", Scheme(32))], ids=str
)
def test_opcheck(backend, scheme):
    weight, x = weight_of(scheme), torch.randn(2, 3, 192, requires_grad=True)
    bias = torch.randn(24, requires_grad=True)
    torch.library.opcheck(operations.linear, (x, *parts(weight), bias, backend))
    torch.library.opcheck(operations.linear, (x, *parts(weight), None, backend))
    torch.library.opcheck(operations.linear_input_gradient, (torch.randn(2, 24), *parts(weight)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_gradient_is_the_same_and_its_memory_bounded(dtype):
    weight = weight_of(Scheme(128), (4096, 14336))
    on_gpu = [None if part is None else part.cuda() for part in parts(weight)]
    dy = torch.randn(16, 4096, device="cuda", dtype=dtype)
    gradient.input_gradient(dy, *on_gpu)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = gradient.input_gradient(dy, *on_gpu)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 4 * gradient.BLOCK_BYTES + 2 * (dy.nbytes + found.nbytes)
    exact = dy.double() @ dequantize(weight).double().cuda()
    assert relative_error(found, exact) < (1e-5 if dtype == torch.float32 else 2**-7)

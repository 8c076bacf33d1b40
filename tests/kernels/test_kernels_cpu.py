"""The CPU backend against the reference, over odd shapes, formats and dtypes."""

import pytest
import torch

from halfweight.errors import UsageError
from halfweight.kernels import operations, reference
from halfweight.kernels.cpu import backend as cpu
from halfweight.quantization.numerics import QuantizedTensor, quantize
from halfweight.quantization.scheme import SCALE_FORMATS, Scheme

SHAPES = [(1, 32), (7, 64), (48, 576), (33, 1536), (130, 896), (5, 4864)]
DTYPES = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, params=["vectors", "matrix unit"])
def by_both_kinds_of_instructions(request, monkeypatch):
    """Batches of many tokens go by one or the other."""
    if request.param == "vectors":
        monkeypatch.setattr(cpu, "has_matrix_unit", lambda: False)
    elif not cpu.has_matrix_unit():
        pytest.skip("this CPU has no matrix unit for bytes")


def weight(shape=(48, 576), group_size=64, scale_format="grid8"):
    generator = torch.Generator().manual_seed(sum(shape))
    rows = torch.exp(torch.randn(shape[0], 1, generator=generator))
    return quantize(
        torch.randn(shape, generator=generator) * rows, Scheme(group_size, scale_format)
    )


def assert_equal_products(x, tensor: QuantizedTensor, bias=None):
    """Row by row: the error is bounded by rounding of the products' magnitudes, not of y."""
    parts = (tensor.packed, tensor.scales, tensor.exponents)
    y = operations.linear(x, *parts, bias, "cpu")
    expected = reference.linear(x.double(), *parts, bias)
    assert y.shape == expected.shape
    assert y.dtype == x.dtype
    error = (y.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error < DTYPES[x.dtype]


def test_cpu_is_chosen_on_the_cpu():
    assert operations.choose_backend("cpu") == "cpu"
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


@pytest.mark.parametrize("group_size", [4, 8, 24, 48, 96, 192])
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_groups_of_others(group_size, tokens):
    """Of sizes that halfweight does not make."""
    tensor = weight((37, 384), group_size, "float16")
    assert_equal_products(torch.randn(tokens, 384), tensor, torch.randn(37))


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
    assert operations.linear(torch.empty(2, 0, 576), *parts, None, "cpu").shape == (2, 0, 48)
    ids = torch.empty(0, dtype=torch.int64)
    assert operations.embedding(ids, *parts, torch.float32, "cpu").shape == (0, 576)


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_equals_the_reference(scale_format, dtype):
    tensor = weight((50, 576), 64, scale_format)
    parts = (tensor.packed, tensor.scales, tensor.exponents)
    ids = torch.tensor([[3, 0, 49], [3, 7, 7]])
    rows = operations.embedding(ids, *parts, dtype, "cpu")
    assert torch.equal(rows, reference.embedding(ids, *parts, dtype))


def rounded(x, block):
    """x as the int8 path sees it: the nearest of 255 steps in each block, in float32."""
    blocks = x.reshape(*x.shape[:-1], -1, block)
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    digits = (blocks * (127 / largest)).round()
    return (digits.double() * (largest / 127).double()).reshape(x.shape)


@pytest.mark.parametrize(("group_size", "block"), [(64, 64), (128, 128), (256, 256), ("row", 256)])
@pytest.mark.parametrize("tokens", [1, 3, 6, 41])
def test_int8_activations_equal_the_product_with_rounded_x(group_size, block, tokens):
    tensor = weight((37, 768), group_size)
    parts = (tensor.packed, tensor.scales, tensor.exponents)
    x, bias = torch.randn(tokens, 768), torch.randn(37)
    y = operations.linear(x, *parts, bias, "cpu", True)
    expected = reference.linear(rounded(x, block), *parts, bias)
    assert (y.double() - expected).norm() / expected.norm() < 2e-6
    exact = reference.linear(x.double(), *parts, bias)
    assert 1e-4 < (y.double() - exact).norm() / exact.norm() < 2e-2


def test_int8_activations_of_zeros_are_zeros():
    tensor = weight()
    parts = (tensor.packed, tensor.scales, tensor.exponents)
    assert not operations.linear(torch.zeros(2, 576), *parts, None, "cpu", True).any()


def test_int8_activations_refuse_small_groups():
    tensor = weight((48, 576), 32)
    parts = (tensor.packed, tensor.scales, tensor.exponents)
    with pytest.raises(UsageError, match="need groups of 64, found group size 32"):
        operations.linear(torch.randn(2, 576), *parts, None, "cpu", True)


def test_one_thread_and_many_give_the_same_bits():
    tensor = weight((1030, 576), 64)
    parts = (tensor.packed, tensor.scales, tensor.exponents)
    x, threads = torch.randn(576), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(operations.linear(x, *parts, None, "cpu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("tokens", [2, 20])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(tokens, bad):
    tensor = weight()
    x = torch.randn(tokens, 576)
    x[1, 70] = bad
    y = operations.linear(x, tensor.packed, tensor.scales, tensor.exponents, None, "cpu")
    assert not torch.isfinite(y[1]).any()
    assert torch.isfinite(y[[i for i in range(tokens) if i != 1]]).all()


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("size", [1e-42, 1e-35, 1e-20, 1e20])
def test_small_and_large_activations(tokens, size):
    """Below 2^-100 a block may count as zeros; never as anything else."""
    tensor = weight()
    x = torch.randn(tokens, 576) * size
    y = operations.linear(x, tensor.packed, tensor.scales, tensor.exponents, None, "cpu")
    parts = (tensor.packed, tensor.scales, tensor.exponents)
    expected = reference.linear(x.double(), *parts, None)
    error = (y.double() - expected).norm()
    assert error <= max(2e-6 * expected.norm(), 1e-25)


@pytest.mark.parametrize("tokens", [1, 20])
def test_activations_of_one_sign_cancel_exactly(tokens):
    """The 128 that every stored byte has too much meets sum(x), which is large here."""
    assert_equal_products(1 + 0.01 * torch.randn(tokens, 576), weight())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_outlier_hides_no_more_than_its_own_rounding(dtype):
    x = torch.randn(1, 576)
    x[0, 3] = 1000
    assert_equal_products(x.to(dtype), weight())


@pytest.mark.parametrize("tokens", [12, 16, 17, 40, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(33, 256), (70, 8192), (129, 4096)], ids=str)
def test_many_tokens_and_rows_of_any_number(shape, dtype, tokens):
    tensor = weight(shape, 256)
    assert_equal_products(torch.randn(tokens, shape[1]).to(dtype), tensor, torch.randn(shape[0]))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_sums_fit(dtype, sign):
    """All weights and activations at their largest, in the longest blocks."""
    packed = torch.full((40, 512), 255, dtype=torch.uint8)
    packed[::2] = 1
    scales = torch.ones(40, 2)
    x = torch.full((40, 512), float(sign)).to(dtype)
    assert_equal_products(x, QuantizedTensor(packed, scales, None))


def test_int8_activations_stay_exact_where_that_is_faster():
    tensor = weight((64, 256), 64)
    parts = (tensor.packed, tensor.scales, tensor.exponents)
    for tokens, dtype in ((40, torch.bfloat16), (40, torch.float16), (8, torch.bfloat16)):
        x = torch.randn(tokens, 256).to(dtype)
        exact = operations.linear(x, *parts, None, "cpu")
        same = torch.equal(operations.linear(x, *parts, None, "cpu", True), exact)
        assert same == (cpu.has_matrix_unit() and tokens > 8 and dtype == torch.bfloat16)

"""Every backend that runs on the GPU at hand against the float64 product, on fresh inputs."""

import random

import pytest
import torch

from halfweight.kernels import operations
from halfweight.kernels.cuda import driver
from halfweight.kernels.hopper import backend as cuda
from halfweight.kernels.hopper import tiles
from halfweight.quantization.numerics import QuantizedTensor, dequantize, quantize
from halfweight.quantization.scheme import SCALE_FORMATS, Scheme

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
BACKENDS = [
    name
    for name in ("cuda", "sm80", "triton", "triton-invariant")
    if torch.cuda.is_available() and operations.backend(name).unavailable(GPU) is None
]
SHAPES = [(1, 32), (777, 96), (640, 576), (1001, 4096), (333, 14336), (129, 28672)]
TOKENS = (1, 2, 3, 8, 17, 33, 64, 65, 130, 257, 700, 1500)


@pytest.fixture(autouse=True)
def fresh_inputs():
    """A new seed each time, printed for whoever repeats a failure; uninitialized memory is NaN."""
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def weight(shape, group_size=32, scale_format="grid8") -> QuantizedTensor:
    rows = torch.exp(torch.randn(shape[0], 1, device=GPU)) / 16
    return quantize(torch.randn(shape, device=GPU) * rows, Scheme(group_size, scale_format))


def multiply(x, tensor, bias, name, int8=False):
    parts = (tensor.packed, tensor.scales, tensor.exponents)
    return operations.linear(x, *parts, bias, name, int8)


def assert_close(y, x, tensor, bias, tolerance):
    exact = x.double() @ dequantize(tensor).double().T
    if bias is not None:
        exact += bias.double()
    error = (y.double() - exact).norm() / exact.norm()
    assert y.dtype == x.dtype
    assert error < tolerance


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_batch_and_odd_shapes(name, shape):
    tensor = weight(shape)
    bias = torch.randn(shape[0], device=GPU).half()
    for tokens in TOKENS:
        x = torch.randn(tokens, shape[1], device=GPU).half()
        assert_close(multiply(x, tensor, bias, name), x, tensor, bias, 1e-3)


@pytest.mark.parametrize("name", BACKENDS)
def test_bfloat16(name):
    tensor = weight((777, 4096), 128)
    bias = torch.randn(777, device=GPU).bfloat16()
    for tokens in TOKENS:
        x = torch.randn(tokens, 4096, device=GPU).bfloat16()
        assert_close(multiply(x, tensor, bias, name), x, tensor, bias, 4e-3)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, "row"])
def test_scale_formats_and_groups(name, scale_format, group_size):
    tensor = weight((520, 2048), group_size, scale_format)
    for tokens in (1, 20, 100, 600):
        x = torch.randn(tokens, 2048, device=GPU).half()
        assert_close(multiply(x, tensor, None, name), x, tensor, None, 1e-3)


@pytest.mark.parametrize("name", BACKENDS)
def test_the_same_bits_every_time(name):
    tensor = weight((4096, 4096), 128)
    for tokens in (1, 4, 16, 64, 128, 256, 1024):
        x = torch.randn(tokens, 4096, device=GPU).half()
        first = multiply(x, tensor, None, name)
        for _ in range(5):
            assert torch.equal(multiply(x, tensor, None, name), first)


def test_a_row_does_not_depend_on_its_batch():
    tensor = weight((1000, 4096), 128)
    x = torch.randn(256, 4096, device=GPU).half()
    together = multiply(x, tensor, None, "triton-invariant")
    for tokens in range(1, 257):
        alone = multiply(x[:tokens], tensor, None, "triton-invariant")
        assert torch.equal(alone, together[:tokens])


@pytest.mark.parametrize("name", BACKENDS)
def test_int8_activations(name):
    if operations.backend(name).linear_int8 is None:
        pytest.skip("this backend has no int8 activations")
    for group_size in (32, 128, 256, "row"):
        tensor = weight((777, 2048), group_size)
        for tokens in (1, 16, 100, 1025):
            x = torch.randn(tokens, 2048, device=GPU).half()
            assert_close(multiply(x, tensor, None, name, int8=True), x, tensor, None, 1e-2)


@pytest.mark.parametrize("name", BACKENDS)
def test_embedding(name):
    tensor = weight((5000, 4096), 128)
    parts = (tensor.packed, tensor.scales, tensor.exponents)
    ids = torch.randint(0, 5000, (3, 70), device=GPU)
    rows = operations.embedding(ids, *parts, torch.bfloat16, name)
    assert torch.equal(rows, dequantize(tensor)[ids].bfloat16())


@pytest.mark.parametrize("name", BACKENDS)
def test_strides_slices_and_no_tokens(name):
    tensor = weight((640, 1024), 128)
    part = QuantizedTensor(tensor.packed[7:500], tensor.scales[7:500], tensor.exponents[7:500])
    wide = torch.randn(40, 2, 2048, device=GPU).half()
    for x in (wide[:, 1, 1024:], wide[:, 0, ::2], wide[:, 0, 3:1027], wide[:1, 0, 1:1025]):
        assert_close(multiply(x, part, None, name), x, part, None, 1e-3)
    assert multiply(wide[:0, 0, :1024], part, None, name).shape == (0, 493)


@pytest.mark.parametrize("name", BACKENDS)
def test_weights_past_two_to_the_31_bytes(name):
    out_features, in_features = 70_000, 32_768
    packed = torch.randint(1, 256, (out_features, in_features), dtype=torch.uint8, device=GPU)
    codes = torch.randint(1, 256, (out_features, 256), dtype=torch.uint8, device=GPU)
    exponents = torch.full((out_features,), -16, dtype=torch.int8, device=GPU)
    last = QuantizedTensor(packed[-100:], codes[-100:], exponents[-100:])
    for tokens in (1, 16, 300):
        x = torch.randn(tokens, in_features, device=GPU).half()
        y = operations.linear(x, packed, codes, exponents, None, name)
        assert_close(y[:, -100:], x, last, None, 1e-3)


@pytest.mark.parametrize("name", BACKENDS)
def test_torch_compile_and_opcheck(name):
    tensor = weight((256, 512), 128)
    parts = (tensor.packed, tensor.scales, tensor.exponents)
    x = torch.randn(5, 512, device=GPU).half()

    def doubled(x):
        return operations.linear(x, *parts, None, name) * 2

    compiled = torch.compile(doubled, fullgraph=True)
    assert torch.equal(compiled(x), doubled(x))
    torch.library.opcheck(operations.linear, (x, *parts, None, name))
    ids = torch.tensor([1, 2], device=GPU)
    torch.library.opcheck(operations.embedding, (ids, *parts, torch.float16, name))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_cuda_graph_replays_the_product(name):
    tensor = weight((4096, 4096), 128)
    for tokens in (1, 16, 64):
        x = torch.randn(tokens, 4096, device=GPU).half()
        multiply(x, tensor, None, name)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = multiply(x, tensor, None, name)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, multiply(x, tensor, None, name))


ON_HOPPER = "cuda" in BACKENDS


@pytest.mark.skipif(not ON_HOPPER, reason="needs Hopper")
@pytest.mark.parametrize("config", [*tiles.SMALL, *tiles.LARGE], ids=str)
def test_every_plan_of_a_configuration(config):
    """Also those that would not be chosen for such a product; each three times, on poisoned y."""
    shapes = [((777, 4096), 128), ((6144, 4096), 64), ((2000, 1536), 256), ((6400, 1024), 128)]
    for shape, group_size in shapes:
        tensor = weight(shape, group_size)
        exact = dequantize(tensor).double().T
        for tokens in (3, config.tokens - 1, config.tokens + 1, 700):
            if tokens > config.tokens and isinstance(config, tiles.Small):
                continue
            x = torch.randn(tokens, shape[1], device=GPU).half()
            expected = x.double() @ exact
            for plan in tiles.plans(config, tokens, *shape, driver.card_of(0)):
                results = [launch(x, tensor, plan) for _ in range(3)]
                error = (results[0].double() - expected).norm() / expected.norm()
                assert error < 1e-3, plan
                assert all(torch.equal(y, results[0]) for y in results), plan


@pytest.mark.skipif(not ON_HOPPER, reason="needs Hopper")
@pytest.mark.parametrize("config", tiles.INT8, ids=str)
def test_every_plan_for_int8_activations(config):
    """Against the product of the very integers that the kernel is given."""
    for shape, group_size in (((777, 4096), 128), ((6144, 4096), 256), ((2000, 1536), "row")):
        tensor = weight(shape, group_size)
        exact = dequantize(tensor).double().T
        for tokens in (100, 700, 1025):
            x = torch.randn(tokens, shape[1], device=GPU).half()
            rounded, steps = cuda.rounded_for(config, x)
            by_token = steps[1, :, :tokens].double().T.repeat_interleave(config.k_bytes, dim=1)
            expected = (rounded.double() * by_token[:, : shape[1]]) @ exact
            for plan in tiles.plans(config, tokens, *shape, driver.card_of(0)):
                results = [launch(rounded, tensor, plan, steps) for _ in range(3)]
                error = (results[0].double() - expected).norm() / expected.norm()
                assert error < 1e-3, plan
                assert all(torch.equal(y, results[0]) for y in results), plan


def launch(x, tensor, plan, steps=None):
    y = torch.full((x.shape[0], tensor.packed.shape[0]), torch.nan, device=GPU).half()
    cuda._launch(x, tensor.packed, tensor.scales, tensor.exponents, None, y, plan, steps)
    return y

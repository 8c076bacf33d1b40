"""The Triton backend against the float64 product: by its interpreter here, compiled on a GPU."""

import json

import pytest
import torch

from halfweight.kernels import operations
from halfweight.kernels.triton import backend as triton
from halfweight.kernels.triton import tables
from halfweight.kernels.triton.tables import Config, Entry, Table
from halfweight.quantization.numerics import QuantizedTensor, dequantize, quantize
from halfweight.quantization.scheme import SCALE_FORMATS, Scheme

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
TOLERANCE = {
    torch.float16: 1e-3,
    torch.float32: 1e-6,
    torch.bfloat16: 8e-3 if INTERPRETED else 4e-3,
}
"""Relative error of the output; the interpreter cuts bfloat16 where a GPU rounds."""

EXACT = {
    "gemv": Config("gemv", rows=16, per_processor=1, stages=1),
    "gemv through shared memory": Config("gemv", rows=16, per_processor=1, stages=3),
    "matmul": Config("matmul", tokens=16, rows=32, stages=2),
    "matmul of a split K": Config("matmul", tokens=16, rows=16, split=3, stages=2),
    "two int8": Config("two_int8", tokens=16, rows=32, stages=2),
    "two int8 of a split K": Config("two_int8", tokens=16, rows=32, split=2, stages=2),
    "dequantize": Config("dequantize"),
}
VARIANTS = ("gemv through shared memory", "two int8 of a split K")
"""The interpreter runs these as it runs their plain forms: checked once."""
PLAIN = [name for name in EXACT if name not in VARIANTS]
INT8 = {
    "int8": Config("int8", tokens=16, rows=32, stages=2),
    "int8 of a split K": Config("int8", tokens=16, rows=32, split=2, stages=2),
}


def weight(shape, group_size=64, scale_format="grid8") -> QuantizedTensor:
    rows = torch.exp(torch.randn(shape[0], 1)) / 16
    tensor = quantize(torch.randn(shape) * rows, Scheme(group_size, scale_format))
    exponents = tensor.exponents
    return QuantizedTensor(
        tensor.packed.to(DEVICE),
        tensor.scales.to(DEVICE),
        None if exponents is None else exponents.to(DEVICE),
    )


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every tensor made by torch.empty holds NaN, so that an element never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def multiply(x, tensor, bias, config):
    parts = (tensor.packed, tensor.scales, tensor.exponents)
    return triton.product(x, *parts, bias, lambda *_: config)


def relative_error(y, x, tensor, bias=None):
    """Error over the size that sums of such terms have: some that cancel do not count for more."""
    weights = dequantize(tensor).double()
    bias = torch.zeros(1, device=x.device) if bias is None else bias
    exact = x.double() @ weights.T + bias.double()
    size = (x.double() ** 2 @ weights.T**2 + bias.double() ** 2).sum().sqrt()
    assert y.shape == exact.shape
    assert y.dtype == x.dtype
    return ((y.double() - exact).norm() / size).item()


def takes(config, x):
    if not triton.takes(config, x.dtype, x.shape[0], x.shape[1]):
        return False
    return not (INTERPRETED and config.kernel == "matmul" and x.dtype == torch.bfloat16)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 18])
def test_exact_kernels(name, dtype, tokens):
    config, tensor = EXACT[name], weight((37, 320))
    x = torch.randn(tokens, 320, device=DEVICE).to(dtype)
    if not takes(config, x):
        pytest.skip("not a product of this kernel")
    bias = torch.randn(37, device=DEVICE).to(dtype)
    y = multiply(x, tensor, bias, config)
    assert relative_error(y, x, tensor, bias) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
@pytest.mark.parametrize("group_size", [32, 256, "row", "tensor"])
def test_scale_formats_and_groups(name, scale_format, group_size):
    if group_size == "tensor" and scale_format == "grid8":
        return
    tensor = weight((20, 256), group_size, scale_format)
    x = torch.randn(2, 256, device=DEVICE).half()
    assert relative_error(multiply(x, tensor, None, EXACT[name]), x, tensor) < 1e-3


@pytest.mark.parametrize("name", [*PLAIN, "int8"])
@pytest.mark.parametrize("group_size", [8, 24, 48, 96])
def test_groups_of_others(name, group_size):
    """Of sizes that halfweight does not make: a kernel that cannot take them leaves them to one."""
    tensor = weight((20, 192), group_size, "float16")
    x = torch.randn(3, 192, device=DEVICE).half()
    config = (EXACT | INT8)[name]
    assert relative_error(multiply(x, tensor, None, config), x, tensor) < 1e-3 + (name == "int8")


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("shape", [(1, 32), (5, 96), (16, 1056), (130, 64)], ids=str)
def test_odd_shapes(name, shape):
    tensor = weight(shape, 32)
    x = torch.randn(2, shape[1], device=DEVICE).half()
    assert relative_error(multiply(x, tensor, None, EXACT[name]), x, tensor) < 1e-3


@pytest.mark.parametrize("name", ["gemv", "two int8"])
def test_two_int8_parts_keep_activations_beside_an_outlier(name):
    tensor = weight((64, 256))
    x = torch.randn(1, 256, device=DEVICE).half()
    x[0, 40] = 3000
    assert relative_error(multiply(x, tensor, None, EXACT[name]), x, tensor) < 1e-3


@pytest.mark.parametrize("name", ["gemv", "two int8"])
def test_activations_that_are_not_finite_show_in_the_result(name):
    tensor = weight((8, 64))
    x = torch.zeros(2, 64, device=DEVICE).half()
    x[1, 5] = float("nan")
    y = multiply(x, tensor, None, EXACT[name])
    assert torch.equal(y[0], torch.zeros_like(y[0]))
    assert y[1].isnan().all()


@pytest.mark.parametrize("name", INT8)
@pytest.mark.parametrize("shape", [(40, 320), (33, 96)], ids=str)
def test_int8_activations(name, shape):
    tensor = weight(shape, 32)
    x = torch.randn(18, shape[1], device=DEVICE).half()
    error = relative_error(multiply(x, tensor, None, INT8[name]), x, tensor)
    assert 1e-3 < error < 1e-2


def test_int8_activations_through_the_op():
    tensor = weight((33, 96), 32)
    x = torch.randn(2, 3, 96, device=DEVICE).half()
    parts = (tensor.packed, tensor.scales, tensor.exponents)
    y = operations.linear(x, *parts, None, "triton", True)
    assert y.shape == (2, 3, 33)
    assert relative_error(y.reshape(6, 33), x.reshape(6, 96), tensor) < 1e-2


def test_strides_slices_and_leading_dimensions():
    tensor = weight((64, 128))
    part = QuantizedTensor(tensor.packed[8:40], tensor.scales[8:40], tensor.exponents[8:40])
    parts = (part.packed, part.scales, part.exponents)
    wide = torch.randn(3, 2, 256, device=DEVICE).half()
    for x in (wide[:, 0, :128], wide[0, 0, ::2], wide.permute(2, 0, 1)[:128].permute(1, 2, 0)):
        y = operations.linear(x, *parts, None, "triton")
        assert y.shape == (*x.shape[:-1], 32)
        flat = x.reshape(-1, 128)
        assert relative_error(y.reshape(-1, 32), flat, part) < 1e-3


def test_weights_that_are_not_aligned_or_not_contiguous():
    tensor = weight((32, 256))
    x = torch.randn(1, 256, device=DEVICE).half()
    shifted = torch.empty(32 * 256 + 1, dtype=torch.uint8, device=DEVICE)[1:].view(32, 256)
    shifted.copy_(tensor.packed)
    columns = tensor.packed.T.contiguous().T
    for packed in (shifted, columns):
        y = operations.linear(x, packed, tensor.scales, tensor.exponents, None, "triton")
        assert relative_error(y, x, tensor) < 1e-3
    scales = tensor.scales.T.contiguous().T
    y = operations.linear(x, tensor.packed, scales, tensor.exponents, None, "triton")
    assert relative_error(y, x, tensor) < 1e-3


def test_no_tokens():
    tensor = weight((16, 64))
    parts = (tensor.packed, tensor.scales, tensor.exponents)
    x = torch.empty(2, 0, 64, device=DEVICE).half()
    assert operations.linear(x, *parts, None, "triton").shape == (2, 0, 16)
    ids = torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert operations.embedding(ids, *parts, torch.float16, "triton").shape == (0, 64)


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
def test_embedding_reads_the_rows(scale_format, ids_dtype):
    tensor = weight((50, 576), 64, scale_format)
    parts = (tensor.packed, tensor.scales, tensor.exponents)
    ids = torch.tensor([[3, 0, 49], [3, 7, 7]], dtype=ids_dtype, device=DEVICE)
    rows = operations.embedding(ids, *parts, torch.float32, "triton")
    assert torch.equal(rows, dequantize(tensor)[ids.long()])


def test_an_id_outside_the_table_gives_nan():
    tensor = weight((4, 64))
    parts = (tensor.packed, tensor.scales, tensor.exponents)
    rows = operations.embedding(
        torch.tensor([4, -1, 1], device=DEVICE), *parts, torch.half, "triton"
    )
    assert rows[:2].isnan().all()
    assert rows[2].isfinite().all()


def test_exponents_at_the_ends_of_their_range():
    packed = torch.full((2, 32), 129, dtype=torch.uint8, device=DEVICE)
    codes = torch.full((2, 1), 255, dtype=torch.uint8, device=DEVICE)
    exponents = torch.tensor([-120, 100], dtype=torch.int8, device=DEVICE)
    x = torch.ones(1, 32, device=DEVICE)
    y = triton.product(x, packed, codes, exponents, None, lambda *_: EXACT["matmul"])
    assert y.tolist() == [[32 * 255 * 2.0**-120, 32 * 255 * 2.0**100]]


def test_a_row_does_not_depend_on_its_batch_in_the_invariant_backend():
    tensor = weight((40, 320))
    parts = (tensor.packed, tensor.scales, tensor.exponents)
    x = torch.randn(70, 320, device=DEVICE).half()
    together = operations.linear(x, *parts, None, "triton-invariant")
    assert relative_error(together, x, tensor) < 1e-3
    for tokens in (1, 17, 64):
        alone = operations.linear(x[:tokens], *parts, None, "triton-invariant")
        assert torch.equal(alone, together[:tokens])


def test_needs_a_gpu():
    assert triton.unavailable(torch.device("cpu")) == "needs a GPU"


def test_old_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    reason = triton.unavailable(torch.device("cuda"))
    assert reason == "needs compute capability 7.5, this GPU has 7.0"


def entry(tokens, shape, rows):
    return Entry(tokens, *shape, Config("matmul", rows=rows))


def test_the_table_gives_the_smallest_covering_batch_and_the_nearest_shape():
    exact = (entry(16, (4096, 4096), 1), entry(16, (28672, 4096), 2), entry(64, (4096, 4096), 3))
    table = Table(exact, (entry(1, (1, 1), 4),))
    assert table.find(9, (6144, 4096)).rows == 1
    assert table.find(16, (40000, 8192)).rows == 2
    assert table.find(17, (40000, 8192)).rows == 3
    assert table.find(5000, (40000, 8192)).rows == 3
    assert table.find(5, (7, 7), int8=True).rows == 4


def test_a_measured_table_comes_before_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tables.table_for.cache_clear()
    shipped = tables.table_for("sm_00")
    measured = Table((entry(4, (64, 64), 8),), (entry(4, (64, 64), 8),))
    path = tables.write_table("sm_00", measured)
    assert json.loads(path.read_text())["exact"][0]["config"]["rows"] == 8
    assert tables.table_for("sm_00") == measured != shipped
    tables.table_for.cache_clear()


def test_the_shipped_tables_answer_for_every_batch_and_shape():
    for architecture in ("sm_90", "sm_80", "sm_75", "gfx942"):
        table = tables.table_for(architecture)
        for tokens in (1, 5, 16, 100, 3000):
            for shape in ((4096, 4096), (128256, 8192), (8, 32)):
                for int8 in (False, True):
                    assert table.find(tokens, shape, int8=int8).kernel in triton.KERNELS


def in_order_of_lanes(values):
    """[.., tokens], each 16 of them as hopper_int8.cu reads ratios: pairs of t, t + 8 together."""
    tokens = torch.arange(values.shape[-1])
    place = tokens // 16 * 16 + tokens // 2 % 4 * 4 + tokens // 8 % 2 * 2 + tokens % 2
    turned = torch.empty_like(values)
    turned[..., place] = values
    return turned


@pytest.mark.parametrize(("tokens", "columns", "block"), [(3, 1000, 256), (35, 512, 128)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_activations_with_the_ratios_of_their_steps(tokens, columns, block, dtype):
    x = torch.randn(tokens, columns).to(dtype)
    x[0] = 0
    x[1, :block] = 0
    x[2] *= 1e-3
    (rounded,), found = triton.round_activations(x, 1, block, 16, with_ratios=True)
    num_blocks = -(-columns // block)
    padded = torch.zeros(tokens, num_blocks * block).double()
    padded[:, :columns] = x.double()
    largest = padded.reshape(tokens, num_blocks, block).abs().amax(dim=2)
    steps = torch.maximum(largest, largest.amax(dim=1, keepdim=True) * 2.0**-24) / 127
    steps = steps.clamp(min=1e-30).T
    assert torch.allclose(found[1, :, :tokens].double(), steps, rtol=1e-6)
    ratios = torch.cat([steps[:1], steps[:-1]]) / steps
    expected = in_order_of_lanes(torch.nn.functional.pad(ratios, (0, -tokens % 16), value=-1.0))
    known = expected >= 0
    assert torch.allclose(found[0].double()[known], expected[known], rtol=1e-5)
    exact = padded[:, :columns] / steps.T.repeat_interleave(block, dim=1)[:, :columns]
    assert (rounded.double() - exact).abs().max() < 0.501


def test_a_token_that_is_not_a_number_stays_so_when_rounded():
    x = torch.randn(2, 512).half()
    x[1, 300] = torch.inf
    _, found = triton.round_activations(x, 1, 256, 16, with_ratios=True)
    assert found[1, :, 0].isfinite().all()
    assert not found[1, 1, 1].isfinite()

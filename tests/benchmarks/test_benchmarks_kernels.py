"""benchmarks/kernels.py on the CPU: what is timed, refused and recorded, and how vLLM is called.

vLLM's operations stand here by the schemas of its 0.22.0 library, with what their names say in
plain torch: a call that its dispatcher would refuse is refused, a wrong layout is a wrong product.
"""

import math
from types import SimpleNamespace

import kernel_rivals
import kernels
import pytest
import torch
from kernel_rivals import Made, Rival

SCHEMAS = (
    "gptq_marlin_repack(Tensor b_q_weight, Tensor perm, SymInt size_k, SymInt size_n, int num_bits,"
    " bool is_a_8bit) -> Tensor",
    "marlin_gemm(Tensor a, Tensor? c_or_none, Tensor b_q_weight, Tensor? b_bias_or_none,"
    " Tensor b_scales, Tensor? a_scales, Tensor? global_scale, Tensor? b_zeros_or_none,"
    " Tensor? g_idx_or_none, Tensor? perm_or_none, Tensor workspace, int b_type_id, SymInt size_m,"
    " SymInt size_n, SymInt size_k, bool is_k_full, bool use_atomic_add, bool use_fp32_reduce,"
    " bool is_zp_float) -> Tensor",
    "machete_prepack_B(Tensor B, ScalarType a_type, int b_type, ScalarType? group_scales_type)"
    " -> Tensor",
    "machete_mm(Tensor A, Tensor B, int b_type, ScalarType? out_type, Tensor? group_scales,"
    " Tensor? group_zeros, int? group_size, Tensor? channel_scales, Tensor? token_scales,"
    " str? schedule) -> Tensor",
)
UINT8B128 = 42
SHAPE = (192, 256)


def of_words(words):
    """q [K, N] of int32 [K/4, N], whose bytes are those of four rows, the first one lowest."""
    k4, rows = words.shape
    values = torch.stack([(words >> 8 * i) & 255 for i in range(4)], dim=1)
    return values.reshape(4 * k4, rows).double() - 128


def multiplied(x, words, scales):
    by_column = scales.double().repeat_interleave(4 * len(words) // len(scales), dim=0)
    return (x.double() @ (of_words(words) * by_column)).half()


def repack(words, perm, size_k, size_n, num_bits, is_a_8bit):
    assert (words.dtype, words.shape) == (torch.int32, (size_k // 4, size_n))
    assert (words.is_contiguous(), len(perm), num_bits, is_a_8bit) == (True, 0, 8, False)
    return words.clone()


def marlin(x, c, words, bias, scales, a_scales, scale, zeros, g_idx, perm, space, number, *rest):
    order = [i + 8 * j for i in range(8) for j in range(8)]  # vLLM's get_scale_perms
    plain = torch.empty_like(scales).reshape(-1, 64)
    plain[:, order] = scales.reshape(-1, 64)
    assert number == UINT8B128
    assert rest == (len(x), *SHAPE, True, False, True, False)
    assert (c, bias, a_scales, scale) == (None,) * 4
    assert (len(zeros), len(g_idx), len(perm)) == (0, 0, 0)
    assert not space.any()
    return multiplied(x, words, plain.reshape(scales.shape))


def prepack(words, a_type, number, scales_type):
    assert (a_type, number, scales_type) == (torch.float16, UINT8B128, torch.float16)
    assert words.t().is_contiguous()
    return words.contiguous()


def machete(x, words, number, out, scales, zeros, group_size, channel, token, schedule):
    assert (number, group_size) == (UINT8B128, 128)
    assert [each for each in (out, zeros, channel, token, schedule) if each is not None] == []
    return multiplied(x, words, scales)


@pytest.fixture
def vllm(monkeypatch):
    """vLLM's operations in torch's dispatcher, under a name of their own."""
    library = torch.library.Library("vllm_by_its_schemas", "DEF")
    for schema, function in zip(SCHEMAS, (repack, marlin, prepack, machete), strict=True):
        library.define(schema)
        library.impl(schema.partition("(")[0], function, "CPU")
    operations = torch.ops.vllm_by_its_schemas
    monkeypatch.setattr(kernel_rivals, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(kernel_rivals, "vllm_operations", lambda: operations)
    monkeypatch.setattr(kernel_rivals, "uint8b128", lambda: UINT8B128)
    card = SimpleNamespace(multi_processor_count=4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    yield
    library._destroy()


@pytest.mark.parametrize("name", ["Marlin g128", "Machete g128"])
def test_vllms_kernels_are_called_by_their_schemas(vllm, name):
    rival = kernel_rivals.rivals(True)[name]
    kernel_rivals.check(rival.make(SHAPE), SHAPE[1], rival.most_error)


def test_a_wrong_product_is_not_timed():
    def make(shape):
        weight = torch.randn(shape)
        return Made(lambda x: x @ weight.half().T * 1.01, lambda: weight)

    with pytest.raises(ValueError, match=r"^relative error 1\.0e-02$"):
        kernel_rivals.check(make(SHAPE), SHAPE[1], kernel_rivals.MOST_ERROR)
    with pytest.raises(ValueError, match="relative error nan"):
        kernel_rivals.check(Made(lambda x: x * math.nan, lambda: torch.eye(8)), 8, 1.0)


def test_vllms_files_are_found_without_importing_it(monkeypatch, tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text("raise SystemError")
    types = "class scalar_types:\n    class uint8b128:\n        id = 7\n"
    (tmp_path / "vllm/scalar_type.py").write_text(types)
    monkeypatch.syspath_prepend(tmp_path)
    kernel_rivals.uint8b128.cache_clear()
    assert kernel_rivals.uint8b128() == 7
    kernel_rivals.uint8b128.cache_clear()


@pytest.fixture
def rows_of(monkeypatch):
    """(rivals, batches) -> the rows of a small shape."""

    def run(competitors, batches):
        monkeypatch.setitem(kernels.SHAPES, "qkv", SHAPE)
        monkeypatch.setattr(kernels, "DEVICE", torch.device("cpu"))
        monkeypatch.setattr(kernel_rivals, "DEVICE", torch.device("cpu"))
        monkeypatch.setattr(kernels.timing, "num_copies", lambda num_bytes: 2)
        rows = []
        vendor = {kernels.VENDOR: Rival(kernel_rivals.vendor, 2)}
        run = kernels.Run(vendor | competitors, batches, 1, 1e9, math.inf)
        kernels.measure_shape("qkv", run, rows.extend)
        return rows

    return run


def test_a_rival_that_fails_is_recorded_and_one_that_skips_is_not(rows_of):
    def fails(shape):
        raise RuntimeError("no such kernel\nmore")

    skips = Rival(kernel_rivals.vendor, 2, skips=lambda shape, tokens: tokens == 2)
    found = {
        (row["tokens"], row["kernel"]): row
        for row in rows_of({"bad": Rival(fails, 1), "some": skips}, [1, 2])
    }
    named = [(1, "float16"), (1, "bad"), (1, "some"), (2, "float16"), (2, "bad")]
    assert list(found) == named
    assert found[1, "bad"]["error"] == "RuntimeError: no such kernel"
    assert found[1, "some"]["microseconds"] > 0
    table = kernels.markdown(list(found.values()))
    assert "| bad | fails | fails |" in table
    assert table.splitlines()[-1].endswith(" |  |")


def test_gemlite_is_timed_where_it_brings_tiles():
    rival = kernel_rivals.rivals(True)["gemlite int8 row"]
    assert [m for m in (1, 2, 64) if not rival.skips("qkv", m)] == [1, 64]
    assert rival.skips("gate_up_70b", 1)


def test_rivals_are_selected_by_name(monkeypatch, capsys):
    assert list(kernels.selected(["Marlin g128"], True)) == ["float16", "Marlin g128"]
    monkeypatch.setattr("sys.argv", ["kernels.py", "--kernels", "marlin"])
    with pytest.raises(SystemExit):
        kernels.main()
    assert "error: no rival is called 'marlin'; here there are float16, " in capsys.readouterr().err

"""Plain INT8 of others kept bit for bit; FP8 and MXFP4 decoded, exactly or with the loss said."""

import pytest
import torch
from others import (
    linears,
    rewritten,
    rounded,
    with_linears,
    write_bitsandbytes,
    write_compressed,
    write_float8,
    write_mxfp4,
    write_torchao,
)
from safetensors.torch import load_file, save_file
from tiny import hashes, make_llama, tensors_of
from transformers import AutoModelForCausalLM

import halfweight
from halfweight.checkpoint.inspection import inspect
from halfweight.checkpoint.sources import open_source
from halfweight.conversion import shard_writer
from halfweight.conversion.verification import verify
from halfweight.errors import CheckpointError
from halfweight.memory.named_model import planned_model
from halfweight.quantization.numerics import quantize
from halfweight.quantization.scheme import Recipe, Scheme

SIZES = {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 4}
IDS = torch.tensor([[1, 5, 9, 200, 31]])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("eight") / "source", shard_size="1GB", **SIZES)


def kept(folder, name):
    """q and scales of a weight of our folder."""
    tensors, module = tensors_of(folder), name.removesuffix(".weight")
    packed = tensors[f"{module}.weight_packed"].view(torch.uint8)
    return packed.to(torch.int16) - 128, tensors[f"{module}.weight_scale"]


def assert_kept(theirs, out, source, expected):
    """What `expected(name, weight)` says of each linear is in our folder, to the bit."""
    report = halfweight.quantize(theirs, out)
    weights = tensors_of(source)
    assert len(linears(weights)) == 14
    for name in linears(weights):
        q, scales = expected(name.removesuffix(".weight"), weights[name])
        found_q, found_scales = kept(out, name)
        assert torch.equal(found_q, q.to(torch.int16)), name
        assert found_scales.dtype == scales.dtype
        assert torch.equal(found_scales, scales), name
    assert verify(out).problems == ()
    model = halfweight.load(out)
    resident = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())
    assert planned_model(str(theirs)).resident_bytes == report.resident_bytes == resident
    assert inspect(theirs).plan.disk_bytes == report.disk_bytes
    return report


def test_bitsandbytes_int8(source, tmp_path):
    theirs = write_bitsandbytes(source, tmp_path / "theirs")
    stored = load_file(theirs / "model.safetensors")

    def expected(name, weight):
        return stored[f"{name}.weight"], stored[f"{name}.SCB"][:, None] * torch.tensor(1 / 127)

    assert_kept(theirs, tmp_path / "out", source, expected)
    assert inspect(theirs).form == "a bitsandbytes 8-bit checkpoint"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", [None, 32, 64])
def test_torchao_int8(source, tmp_path, group_size, dtype):
    theirs = write_torchao(source, tmp_path / "theirs", group_size, dtype=dtype)
    assert_kept(
        theirs, tmp_path / "out", source, lambda _, weight: rounded(weight, group_size, dtype)
    )


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_compressed_tensors_int_quantized(source, tmp_path, strategy):
    """W8A8: the weights are taken, activations stay in 16 bits."""

    def scale_of(weight):
        rows = weight.float().abs().amax(1, keepdim=True) / 127
        return (rows if strategy == "channel" else rows.amax().reshape(1)).bfloat16()

    fields = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": strategy}
    more = {"input_scale": torch.ones(1), "input_zero_point": torch.zeros(1, dtype=torch.int8)}
    theirs = write_compressed(
        source, tmp_path / "theirs", "int-quantized", fields, scale_of, **more
    )
    stored = load_file(theirs / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8

    def expected(name, weight):
        scales = stored[f"{name}.weight_scale"].reshape(-1, 1).expand(len(weight), 1)
        return stored[f"{name}.weight"], scales

    assert_kept(theirs, tmp_path / "out", source, expected)


def test_zero_points_are_refused(source, tmp_path):
    theirs = write_torchao(source, tmp_path / "theirs", None, zero_point=3)
    with pytest.raises(CheckpointError, match="_weight_zero_point: not all are 0"):
        halfweight.quantize(theirs, tmp_path / "out")


def test_int8_of_weights_that_lie_as_k_by_n_is_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=320, n_positions=64, n_embd=64, n_layer=1, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "source")
    theirs = write_torchao(tmp_path / "source", tmp_path / "theirs", None)
    with pytest.raises(CheckpointError, match=r"INT8 of a layer whose weight lies as \[K, N\]"):
        halfweight.quantize(theirs, tmp_path / "out")


def test_scales_of_int8_that_do_not_fit_or_are_not_there(source, tmp_path):
    theirs = write_bitsandbytes(source, tmp_path / "theirs")
    shard = theirs / "model.safetensors"
    tensors = load_file(shard)
    name = "model.layers.0.mlp.down_proj"
    save_file(tensors | {f"{name}.SCB": torch.ones(7)}, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"SCB is F32 \[7\], expected floats \[192, K/G\]"):
        halfweight.quantize(theirs, tmp_path / "out")
    del tensors[f"{name}.SCB"]
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"down_proj\.weight is I8 and has no scales that are"
    ):
        halfweight.quantize(theirs, tmp_path / "out")


def decoded(theirs, name):
    """A weight as the source gives it to the conversion, in its dtype."""
    source = open_source(theirs)
    (tensor,) = (t for t in source.tensors if t.name == name)
    raw = torch.from_numpy(source.read(tensor, 0, tensor.num_bytes))
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[tensor.dtype]
    return raw.view(dtype).reshape(tensor.shape)


def by_blocks(data, scales, block):
    """FP8 times its scale, by repeating scales over whole blocks."""
    grid = scales.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return data.float() * grid[: data.shape[0], : data.shape[1]]


@pytest.mark.parametrize("block", [(128, 128), (64, 32)])
@pytest.mark.parametrize("powers", [True, False])
def test_fp8_in_blocks(source, tmp_path, caplog, block, powers):
    theirs = write_float8(source, tmp_path / "theirs", block, powers=powers)
    stored = load_file(theirs / "model.safetensors")
    for name in linears(tensors_of(source)):
        exact = by_blocks(stored[name], stored[f"{name}_scale_inv"], block)
        found = decoded(theirs, name)
        assert torch.equal(found, exact.bfloat16()), name
        assert torch.equal(found.float(), exact) == powers
    how = "exactly" if powers else "rounded by up to 0.39% of a weight"
    assert f"decoded from FP8 to BF16, {how}" in caplog.text
    report = halfweight.quantize(theirs, tmp_path / "out")
    name = "model.layers.1.mlp.down_proj.weight"
    expected = quantize(decoded(theirs, name), Scheme(64))
    assert torch.equal(kept(tmp_path / "out", name)[0], expected.packed.to(torch.int16) - 128)
    assert planned_model(str(theirs)).resident_bytes == report.resident_bytes
    assert verify(tmp_path / "out").problems == ()


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_fp8_of_compressed_tensors(source, tmp_path, strategy):
    def scale_of(weight):
        rows = weight.float().abs().amax(1, keepdim=True) / 448
        return (rows if strategy == "channel" else rows.amax().reshape(1)).bfloat16()

    fields = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    theirs = write_compressed(source, tmp_path / "theirs", "float-quantized", fields, scale_of)
    stored = load_file(theirs / "model.safetensors")
    for name in linears(tensors_of(source)):
        exact = stored[name].float() * stored[f"{name}_scale"].float()
        assert torch.equal(decoded(theirs, name), exact.bfloat16()), name
    assert inspect(theirs).form == "a compressed-tensors FP8 checkpoint"


@pytest.mark.parametrize(
    ("called", "config", "scale_of"),
    [
        ("an FP8 (fbgemm)", {"quant_method": "fbgemm_fp8"}, lambda w: w.amax(1, keepdim=True)),
        ("a ModelOpt FP8", {"quant_method": "modelopt", "quant_algo": "FP8"}, lambda w: w.amax()),
    ],
)
def test_fp8_of_fbgemm_and_of_modelopt(source, tmp_path, called, config, scale_of):
    """A scale a row, a scale a tensor; both have scales of inputs too, which are not for us."""

    def pack(name, weight):
        scale = scale_of(weight.float().abs()) / 448
        inputs = {f"{name}.input_scale_ub": torch.ones(1), f"{name}.input_scale": torch.ones(())}
        data = (weight.float() / scale).to(torch.float8_e4m3fn)
        return {f"{name}.weight": data, f"{name}.weight_scale": scale, **inputs}

    theirs = rewritten(source, tmp_path / "theirs", lambda t: with_linears(t, pack), **config)
    assert inspect(theirs).form == f"{called} checkpoint"
    stored = load_file(theirs / "model.safetensors")
    for name in linears(tensors_of(source)):
        exact = stored[name].float() * stored[f"{name}_scale"]
        assert torch.equal(decoded(theirs, name), exact.bfloat16()), name
    halfweight.quantize(theirs, tmp_path / "out")
    assert verify(tmp_path / "out").problems == ()


def test_fp8_scales_that_do_not_fit_are_not_there_or_make_no_sense(source, tmp_path):
    theirs = write_float8(source, tmp_path / "theirs", (64, 64))
    shard, tensors = theirs / "model.safetensors", load_file(theirs / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    faults = {
        r"weight_scale_inv is F32 \[3, 4\], expected a scale for each block": torch.ones(3, 4),
        "a scale is not positive and finite": torch.full((3, 5), torch.inf),
    }
    for match, value in faults.items():
        save_file(tensors | {f"{name}_scale_inv": value}, shard, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=match):
            halfweight.quantize(theirs, tmp_path / "out")
    del tensors[f"{name}_scale_inv"]
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="weight is F8_E4M3 without a scale"):
        halfweight.quantize(theirs, tmp_path / "out")
    tensors[f"{name}_scale_inv"] = torch.ones(3, 5)
    tensors[name].view(torch.uint8)[0, 7] = 0x7F
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"down_proj\.weight: 1 of .* not finite.*\[0, 7\]"):
        halfweight.quantize(theirs, tmp_path / "out")


def test_fp8_in_any_blocks_of_rows_gives_the_same_bytes(source, tmp_path, monkeypatch):
    theirs = write_float8(source, tmp_path / "theirs", (128, 128))
    halfweight.quantize(theirs, tmp_path / "one", Recipe(keep=("*q_proj*",)), jobs=1)
    monkeypatch.setattr(shard_writer, "BLOCK_BYTES", 1500)
    halfweight.quantize(theirs, tmp_path / "two", Recipe(keep=("*q_proj*",)))
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    """A tiny gpt-oss in 16 bits, and its experts in MXFP4."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("gpt_oss")
    config = GptOssConfig(
        hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_local_experts=4,
        num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        vocab_size=320, layer_types=["full_attention"],
    )  # fmt: skip
    GptOssForCausalLM(config).bfloat16().save_pretrained(root / "source")
    names = load_file(root / "source" / "model.safetensors")
    experts = [n for n in names if n.endswith(("gate_up_proj", "down_proj"))]
    assert len(experts) == 2
    return root / "source", write_mxfp4(root / "source", root / "theirs", experts), experts


def test_mxfp4_is_decoded_as_transformers_does(gpt_oss, caplog):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    _, theirs, experts = gpt_oss
    stored = load_file(theirs / "model.safetensors")
    for name in experts:
        expected = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
        assert torch.equal(decoded(theirs, name), expected)
    assert "decoded from MXFP4 to BF16, exactly" in caplog.text


def test_mxfp4_experts_are_written_in_16_bits_and_run(gpt_oss, tmp_path):
    source, theirs, experts = gpt_oss
    with pytest.raises(CheckpointError, match="experts fused in one tensor") as caught:
        halfweight.quantize(theirs, tmp_path / "out")
    assert "--keep '*experts*'" in caught.value.hint
    recipe = Recipe(keep=("*experts*",))
    report = halfweight.quantize(theirs, tmp_path / "out", recipe)
    assert planned_model(str(theirs), recipe).disk_bytes == report.disk_bytes
    reference = AutoModelForCausalLM.from_pretrained(source)
    for name in experts:
        reference.get_parameter(name).data = decoded(theirs, name)
    reference.save_pretrained(tmp_path / "reference")
    halfweight.quantize(tmp_path / "reference", tmp_path / "expected", recipe)
    found, expected = (halfweight.load(tmp_path / f) for f in ("out", "expected"))
    with torch.no_grad():
        assert torch.equal(found(IDS).logits, expected(IDS).logits)


@pytest.mark.parametrize(
    ("part", "value", "match"),
    [
        ("blocks", torch.zeros(4, 64, 32, dtype=torch.uint8), r"expected U8 \[E, M, H/32, 16\]"),
        ("scales", torch.zeros(4, 64, 3, dtype=torch.uint8), r"expected U8 \[4, 64, 2\]"),
    ],
)
def test_mxfp4_parts_that_do_not_fit(gpt_oss, tmp_path, part, value, match):
    _, theirs, experts = gpt_oss
    shard = theirs / "model.safetensors"
    before, tensors = shard.read_bytes(), load_file(shard)
    name = next(n for n in experts if n.endswith("gate_up_proj"))
    save_file(tensors | {f"{name}_{part}": value}, shard, metadata={"format": "pt"})
    try:
        with pytest.raises(CheckpointError, match=match):
            halfweight.quantize(theirs, tmp_path / "out", Recipe(keep=("*experts*",)))
    finally:
        shard.write_bytes(before)

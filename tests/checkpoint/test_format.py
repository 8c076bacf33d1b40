"""docs/format.md and docs/errors.md say what is so: a reader by the page, every message in it."""

import ast
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_llama, tensors_of

import halfweight
from halfweight.checkpoint import layout
from halfweight.conversion import convert
from halfweight.quantization.numerics import dequantize, quantize
from halfweight.quantization.scheme import Recipe, Scheme

DOCS = Path(__file__).parents[2] / "docs"
PACKAGE = Path(halfweight.__file__).parent
CONVERSION = [
    "quantization/scheme.py",
    *("checkpoint/headers.py", "checkpoint/layout.py", "checkpoint/shard.py"),
    *(
        "checkpoint/sources/__init__.py",
        "checkpoint/sources/folder.py",
        "checkpoint/sources/gguf.py",
        "checkpoint/sources/float8.py",
        "checkpoint/sources/gptq.py",
        "checkpoint/sources/int8_rows.py",
        "checkpoint/sources/mxfp4.py",
        "checkpoint/sources/int8_folder.py",
        "checkpoint/sources/matrices.py",
        "checkpoint/sources/turned.py",
    ),
    *("conversion/convert.py", "conversion/shard_writer.py", "conversion/verification.py"),
    *("conversion/workspace.py", "conversion/parts.py", "conversion/export.py"),
    *(f"conversion/exports/{name}.py" for name in ("form", "gptq", "gguf", "gguf_parameters")),
    *("conversion/exports/gguf_vocabulary.py", "model/loadability.py"),
]


def read_by_the_page(folder):
    """Weights by name, with nothing but json, struct and numpy."""
    raw = {}
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        assert (8 + length) % 64 == 0
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = (8 + length + at for at in entry["data_offsets"])
                assert begin % {"I64": 8, "I32": 4, "F32": 4}.get(entry["dtype"], 2) == 0
                raw[name] = (entry["dtype"], np.frombuffer(data[begin:end], np.uint8))
    weights = {}
    for name in raw:
        if name.endswith(".weight_packed"):
            module = name.removesuffix(".weight_packed")
            n, k = raw[f"{module}.weight_shape"][1].view(np.int64)
            assert raw[name][1].min() > 0
            q = raw[name][1].reshape(n, k).astype(np.float32) - 128
            dtype, scale_bytes = raw[f"{module}.weight_scale"]
            scales = as_numbers(dtype, scale_bytes).reshape(n, -1)
            weights[f"{module}.weight"] = q * np.repeat(scales, k // scales.shape[1], axis=1)
    return weights


def as_numbers(dtype, raw):
    if dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view({"F16": np.float16, "F32": np.float32}[dtype]).astype(np.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", [Scheme(64), Scheme("row", "float32")], ids=str)
def test_a_reader_written_from_the_page(tmp_path, monkeypatch, dtype, scheme):
    monkeypatch.setattr(layout, "MAX_SHARD_BYTES", 30_000)
    source = make_llama(tmp_path / "src", dtype=dtype)
    convert.quantize(source, tmp_path / "out", Recipe(scheme))
    found = read_by_the_page(tmp_path / "out")
    assert len(found) == 16
    for name, weight in tensors_of(source).items():
        if name in found:
            expected = dequantize(quantize(weight, scheme))
            assert np.array_equal(found[name], expected.numpy())


def keys(value):
    """The shape of a JSON value: its keys, with lists and maps of alike entries as one."""
    if isinstance(value, list):
        return [keys(value[0])] if value else []
    if isinstance(value, dict):
        alike = {"shards", "files", "tensors", "config_groups"}
        return {
            k: keys(next(iter(v.values()))) if k in alike and isinstance(v, dict) else keys(v)
            for k, v in value.items()
        }
    return type(value).__name__


def test_the_json_of_the_page_is_that_of_a_real_output(tmp_path):
    convert.quantize(make_llama(tmp_path / "src"), tmp_path / "out", Recipe(keep=("*k_proj*",)))
    blocks = re.findall(r"```json\n(.*?)```", (DOCS / "format.md").read_text(), re.DOTALL)
    config, manifest = map(json.loads, blocks)
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert keys(config) == keys(found["quantization_config"])
    written = json.loads((tmp_path / "out" / "halfweight.json").read_text())
    written["job"]["recipe"]["keep"] = []
    assert keys(manifest) == keys(written)


def messages(path):
    """The literal text of every error raised in a file."""
    makers = {"broken", "_unsupported", "CheckpointError", "UsageError", "DiskFullError"}
    makers |= {"HalfweightError", "InterruptedConversionError"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in makers and node.args:
            yield literal_parts(node.args[-1])


def literal_parts(node):
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return [p.value for p in parts if isinstance(p, ast.Constant) and isinstance(p.value, str)]


@pytest.mark.parametrize("module", CONVERSION)
def test_every_message_is_in_the_page(module):
    page = " ".join((DOCS / "errors.md").read_text().split())
    for parts in messages(PACKAGE / module):
        words = max((part.strip(" :;,()[]") for part in parts), key=len, default="")
        if len(words) > 5:
            assert words in page, words


def test_the_exit_codes_of_the_page_are_those_of_the_classes():
    from halfweight import errors

    rows = re.findall(r"^\| (\d+) \| (`.*?) \|", (DOCS / "errors.md").read_text(), re.MULTILINE)
    listed = {name: int(code) for code, names in rows for name in re.findall(r"`(\w+)`", names)}
    classes = [c for c in vars(errors).values() if isinstance(c, type)]
    assert listed == {c.__name__: c.exit_code for c in classes}

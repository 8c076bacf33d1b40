"""Every fault of a source: the message names what and where, nothing is published, exit code 4."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file
from tiny import INDEX, edit_json, make_llama, rewrite, tensors_of

from halfweight.checkpoint.headers import quantized_modules, read_headers, resolve
from halfweight.checkpoint.sources import open_source
from halfweight.conversion import convert
from halfweight.errors import CheckpointError
from halfweight.quantization.scheme import Recipe


@pytest.fixture
def source(tmp_path):
    return make_llama(tmp_path / "src")


def refused(source, match, recipe=None):
    """`quantize` refuses with this message before any work, with a hint; OUT does not appear."""
    out = source.parent / "out"
    with pytest.raises(CheckpointError, match=match) as caught:
        convert.quantize(source, out, recipe)
    assert caught.value.exit_code == 4
    assert caught.value.hint
    assert "\n" not in caught.value.message
    assert not out.exists()
    return caught.value


def shards(source):
    return sorted(source.glob("*.safetensors"))


def write_raw(shard, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_truncated_shard(source):
    shard = shards(source)[0]
    size = shard.stat().st_size
    os.truncate(shard, size - 100)
    refused(source, rf"{shard.name}: truncated: 100 bytes short, cut off: tensor \S+")
    os.truncate(shard, 5)
    refused(source, "5 bytes, too short for a safetensors file")


def test_trailing_bytes(source):
    with open(shards(source)[0], "ab") as file:
        file.write(b"xyz")
    refused(source, "3 bytes after the last tensor")


def test_missing_shard(source):
    shard = shards(source)[1]
    shard.unlink()
    refused(source, rf"{shard.name}: missing; {INDEX} puts tensor \S+ and \d+ more in it")


def test_tensor_in_the_index_but_absent(source):
    rewrite(source, lambda tensors: tensors.pop("lm_head.weight", None))
    refused(source, "lacks tensor lm_head.weight, which")


def test_tensor_not_in_the_index(source):
    def add(tensors):
        if "lm_head.weight" in tensors:
            tensors["extra.weight"] = torch.ones(4)

    rewrite(source, add)
    refused(source, f"holds tensor extra.weight, not listed in {INDEX}")


def test_one_tensor_in_two_shards(source):
    norm = tensors_of(source)["model.norm.weight"]

    def add(tensors):
        if "model.embed_tokens.weight" in tensors:
            tensors["model.norm.weight"] = norm

    rewrite(source, add)
    refused(source, r"holds tensor model.norm.weight, also in model-\S+ by")


def test_stale_single_file_beside_an_index(source):
    save_file({"a": torch.ones(1)}, source / "model.safetensors")
    refused(source, "both model.safetensors and .* which does not name it")


def test_shards_without_an_index(source):
    (source / INDEX).unlink()
    refused(source, r"\d+ safetensors files but no model.safetensors.index.json")


def test_broken_index(source):
    index = source / INDEX
    good = json.loads(index.read_text())["weight_map"]
    for text, match in (
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "expected a JSON object, found list"),
        ("{}", "missing required field `weight_map`"),
        ('{"weight_map": {"a": 1}}', r"Expected `str`, got `int` - at `\$.weight_map\[...\]`"),
    ):
        index.write_text(text)
        refused(source, match)
    index.write_text(json.dumps({"weight_map": good}))  # no metadata: accepted
    convert.quantize(source, source.parent / "out")


@pytest.mark.parametrize("name", ["../src/x", "/etc/passwd", "..", "a/b", "a\\b", ""])
def test_paths_that_leave_the_folder(source, name):
    edit_json(source / INDEX, weight_map={"a": name})
    refused(source, "is not a plain file name")


def test_links_that_leave_the_folder(source):
    shard = shards(source)[0]
    outside = source.parent / "outside.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)
    refused(source, "a link to .*outside.safetensors, outside the checkpoint")
    shard.unlink()
    outside.rename(shard)
    secret = source.parent / "secret.json"
    secret.write_text("{}")
    (source / "tokenizer_config.json").symlink_to(secret)
    refused(source, "a link to .*secret.json, outside the checkpoint")


def test_links_of_the_hub_cache_are_followed(source, tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(source.iterdir())):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    convert.quantize(snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()


def test_pickles(source):
    for path in (*shards(source), source / INDEX):
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"x")
    error = refused(source, r"pytorch_model.bin: a pickle.*expected .safetensors")
    assert "save_pretrained" in error.hint


def test_gguf_where_safetensors_are_needed(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(CheckpointError, match=r"model.gguf: a GGUF file, expected") as caught:
            read_headers(path)
        assert "halfweight quantize" in caught.value.hint


def test_already_quantized(source):
    convert.quantize(source, source.parent / "once")
    with pytest.raises(CheckpointError, match="already quantized by compressed-tensors"):
        convert.quantize(source.parent / "once", source.parent / "twice")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_eight_bit_weights_without_a_config_that_says_so(source, dtype):
    def narrow(tensors):
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"] = tensors["lm_head.weight"].to(dtype)

    rewrite(source, narrow)
    refused(source, r"already quantized: tensor lm_head.weight is \w+, expected 16 or 32 bits")


def test_fused_experts(source):
    def fuse(tensors):
        if "model.norm.weight" in tensors:
            tensors["model.layers.0.mlp.experts.gate_up_proj"] = torch.ones(2, 64, 64)

    rewrite(source, fuse)
    index = json.loads((source / INDEX).read_text())
    name = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.layers.0.mlp.experts.gate_up_proj"] = name
    edit_json(source / INDEX, **index)
    error = refused(
        source,
        r"tensor model.layers.0.mlp.experts.gate_up_proj: experts fused .* \[2, 64, 64\]",
    )
    assert "--keep" in error.hint
    convert.quantize(source, source.parent / "out", Recipe(keep=("*experts*",)))


@pytest.mark.parametrize(
    ("length", "match"),
    [
        (2**63, "header of 9223372036854775808 bytes, expected at most"),
        (100_000_001, "header of 100000001 bytes, expected at most"),
        (10**6, "header of 1000000 bytes, expected at most"),
    ],
)
def test_header_length_beyond_the_file(source, length, match):
    shard = shards(source)[0]
    shard.write_bytes(struct.pack("<Q", length) + b"{}" * 50)
    refused(source, match)


def test_shards_that_cannot_be_read(source):
    shard = shards(source)[0]
    shard.unlink()
    shard.mkdir()
    refused(source, "not a regular file")
    shard.rmdir()
    os.mkfifo(shard)
    refused(source, "not a regular file")


def test_a_shard_that_gets_shorter_while_it_is_read(source, tmp_path):
    shard = shards(source)[0]
    found = open_source(source)
    (tensor, *_) = (t for t in read_headers(source).tensors if t.shard == shard)
    os.truncate(shard, tensor.begin + 10)
    with pytest.raises(CheckpointError, match=rf"ended at byte {tensor.begin + 10}, inside"):
        found.read(tensor.info, 0, tensor.info.num_bytes)


def test_json_over_the_cap_is_not_read(source):
    os.truncate(source / "config.json", 100_000_001)
    refused(source, "config.json: 100000001 bytes of JSON, expected at most 100000000")


def test_a_header_over_the_cap_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(300_000_000)
    with pytest.raises(CheckpointError, match="expected at most 100000000"):
        read_headers(path)


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (b"not json", "header is not JSON"),
        (b"[1]", "header is a list, expected an object"),
        (b'{"a": {}, "a": {}}', "header names a twice"),
        ({"a": 1}, "tensor a: header entry is not an object"),
        ({"a": {**GOOD, "dtype": "F128"}}, "tensor a: dtype 'F128' is not known"),
        ({"a": {**GOOD, "shape": [-2]}}, r"bad shape \[-2\]"),
        ({"a": {**GOOD, "shape": [2.0]}}, r"bad shape \[2.0\]"),
        ({"a": {**GOOD, "shape": [2**62, 4]}}, "8 bytes of data, but F32"),
        ({"a": {**GOOD, "data_offsets": [0]}}, r"data_offsets \[0\]"),
        ({"a": {**GOOD, "data_offsets": [8, 0]}}, "-8 bytes of data"),
        ({"a": {**GOOD, "data_offsets": [4, 12]}}, "tensor a leaves a hole before it"),
        ({"a": GOOD, "b": {**GOOD, "data_offsets": [4, 12]}}, "tensor b overlaps another"),
    ],
)
def test_broken_headers(tmp_path, header, match):
    write_raw(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError, match=match):
        read_headers(tmp_path)


def test_no_fuzzed_header_escapes_as_another_error(source, tmp_path):
    """Any damage of header bytes is either harmless or a CheckpointError, never a traceback."""
    shard = shards(source)[0]
    data = shard.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    generator = torch.Generator().manual_seed(0)
    caught = 0
    path = tmp_path / "fuzzed.safetensors"
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            at = int(torch.randint(0, 8 + length, (), generator=generator))
            damaged[at] = int(torch.randint(0, 256, (), generator=generator))
        path.write_bytes(damaged)
        try:
            found = read_headers(path)
        except CheckpointError:
            caught += 1
        else:
            assert found.tensors[-1].end == len(data)
    assert caught > 200


def test_not_a_model(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        convert.quantize(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        convert.quantize(tmp_path, tmp_path / "out")
    save_file({"a.weight": torch.ones(64, 64)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no config.json, expected a model folder"):
        convert.quantize(tmp_path, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"a single file, expected a model folder or a .gguf"):
        convert.quantize(tmp_path / "model.safetensors", tmp_path / "out")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read as JSON"):
        convert.quantize(tmp_path, tmp_path / "out")


def test_a_hub_id_that_cannot_be_had(monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"org/name: not a path .* \(ConnectionError\)"):
        resolve("org/name")
    with pytest.raises(CheckpointError, match="no/such/path: no such file or folder"):
        resolve("no/such/path")


def test_packed_modules_that_halfweight_does_not_run(source, tmp_path):
    out = tmp_path / "out"
    convert.quantize(source, out)
    config = json.loads((out / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    group["num_bits"] = 4
    edit_json(out / "config.json", **config)
    with pytest.raises(CheckpointError, match="this is a compressed-tensors 4-bit checkpoint"):
        quantized_modules(read_headers(out))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("lm_head.weight_scale"), "weight_packed but no weight_scale"),
        (lambda t: t.pop("lm_head.weight_shape"), "weight_packed but no weight_shape"),
        (
            lambda t: t.update({"lm_head.weight_zero_point": torch.zeros(1)}),
            "has weight_zero_point, expected symmetric groups in order",
        ),
        (
            lambda t: t.update({"lm_head.weight_scale": torch.ones(7, 1)}),
            r"lm_head is I32 \[320, 16\] with scales \[7, 1\], expected",
        ),
        (
            lambda t: t.update({"lm_head.weight_packed": torch.zeros(320, 64)}),
            r"lm_head is F32 \[320, 64\]",
        ),
    ],
)
def test_incomplete_packed_modules(source, tmp_path, change, match):
    out = tmp_path / "out"
    convert.quantize(source, out)
    tensors = tensors_of(out)
    change(tensors)
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(CheckpointError, match=match):
        quantized_modules(read_headers(out))

"""`verify` finds any damage of a finished folder; `inspect` counts bytes from headers alone."""

import json
import os
import struct

import numpy as np
import pytest
import torch
from llama_sizes import LLAMA_8B, llama_tensors
from safetensors.torch import save_file
from tiny import HIDDEN, VOCAB, edit_json, make_llama, tensors_of

import halfweight
from halfweight.checkpoint.headers import read_headers
from halfweight.checkpoint.inspection import inspect
from halfweight.checkpoint.layout import header
from halfweight.checkpoint.manifest import file_sha256
from halfweight.conversion import convert
from halfweight.conversion.verification import check_structure, verify
from halfweight.errors import CheckpointError
from halfweight.quantization.scheme import Recipe, Scheme


@pytest.fixture
def out(tmp_path):
    convert.quantize(make_llama(tmp_path / "src"), tmp_path / "out")
    return tmp_path / "out"


def only_problem(out):
    found = verify(out)
    assert len(found.problems) == 1, found.problems
    return found.problems[0]


def test_a_good_folder_has_no_problems(out):
    seen = []
    found = verify(out, lambda name, done, total: seen.append((name, done, total)))
    assert (found.problems, found.notes) == ((), ())
    assert found.num_files == len(seen) == len(list(out.iterdir())) - 1
    assert seen[-1][1] == seen[-1][2] == found.num_bytes


@pytest.mark.parametrize("at", [0.001, 0.3, 0.7, 0.999])
def test_one_flipped_bit_is_found(out, at):
    shard = out / "model.safetensors"
    position = int(shard.stat().st_size * at)
    with open(shard, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 4]))
    assert any("model.safetensors: sha256" in problem for problem in verify(out).problems)


def test_damaged_files_are_all_listed(out):
    (out / "tokenizer.json").write_text("changed, same?")
    (out / "generation_config.json").unlink()
    (out / "README.md").write_bytes((out / "README.md").read_bytes().replace(b"INT8", b"INT4"))
    problems = sorted(verify(out).problems)
    assert len(problems) == 3
    assert "README.md: sha256" in problems[0]
    assert "generation_config.json: missing, expected" in problems[1]
    assert "tokenizer.json: 14 bytes, expected 18" in problems[2]


def test_a_truncated_shard_is_named_with_its_tensors(out):
    os.truncate(out / "model.safetensors", 50_000)
    problems = verify(out).problems
    assert "model.safetensors: 50000 bytes, expected" in problems[0]
    assert "truncated" in problems[1]


def test_no_manifest_or_a_broken_one(out):
    manifest = out / "halfweight.json"
    edit_json(manifest, files={"../x": {"bytes": 1, "sha256": "0"}})
    assert "'../x' is not a plain file name" in only_problem(out)
    edit_json(manifest, files={"x": {"bytes": "1"}})
    assert "halfweight.json: Expected `int`, got `str` - at `$.files[...].bytes`" in only_problem(
        out
    )
    manifest.write_text("{")
    assert "cannot be read as JSON" in only_problem(out)
    manifest.unlink()
    found = verify(out)
    assert found.problems == ()
    assert "no halfweight.json: files are not compared" in found.notes[0]


def test_what_save_pretrained_wrote_is_sound_not_damaged(out, tmp_path, capsys):
    from command_line import run

    saved = tmp_path / "saved"
    halfweight.load(out).save_pretrained(saved)
    code, text, err = run(capsys, "verify", str(saved))
    assert code == 0, err
    assert "sound, and the model loads" in text
    assert "not compared" in err
    spoil = next(saved.glob("*.safetensors"))
    os.truncate(spoil, 50_000)
    code, _, err = run(capsys, "verify", str(saved))
    assert code == 5
    assert "truncated" in err


def replace_tensors(out, change):
    """Change tensors and the manifest with them, as a buggy writer would."""
    tensors = tensors_of(out)
    change(tensors)
    shard = out / "model.safetensors"
    save_file(tensors, shard, metadata={"format": "pt"})
    manifest = json.loads((out / "halfweight.json").read_text())
    entry = {"bytes": shard.stat().st_size, "sha256": file_sha256(shard)}
    manifest["shards"]["model.safetensors"] |= entry
    edit_json(out / "halfweight.json", **manifest)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_scales_must_be_positive_and_finite(out, value):
    def spoil(tensors):
        tensors["lm_head.weight_scale"][4, 0] = value

    replace_tensors(out, spoil)
    expected = f"lm_head.weight_scale: 1 of {VOCAB} scales not positive and finite, first"
    assert expected in only_problem(out)


def test_the_shape_record_must_be_true(out):
    replace_tensors(out, lambda tensors: tensors["lm_head.weight_shape"].fill_(3))
    assert f"lm_head.weight_shape says [3, 3], data is [{VOCAB}, {HIDDEN}]" in only_problem(out)


def test_group_sizes_must_be_those_of_the_config(out):
    def halve(tensors):
        tensors["lm_head.weight_scale"] = torch.ones(VOCAB, 2)

    replace_tensors(out, halve)
    assert "gives lm_head group size 64, its scales 32" in only_problem(out)


def test_every_module_has_a_config_group(out):
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["ignore"].append("lm_head")
    edit_json(out / "config.json", **config)
    with pytest.raises(CheckpointError, match="no config group for lm_head"):
        check_structure(out)


def test_the_model_must_load(out):
    replace_tensors(out, lambda tensors: tensors.pop("model.norm.weight"))
    assert "no weights for tensor model.norm.weight" in only_problem(out)


def test_a_16_bit_folder_is_not_verified(tmp_path):
    source = make_llama(tmp_path / "src")
    with pytest.raises(CheckpointError, match="no quantized module in it"):
        check_structure(source)


def test_inspect_counts_every_byte(out, tmp_path):
    found = inspect(out)
    assert found.data_bytes == read_headers(out).num_bytes
    assert list(found.bytes_by_kind) == ["int8", "scales", "shape_records", "BF16"]
    num_weights = found.num_params - 5 * HIDDEN
    assert found.bytes_by_kind["int8"] == num_weights
    assert found.bytes_by_kind["scales"] == num_weights // 64 * 2
    assert found.bytes_by_kind["shape_records"] == 16 * 16
    assert found.plan is None
    by_name = {entry.name: entry for entry in found.entries}
    embedding = by_name["model.embed_tokens.weight"]
    assert (embedding.kind, embedding.group_size, embedding.shape) == ("int8", 64, (VOCAB, HIDDEN))
    assert embedding.bits_per_weight == pytest.approx(8 + 16 / 64 + 8 * 16 / (VOCAB * HIDDEN))
    assert by_name["model.norm.weight"].bits_per_weight == 16
    source = inspect(tmp_path / "src")
    assert source.num_params == found.num_params
    assert source.plan is not None
    assert source.plan.disk_bytes == found.data_bytes
    assert source.plan.resident_bytes == found.resident_bytes


@pytest.mark.parametrize("scheme", [Scheme("row"), Scheme(32, "float32"), Scheme(64, "bfloat16")])
def test_inspect_tells_the_bytes_in_memory(tmp_path, scheme):
    source = make_llama(tmp_path / "src")
    report = convert.quantize(source, tmp_path / "out", Recipe(scheme))
    assert inspect(tmp_path / "out").resident_bytes == report.resident_bytes
    (tmp_path / "out" / "halfweight.json").unlink()
    assert inspect(tmp_path / "out").resident_bytes == report.resident_bytes


def test_inspect_works_on_one_file(tmp_path):
    save_file({"a": torch.ones(3, dtype=torch.int32)}, tmp_path / "x.safetensors")
    found = inspect(tmp_path / "x.safetensors")
    assert found.bytes_by_kind == {"I32": 12}
    assert found.bits_per_weight == 32


def make_sparse(folder, tensors):
    """A checkpoint of headers over sparse files: real sizes, no data."""
    folder.mkdir()
    first = header(tensors)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with open(folder / "model.safetensors", "wb") as file:
        file.write(first)
        file.truncate(len(first) + sum(tensor.num_bytes for tensor in tensors))
    return folder


def test_llama_3_8b_from_headers_to_the_byte(tmp_path):
    """The table of the design: 16.061 GB; INT8 8.095 GB resident, 8.156 GB of scales in 2 bytes."""
    folder = make_sparse(tmp_path / "llama-3-8b", list(llama_tensors(*LLAMA_8B)))
    found = inspect(folder)
    assert found.num_params == 8_030_261_248
    assert found.data_bytes == 16_060_522_496
    num_norms = 65 * 4096
    num_weights = found.num_params - num_norms
    num_rows = 2 * 128256 + 32 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096)
    resident = num_weights + num_weights // 128 + num_rows + 2 * num_norms
    disk = num_weights + num_weights // 128 * 2 + 2 * num_norms + 16 * (32 * 7 + 2)
    assert found.plan is not None
    assert found.plan.resident_bytes == resident
    assert found.plan.disk_bytes == disk
    assert round(resident / 1e9, 3) == 8.095
    assert round(disk / 1e9, 3) == 8.156
    assert f"{1 - resident / found.data_bytes:.2%}" == "49.60%"
    assert f"{1 - disk / found.data_bytes:.1%}" == "49.2%"
    assert (folder / "model.safetensors").stat().st_blocks * 512 < 1e6  # no byte of data exists


def test_header_bytes_are_what_safetensors_reads(out):
    with open(out / "model.safetensors", "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        assert (8 + length) % 64 == 0
        assert np.frombuffer(file.read(length), np.uint8)[-1] in b" }"

"""The converter on small models: what is written, when it is published, what it refuses."""

import errno
import json
import logging
import os
import shutil
import stat
import sys
from threading import Event

import pytest
import torch
from safetensors.torch import save_file
from tiny import FFN, HIDDEN, INDEX, VOCAB, edit_json, hashes, make_llama, rewrite, tensors_of
from traced_memory import peak_bytes

import halfweight
from halfweight.checkpoint import layout
from halfweight.checkpoint.headers import quantized_modules, read_headers
from halfweight.conversion import convert
from halfweight.conversion.workspace import Workspace, workspace_folder
from halfweight.errors import (
    CheckpointError,
    DiskFullError,
    HalfweightError,
    InterruptedConversionError,
    UsageError,
)
from halfweight.model import loadability
from halfweight.quantization import numerics
from halfweight.quantization.scheme import Recipe, Scheme


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(layout, "MAX_SHARD_BYTES", 30_000)


def stored_weight(tensors, module):
    packed = tensors[f"{module}.weight_packed"].view(torch.uint8)
    return packed, tensors[f"{module}.weight_scale"].float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(),
        Scheme(32, "bfloat16"),
        Scheme(64, "float16", "absmax"),
        Scheme(64, "float32"),
        Scheme("row"),
        Scheme(64, "grid8", "absmax"),
    ],
    ids=str,
)
def test_every_weight_is_that_of_the_definition(tmp_path, dtype, scheme):
    source = make_llama(tmp_path / "src", dtype=dtype)
    report = convert.quantize(source, tmp_path / "out", Recipe(scheme))
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    error = norm = 0.0
    for name, weight in before.items():
        if weight.dim() != 2:
            assert torch.equal(after[name], weight)
            continue
        module = name.removesuffix(".weight")
        expected = numerics.quantize(weight, scheme.for_in_features(weight.shape[1]))
        packed, scales = stored_weight(after, module)
        assert torch.equal(packed, expected.packed)
        assert torch.equal(scales, numerics.scales_float32(expected.scales, expected.exponents))
        assert after[f"{module}.weight_shape"].tolist() == list(weight.shape)
        difference = numerics.dequantize(expected).double() - weight.double()
        error += float(difference.square().sum())
        norm += float(weight.double().square().sum())
    assert report.num_quantized == sum(w.dim() == 2 for w in before.values()) == 16
    assert report.relative_error == pytest.approx((error / norm) ** 0.5, rel=1e-4)


def test_planned_bytes_are_the_bytes_on_disk(llama, tmp_path):
    report = convert.quantize(llama, tmp_path / "out")
    out = read_headers(tmp_path / "out")
    assert report.disk_bytes == out.num_bytes
    weights = quantized_modules(out)
    assert weights["model.layers.1.mlp.down_proj"].shape == (HIDDEN, FFN)
    assert weights["model.embed_tokens"].shape == weights["lm_head"].shape == (VOCAB, HIDDEN)


def test_tensors_are_aligned_to_their_own_size(llama, tmp_path):
    convert.quantize(llama, tmp_path / "out", Recipe(keep=("*k_proj*",)))
    for tensor in read_headers(tmp_path / "out").tensors:
        assert tensor.begin % {"I64": 8, "I32": 4, "BF16": 2}[tensor.info.dtype] == 0


def test_what_lies_beside_the_shards(llama, tmp_path):
    out = tmp_path / "out"
    convert.quantize(llama, out, Recipe(Scheme(64)))
    assert (out / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == json.loads((llama / "generation_config.json").read_text())
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    card = (out / "README.md").read_text()
    assert f"base_model: {llama.name}\nbase_model_relation: quantized" in card
    assert "one scale for each group of 64 weights along the input" in card
    manifest = json.loads((out / "halfweight.json").read_text())
    shards = manifest["job"]["source"]["shards"]
    assert [s["name"] for s in shards] == sorted(p.name for p in llama.glob("*.safetensors"))
    assert manifest["job"]["recipe"]["scheme"]["group_size"] == 64
    found = hashes(out)
    listed = {**manifest["shards"], **manifest["files"]}
    assert found.keys() - listed == {"halfweight.json"}
    assert {name: entry["sha256"] for name, entry in listed.items()} == {
        name: digest for name, digest in found.items() if name != "halfweight.json"
    }
    errors = [t for shard in manifest["shards"].values() for t in shard["tensors"].values()]
    assert len(errors) == 16
    assert all(0 < t["squared_error"] < 1e-3 * t["squared_norm"] for t in errors)


def test_no_path_of_this_machine_is_written(llama, tmp_path):
    convert.quantize(llama, tmp_path / "out")
    for path in (tmp_path / "out").glob("*"):
        assert str(tmp_path).encode() not in path.read_bytes()
        assert str(llama.parent).encode() not in path.read_bytes()


def test_the_same_bytes_whatever_the_threads(llama, tmp_path, small_shards, monkeypatch):
    from halfweight.conversion import shard_writer

    convert.quantize(llama, tmp_path / "one", jobs=1)
    monkeypatch.setattr(shard_writer, "BLOCK_BYTES", 1000)
    convert.quantize(llama, tmp_path / "many", jobs=5)
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 3
    assert hashes(tmp_path / "one") == hashes(tmp_path / "many")


def test_mixed_group_sizes_go_into_config_groups(llama, tmp_path):
    convert.quantize(llama, tmp_path / "out", Recipe(Scheme(64)))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert [g["weights"]["group_size"] for g in config["config_groups"].values()] == [64]
    source = make_llama(tmp_path / "src", head_dim=32)  # o_proj: K = 128
    report = convert.quantize(source, tmp_path / "both")
    config = json.loads((tmp_path / "both" / "config.json").read_text())["quantization_config"]
    by_size = {g["weights"]["group_size"]: g["targets"] for g in config["config_groups"].values()}
    assert by_size[128] == [r"re:(.*\.)?o_proj$"]
    assert r"re:(.*\.)?q_proj$" in by_size[64]
    assert any("128 does not divide 64" in note for note in report.notes)
    assert "each group of 64 or 128 weights" in (tmp_path / "both" / "README.md").read_text()
    convert.quantize(llama, tmp_path / "rows", Recipe(Scheme("row")))
    assert "one scale for each row along" in (tmp_path / "rows" / "README.md").read_text()


def test_kept_tensors_stay_as_they_were(llama, tmp_path):
    convert.quantize(llama, tmp_path / "out", Recipe(keep=("*embed*", "lm_head.weight")))
    before, after = tensors_of(llama), tensors_of(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(before[name], after[name])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert set(config["ignore"]) == {"model.embed_tokens", "lm_head"}


def test_a_tied_head_is_written_once(tmp_path):
    source = make_llama(tmp_path / "src", tied=True, shard_size="10MB")
    convert.quantize(source, tmp_path / "out")
    embedding = tensors_of(source)["model.embed_tokens.weight"]

    def add_copy(tensors):
        tensors["lm_head.weight"] = embedding.clone()

    rewrite(source, add_copy)
    convert.quantize(source, tmp_path / "from-copy")
    names = tensors_of(tmp_path / "from-copy").keys()
    assert names == tensors_of(tmp_path / "out").keys()
    assert not any(name.startswith("lm_head") for name in names)

    def spoil(tensors):
        tensors["lm_head.weight"] = embedding + 1

    rewrite(source, spoil)
    convert.quantize(source, tmp_path / "own")
    assert "lm_head.weight_packed" in tensors_of(tmp_path / "own")
    model = halfweight.load(tmp_path / "own")
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert not torch.equal(head.weight_packed, table.weight_packed)


def test_the_umask_is_honoured(llama, tmp_path):
    before = os.umask(0o027)
    try:
        convert.quantize(llama, tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    for path in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path


def test_float16_scales_are_float16_where_exact_and_bfloat16_where_not(tmp_path):
    source = make_llama(tmp_path / "src", dtype=torch.float16)

    def shrink(tensors):
        for name in tensors:
            if name.endswith("0.mlp.up_proj.weight"):
                tensors[name] = tensors[name] / 1024

    rewrite(source, shrink)
    convert.quantize(source, tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    assert after["model.layers.1.mlp.up_proj.weight_scale"].dtype == torch.float16
    assert after["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.bfloat16


def test_a_crushed_group_is_named(tmp_path):
    source = make_llama(tmp_path / "src")

    def spike(tensors):
        if "lm_head.weight" in tensors:
            weight = tensors["lm_head.weight"].clone()
            weight[3, 5] = 1e4
            tensors["lm_head.weight"] = weight

    rewrite(source, spike)
    report = convert.quantize(source, tmp_path / "out")
    assert any(
        note.startswith("lm_head.weight: in 1 groups one weight is so large")
        for note in report.notes
    )


def test_progress_adds_up(llama, tmp_path):
    seen = []
    report = convert.quantize(llama, tmp_path / "out", progress=seen.append)
    assert seen[-1].done_bytes == seen[-1].total_bytes == report.source_bytes
    assert {p.tensor for p in seen} == set(tensors_of(llama))


def test_an_occupied_output_is_refused_then_replaced(llama, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    convert.quantize(llama, out)  # an empty folder is no obstacle
    first = hashes(out)
    with pytest.raises(UsageError, match="exists and is not empty") as caught:
        convert.quantize(llama, out, Recipe(Scheme(32)))
    assert "--overwrite" in caught.value.hint
    assert hashes(out) == first
    convert.quantize(llama, out, Recipe(Scheme(32)), overwrite=True)
    assert hashes(out) != first
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="a file is in the way"):
        convert.quantize(llama, tmp_path / "file")
    with pytest.raises(UsageError, match="the source is in it"):
        convert.quantize(llama, llama.parent, overwrite=True)


def test_the_same_job_again_is_already_complete(llama, tmp_path, caplog):
    out = tmp_path / "out"
    convert.quantize(llama, out)
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    with caplog.at_level(logging.WARNING):
        report = convert.quantize(llama, out)
    assert "already complete" in caplog.text
    assert report.resumed_shards == 1
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before


def test_two_conversions_to_one_output_are_refused(llama, tmp_path):
    out = tmp_path / "out"
    with (
        Workspace(out, {}, []),
        pytest.raises(HalfweightError, match="another process is converting to it"),
    ):
        convert.quantize(llama, out)
    convert.quantize(llama, out)


def test_stop_keeps_finished_shards_and_the_next_run_resumes(llama, tmp_path, small_shards):
    convert.quantize(llama, tmp_path / "whole")
    out, stop = tmp_path / "out", Event()
    stop.set()
    with pytest.raises(InterruptedConversionError, match=r"interrupted; 1 of \d+ parts kept"):
        convert.quantize(llama, out, stop=stop)
    assert not out.exists()
    report = convert.quantize(llama, out)
    assert report.resumed_shards == 1
    assert hashes(out) == hashes(tmp_path / "whole")


def test_a_resumed_shard_that_changed_is_made_again(llama, tmp_path, small_shards, caplog):
    convert.quantize(llama, tmp_path / "whole")
    out, stop = tmp_path / "out", Event()
    stop.set()
    with pytest.raises(InterruptedConversionError):
        convert.quantize(llama, out, stop=stop)
    (shard,) = (workspace_folder(out) / "checkpoint").glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert convert.quantize(llama, out).resumed_shards == 0
    assert "changed since it was written" in caplog.text
    assert hashes(out) == hashes(tmp_path / "whole")


def test_another_recipe_starts_afresh(llama, tmp_path, small_shards):
    out, stop = tmp_path / "out", Event()
    stop.set()
    with pytest.raises(InterruptedConversionError):
        convert.quantize(llama, out, stop=stop)
    recipe = Recipe(Scheme(32))
    assert convert.quantize(llama, out, recipe).resumed_shards == 0
    convert.quantize(llama, tmp_path / "whole", recipe)
    assert hashes(out) == hashes(tmp_path / "whole")


def test_a_source_changed_meanwhile_is_an_error(llama, tmp_path):
    source = make_llama(tmp_path / "src")
    shard = next(source.glob("*.safetensors"))
    with pytest.raises(CheckpointError, match="a file changed while it was read"):
        convert.quantize(source, tmp_path / "out", progress=lambda _: os.utime(shard))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_refused_before_any_work(llama, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskFullError, match=r"needs \d+ bytes more, 1000 are free") as caught:
        convert.quantize(llama, tmp_path / "out")
    assert caught.value.hint.startswith("free ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", [1, 3, 7, 20])
def test_a_disk_that_fills_up_keeps_the_journal(llama, tmp_path, small_shards, monkeypatch, call):
    convert.quantize(llama, tmp_path / "whole")
    write, calls = os.pwrite, iter(range(10**6))

    def full(*arguments):
        if next(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(DiskFullError, match=r"disk is full after \d+ finished") as caught:
            convert.quantize(llama, tmp_path / "out")
    assert "finished parts are kept" in caught.value.hint
    assert not (tmp_path / "out").exists()
    convert.quantize(llama, tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_short_writes_are_completed(llama, tmp_path, monkeypatch):
    convert.quantize(llama, tmp_path / "whole")
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, memoryview(data)[:1000], at))
    convert.quantize(llama, tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(tmp_path, value):
    source = make_llama(tmp_path / "src")

    def spoil(tensors):
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
            tensors["lm_head.weight"][7, 3] = value
            tensors["lm_head.weight"][300, 2] = value

    rewrite(source, spoil)
    total = VOCAB * HIDDEN
    expected = rf"tensor lm_head.weight: 2 of {total} weights not finite, first \w+ at \[7, 3\]"
    with pytest.raises(CheckpointError, match=expected) as caught:
        convert.quantize(source, tmp_path / "out")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_a_kept_weight_that_is_not_finite_is_named_too(tmp_path, monkeypatch, name):
    from halfweight.conversion import shard_writer

    source = make_llama(tmp_path / "src")

    def spoil(tensors):
        if name in tensors:
            tensors[name] = tensors[name].clone()
            tensors[name].view(-1)[-2:] = float("inf")

    rewrite(source, spoil)
    monkeypatch.setattr(shard_writer, "BLOCK_BYTES", 64)
    last = r"\[62\]" if "norm" in name else r"\[319, 62\]"
    with pytest.raises(CheckpointError, match=rf"tensor {name}: 2 of .* first inf at {last}"):
        convert.quantize(source, tmp_path / "out", Recipe(keep=("*embed*",)))


def test_nothing_to_quantize_is_an_error(llama, tmp_path):
    with pytest.raises(UsageError, match="nothing to quantize: all 21 tensors are kept"):
        convert.quantize(llama, tmp_path / "out", Recipe(keep=("*",)))
    with pytest.raises(UsageError, match="one scale a tensor cannot be written"):
        convert.quantize(llama, tmp_path / "out", Recipe(Scheme("tensor", "float32")))


def test_config_and_weights_must_belong_together(tmp_path):
    source = make_llama(tmp_path / "src")
    edit_json(source / "config.json", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"no weights for tensor model.layers.2.* 8 more"):
        convert.quantize(source, tmp_path / "out")
    edit_json(source / "config.json", num_hidden_layers=2, intermediate_size=FFN * 2)
    with pytest.raises(CheckpointError, match=r"is \[64, 192\], config.json makes it \[64, 384\]"):
        convert.quantize(source, tmp_path / "out")
    edit_json(source / "config.json", num_attention_heads=0)
    with pytest.raises(CheckpointError, match="transformers cannot build this model"):
        convert.quantize(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_same_answers_from_a_process_of_its_own(llama, tmp_path, monkeypatch):
    """As on the command line, where transformers is not imported."""
    monkeypatch.delitem(sys.modules, "transformers")
    convert.quantize(llama, tmp_path / "out")
    source = shutil.copytree(llama, tmp_path / "src")
    edit_json(source / "config.json", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"no weights for tensor model.layers.2.* 8 more"):
        convert.quantize(source, tmp_path / "never")
    assert not (tmp_path / "never").exists()
    assert not workspace_folder(tmp_path / "never").exists()
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    monkeypatch.setattr(loadability, "fit_on_meta", lambda *_: "asked here")
    assert loadability.fit_aside("x", {}, [], Recipe()) == "asked here"


def test_an_unknown_model_class_is_converted_with_a_remark(tmp_path, caplog):
    source = make_llama(tmp_path / "src")
    edit_json(source / "config.json", architectures=["NoSuchForCausalLM"])
    convert.quantize(source, tmp_path / "out")
    assert "transformers has no class ['NoSuchForCausalLM']" in caplog.text
    assert (tmp_path / "out").exists()


def test_code_of_a_checkpoint_is_neither_copied_nor_named(tmp_path):
    source = make_llama(tmp_path / "src")
    (source / "modeling_evil.py").write_text("raise SystemExit")
    edit_json(source / "config.json", auto_map={"AutoModel": "modeling_evil.Evil"})
    (source / "tokenizer_config.json").write_text('{"auto_map": {"a": "b"}, "pad_token": "x"}')
    convert.quantize(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.py"))
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokenizer == {"pad_token": "x"}


def test_index_names_every_tensor(llama, tmp_path, small_shards):
    convert.quantize(llama, tmp_path / "out")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    out = read_headers(tmp_path / "out")
    assert index["weight_map"] == {t.name: t.shard.name for t in out.tensors}
    assert index["metadata"]["total_size"] == out.num_bytes


def test_memory_does_not_grow_with_the_tensor(tmp_path):
    """64 MB of embedding pass through a few blocks; its packed bytes, 16 MB, are never all held."""
    source = tmp_path / "src"
    source.mkdir()
    config = {"architectures": ["NoSuchModel"], "model_type": "llama"}
    (source / "config.json").write_text(json.dumps(config))
    save_file({"embed.weight": torch.randn(16384, 1024)}, source / "model.safetensors")
    convert.quantize(source, tmp_path / "warm", jobs=2)
    assert peak_bytes(lambda: convert.quantize(source, tmp_path / "out", jobs=2)) < 12_000_000


def test_rows_longer_than_a_block(tmp_path, monkeypatch):
    from halfweight.conversion import shard_writer

    source = make_llama(tmp_path / "src")
    convert.quantize(source, tmp_path / "whole")
    monkeypatch.setattr(shard_writer, "BLOCK_BYTES", 1)
    convert.quantize(source, tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")

"""Every way to name a model leads to the same plan."""

import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from families import save_family
from gguf_files import TYPES, make_gguf
from huggingface_hub.errors import LocalEntryNotFoundError
from others import write_gptq
from safetensors.torch import load_file, save_file
from tiny import edit_json, make_llama
from transformers import AutoConfig, AutoModelForCausalLM

import halfweight
from halfweight.checkpoint.gguf_header import read_gguf_header
from halfweight.checkpoint.headers import read_headers
from halfweight.checkpoint.layout import lay_out
from halfweight.checkpoint.sources import open_source
from halfweight.errors import CheckpointError
from halfweight.memory import named_model
from halfweight.memory.named_model import planned_model
from halfweight.memory.presets import preset
from halfweight.quantization.scheme import Recipe, Scheme


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A 16-bit folder with a tied head, and its conversion."""
    place = tmp_path_factory.mktemp("planned")
    source = save_family("qwen2", place / "source")
    halfweight.quantize(source, place / "int8", Recipe(Scheme(64)))
    return source, place / "int8"


@pytest.fixture
def hub(monkeypatch):
    """A Hub with one repository, whose files it gives by request only; returns a setter."""

    def serve(folder):
        def metadata(name):
            assert name == "org/name"
            tensors = {
                t.name: SimpleNamespace(dtype=t.info.dtype, shape=list(t.info.shape))
                for t in read_headers(folder).tensors
            }
            return SimpleNamespace(files_metadata={"f": SimpleNamespace(tensors=tensors)})

        monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", metadata)
        monkeypatch.setattr(
            huggingface_hub, "hf_hub_download", lambda name, file: str(folder / file)
        )

    def absent(name, **_):
        raise LocalEntryNotFoundError("not here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    return serve


@pytest.mark.parametrize("quantized", [False, True])
def test_a_hub_id_by_headers_alone_is_the_folders_plan(folders, hub, quantized):
    folder = folders[quantized]
    hub(folder)
    recipe = Recipe(Scheme(64, "bfloat16"))
    remote, local = planned_model("org/name", recipe), planned_model(str(folder), recipe)
    assert remote.disk_bytes == local.disk_bytes
    assert remote.architecture.cache_layers == local.architecture.cache_layers


def test_a_hub_id_in_a_form_of_others_by_headers_alone(hub, tmp_path):
    whole = make_llama(tmp_path / "whole", shard_size="1GB")
    theirs = write_gptq(whole, tmp_path / "theirs", 32)
    hub(theirs)
    report = halfweight.quantize(theirs, tmp_path / "out")
    assert planned_model("org/name").disk_bytes == report.disk_bytes
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    edit_json(theirs / "config.json", **config)
    with pytest.raises(CheckpointError, match="org/name: this is a GPTQ 4-bit checkpoint"):
        planned_model("org/name")


def test_a_hub_id_in_the_cache_needs_no_network(folders, monkeypatch):
    def network(*_, **__):
        raise AssertionError("asked the network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folders[1]))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", network)
    found = planned_model("org/name")
    assert found.resident_bytes == planned_model(str(folders[1])).resident_bytes


def test_a_hub_id_that_is_nowhere(hub, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    message = r"org/name: neither in the Hub's cache nor given by the Hub \(ConnectionError\)"
    with pytest.raises(CheckpointError, match=message):
        planned_model("org/name")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["Q8_0", "BF16", "F32"])
def test_a_gguf_file_by_its_header_is_what_the_converter_reads(tmp_path, monkeypatch, kind, tied):
    path = make_gguf(tmp_path / "tiny.gguf", getattr(TYPES, kind), tied=tied)
    recipe = Recipe(Scheme(32))
    layout = lay_out(open_source(path).tensors, recipe)
    monkeypatch.setitem(sys.modules, "gguf", None)  # the header needs no package
    found = planned_model(str(path), recipe)
    assert found.disk_bytes == sum(decision.disk_bytes for decision in layout.decisions)
    assert {(d.tensor.name, d.scheme) for d in found.decisions} == {
        (d.tensor.name, d.scheme) for d in layout.decisions
    }


def test_a_gguf_file_that_its_header_does_not_explain_is_opened_in_full(tmp_path, monkeypatch):
    path = make_gguf(tmp_path / "tiny.gguf")
    quick = planned_model(str(path), Recipe(Scheme(32)))
    monkeypatch.setattr(named_model, "read_gguf_header", lambda path: None)
    full = planned_model(str(path), Recipe(Scheme(32)))
    assert full.disk_bytes == quick.disk_bytes
    assert full.architecture.cache_layers == quick.architecture.cache_layers


def test_no_gguf_header(tmp_path):
    path = make_gguf(tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    assert read_gguf_header(path).config["num_hidden_layers"] == 1
    for broken in (b"", b"NOPE" + whole[4:], whole[:4] + b"\x09" + whole[5:], whole[:200]):
        path.write_bytes(broken)
        assert read_gguf_header(path) is None
    other = make_gguf(tmp_path / "other.gguf", architecture="falcon")
    assert read_gguf_header(other) is None


def test_a_tied_head_stored_twice_counts_once(folders, tmp_path):
    """As converter and loader do."""
    source = save_family("llama", tmp_path / "src")
    edit_json(source / "config.json", tie_word_embeddings=True)
    shard = source / "model.safetensors"
    tensors = load_file(shard)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, shard, metadata={"format": "pt"})
    halfweight.quantize(source, tmp_path / "out")
    assert planned_model(str(source)).disk_bytes == read_headers(tmp_path / "out").num_bytes


def test_smollm2_to_the_byte(tmp_path):
    """Its own shapes: planned, on disk and loaded, the three are one number."""
    config = AutoConfig.for_model(**preset("smollm2-135m"))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "s")
    halfweight.quantize(tmp_path / "s", tmp_path / "out")
    found = planned_model("smollm2-135m")
    assert found.disk_bytes == read_headers(tmp_path / "out").num_bytes
    loaded = {p.data_ptr(): p.nbytes for p in halfweight.load(tmp_path / "out").parameters()}
    real = 136_648_704  # of the published weights: test_gguf_source.py
    assert found.resident_bytes == sum(loaded.values()) == real


def test_no_torch_for_a_folder(folders):
    """Headers need none either: that is what makes a plan fast."""
    script = (
        "import sys; from halfweight.memory.named_model import planned_model; "
        f"planned_model({str(folders[1])!r}); planned_model({str(folders[0])!r}); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0

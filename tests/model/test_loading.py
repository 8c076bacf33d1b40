"""Loading into transformers: equal logits, byte-exact memory, saving and quantizing on the fly."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import edit_json, make_llama
from transformers import AutoModelForCausalLM

import halfweight
from halfweight.checkpoint.headers import quantized_modules, read_headers
from halfweight.errors import CheckpointError, UsageError
from halfweight.kernels import operations
from halfweight.model import loading, weight_streaming
from halfweight.model.loading import load
from halfweight.model.modules import QuantizedEmbedding, QuantizedLinear, QuantizedWeight
from halfweight.model.transformers_quantizer import HalfweightConfig
from halfweight.model.weight_reader import Tally
from halfweight.quantization.numerics import dequantize
from halfweight.quantization.scheme import Recipe, Scheme

IDS = torch.tensor([[5, 3, 17, 300, 0, 2, 9, 41]])


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folders(request, tmp_path_factory):
    """(16-bit folder, INT8 folder) of one random Llama."""
    root = tmp_path_factory.mktemp("model")
    source = make_llama(root / "source", tied=request.param)
    halfweight.quantize(source, root / "int8", Recipe(Scheme(32)))
    return source, root / "int8"


def quantized(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedWeight)}


def backends(model):
    return {module.backend_name for module in quantized(model).values()}


def with_dequantized_weights(source, model):
    """The 16-bit model in float32 with each weight replaced by what INT8 makes of it."""
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, module in quantized(model).items():
        plain.get_submodule(name).weight.data = dequantize(module.quantized)
    return plain


def test_logits_are_those_of_the_dequantized_weights(folders):
    source, int8 = folders
    model = load(int8, dtype=torch.float32)
    expected = with_dequantized_weights(source, model)(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_every_linear_embedding_and_head_is_in_int8_with_one_byte_scales(folders):
    model = load(folders[1])
    kinds = {type(m) for m in quantized(model).values()}
    assert kinds == {QuantizedLinear, QuantizedEmbedding}
    assert not [m for m in model.modules() if type(m) in (torch.nn.Linear, torch.nn.Embedding)]
    for module in quantized(model).values():
        assert module.weight_packed.dtype == module.weight_scale.dtype == torch.uint8
        assert module.weight_exponent.dtype == torch.int8


def test_a_tied_head_shares_the_tables_bytes(tmp_path):
    source = make_llama(tmp_path / "source", tied=True)
    halfweight.quantize(source, tmp_path / "int8", Recipe(Scheme(32)))
    model = load(tmp_path / "int8")
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    for part in ("weight_packed", "weight_scale", "weight_exponent"):
        assert getattr(table, part) is getattr(head, part)  # so that a move copies it once


def test_weights_are_the_mapped_file_not_a_copy(folders):
    model = load(folders[1])
    stored = quantized_modules(read_headers(folders[1]))
    shards = {w.packed.shard for w in stored.values()}
    mapped = sum(shard.stat().st_size for shard in shards)
    addresses = [m.weight_packed.data_ptr() for m in quantized(model).values()]
    assert max(addresses) - min(addresses) >= 0  # views of one or more mappings
    with open("/proc/self/maps") as maps:
        ranges = [line for line in maps if str(folders[1]) in line]
    assert ranges
    assert mapped > 0
    spans = [tuple(int(x, 16) for x in line.split()[0].split("-")) for line in ranges]
    assert all(any(a <= address < b for a, b in spans) for address in addresses)


def test_save_pretrained_writes_the_same_bytes_and_loads_again(folders, tmp_path):
    model = load(folders[1])
    model.save_pretrained(tmp_path / "saved")
    expected, found = {}, {}
    for folder, tensors in ((folders[1], expected), (tmp_path / "saved", found)):
        for shard in folder.glob("*.safetensors"):
            tensors |= load_file(shard)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    again = load(tmp_path / "saved")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_on_the_fly_equals_the_converter(folders, tmp_path):
    source, int8 = folders
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=HalfweightConfig(group_size=32)
    )
    assert torch.equal(model(IDS).logits, load(int8)(IDS).logits)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved")(IDS).logits, model(IDS).logits)


def test_compiles_without_a_graph_break(folders):
    model = load(folders[1], dtype=torch.float32)
    expected = model(IDS).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS).logits, expected)


def test_kept_tensors_stay_in_16_bits(tmp_path):
    source = make_llama(tmp_path / "source")
    halfweight.quantize(source, tmp_path / "int8", Recipe(Scheme(32), ("*embed*", "lm_head*")))
    model = load(tmp_path / "int8")
    assert type(model.get_input_embeddings()) is torch.nn.Embedding
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_a_16_bit_folder_loads_as_it_is(tmp_path):
    source = make_llama(tmp_path / "source")
    expected = AutoModelForCausalLM.from_pretrained(source)(IDS).logits
    assert torch.equal(load(source)(IDS).logits, expected)


def test_a_missing_tensor_is_named(tmp_path):
    source = make_llama(tmp_path / "source", shard_size="10MB")
    halfweight.quantize(source, tmp_path / "int8", Recipe(Scheme(32)))
    (shard,) = (tmp_path / "int8").glob("*.safetensors")
    tensors = load_file(shard)
    del tensors["model.norm.weight"]
    save_file(tensors, shard)
    for index in (tmp_path / "int8").glob("*.index.json"):
        index.unlink()
    shard.rename(tmp_path / "int8" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: tensor model\.norm\.weight"):
        load(tmp_path / "int8")


def test_a_packed_module_the_model_lacks_is_named(tmp_path):
    source = make_llama(tmp_path / "source", shard_size="10MB")
    halfweight.quantize(source, tmp_path / "int8", Recipe(Scheme(32)))
    (shard,) = (tmp_path / "int8").glob("*.safetensors")
    tensors = load_file(shard)
    for part in ("weight_packed", "weight_scale", "weight_shape"):
        tensors[f"model.extra.{part}"] = tensors[f"lm_head.{part}"].clone()
    save_file(tensors, shard)
    for index in (tmp_path / "int8").glob("*.index.json"):
        index.unlink()
    shard.rename(tmp_path / "int8" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"module model\.extra is not in the model"):
        load(tmp_path / "int8")


def test_unknown_activations_and_backends_are_refused(folders):
    with pytest.raises(UsageError, match="activations is 'int4'"):
        load(folders[1], activations="int4")
    with pytest.raises(UsageError, match="has no int8 activations"):
        load(folders[1], activations="int8", backend="reference")
    with pytest.raises(UsageError, match="backend 'nope' is not known"):
        load(folders[1], backend="nope")


def test_a_packed_weight_of_another_shape_is_named(folders, tmp_path):
    shutil.copytree(folders[1], tmp_path / "int8")
    edit_json(tmp_path / "int8" / "config.json", intermediate_size=96)
    with pytest.raises(CheckpointError, match=r"of another shape: .*proj\.weight"):
        load(tmp_path / "int8")


def test_the_config_that_transformers_copies_holds_no_weights(folders, monkeypatch):
    seen = []
    build = loading.build
    monkeypatch.setattr(
        loading, "build", lambda *args, **kw: seen.append(args) or build(*args, **kw)
    )
    load(folders[1])
    ((_, config, tensors),) = seen
    assert set(config.to_dict()["quantization_config"]) >= {"quant_method", "backend"}
    assert not [v for v in config.to_dict()["quantization_config"].values() if torch.is_tensor(v)]
    assert not [name for name in tensors if "weight_" in name]


def test_what_was_not_on_its_way_is_read_to_its_place(tmp_path):
    source = make_llama(tmp_path / "source")
    halfweight.quantize(source, tmp_path / "int8", Recipe(Scheme(32), ("*embed*",)))
    model, expected = load(tmp_path / "int8"), load(tmp_path / "int8")(IDS).logits
    checkpoint = read_headers(tmp_path / "int8")
    before = {name: p.data_ptr() for name, p in model.named_parameters() if "weight_" not in name}
    stored = {t.name: t for t in checkpoint.tensors}
    places = {before[name]: stored[name] for name in before}
    loading.move_to(model, torch.device("cpu", 0), places, Tally(checkpoint.num_bytes))
    assert not before.items() & {n: p.data_ptr() for n, p in model.named_parameters()}.items()
    assert torch.equal(model(IDS).logits, expected)


def test_progress_of_a_load_to_a_device_ends_at_every_byte(folders, monkeypatch):
    monkeypatch.setattr(
        weight_streaming, "grid8_from_scales", lambda scales: None
    )  # needs their values
    told = []
    model = load(folders[1], device="meta", progress=lambda *step: told.append(step))
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    total = read_headers(folders[1]).num_bytes
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_a_moved_model_takes_a_backend_that_runs_there(folders, caplog):
    model, expected = load(folders[1]), load(folders[1])(IDS).logits
    for module in quantized(model).values():
        module.backend_name = module._chosen_for = "cuda"
    model.to("meta")
    assert backends(model) == {"cuda"}
    operations.backend_on.cache_clear()
    with caplog.at_level("INFO", "halfweight"):
        model.to_empty(device="cpu")
    assert backends(model) == {"cpu"}
    assert [record.message.partition(";")[0] for record in caplog.records] == ["backend cpu on cpu"]
    model.load_state_dict(load(folders[1]).state_dict())
    model.model.rotary_emb = load(folders[1]).model.rotary_emb
    assert torch.equal(model(IDS).logits, expected)


def test_a_requested_backend_stays_where_it_runs(folders):
    model = load(folders[1], backend="reference")
    model.to("meta").to_empty(device="cpu")
    assert backends(model) == {"reference"}
    model = load(folders[1])
    for module in quantized(model).values():
        module.requested_backend = "cuda"
    model.to("meta").to_empty(device="cpu")
    assert backends(model) == {"cpu"}
    assert backends(model.to(torch.float32)) == {"cpu"}


@pytest.mark.gpu
def test_a_model_moved_to_a_gpu_and_back(folders):
    model = load(folders[1], dtype=torch.float32)
    expected = model(IDS).logits
    model.to("cuda")
    assert "cpu" not in backends(model)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    shared = table.weight_packed.data_ptr() == head.weight_packed.data_ptr()
    assert shared == model.config.tie_word_embeddings
    torch.testing.assert_close(model(IDS.cuda()).logits.cpu(), expected, rtol=1e-3, atol=1e-4)
    assert backends(model.to("cpu")) == {"cpu"}
    torch.testing.assert_close(model(IDS).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stated", [True, False])
def test_the_dtype_is_the_checkpoints_own(tmp_path, dtype, stated):
    source = make_llama(tmp_path / "source", dtype=dtype)
    if not stated:
        config = json.loads((source / "config.json").read_text())
        del config["dtype"]
        (source / "config.json").write_text(json.dumps(config))
    halfweight.quantize(source, tmp_path / "int8", Recipe(Scheme(32)))
    for folder in (source, tmp_path / "int8"):
        model = load(folder)
        assert {p.dtype for p in model.parameters() if p.is_floating_point()} <= {dtype}
        assert model.dtype == model.config.dtype == dtype
        assert model(IDS).logits.dtype == dtype

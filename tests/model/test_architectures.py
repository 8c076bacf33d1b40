"""Architectures that each need something of their own; all of them: `make test-models`."""

import json

import pytest
import torch
from compare import outcome_of
from safetensors.torch import load_file, save_file
from tiny import edit_json, make_llama

import halfweight
from halfweight.checkpoint.headers import quantized_modules, read_headers
from halfweight.conversion.verification import verify
from halfweight.errors import CheckpointError
from halfweight.model.modules import QuantizedEmbedding, QuantizedLinear
from halfweight.quantization.scheme import Recipe, Scheme

IDS = torch.tensor([[5, 3, 17, 300, 0, 2, 9, 41]])

REPRESENTATIVES = {
    "gpt2:GPT2LMHeadModel": "its layers are stored as [K, N]",
    "gemma3:Gemma3ForConditionalGeneration": "names in the file are not the model's",
    "gpt_neox:GPTNeoXForCausalLM": "the head has another name in the file",
    "phimoe:PhimoeForCausalLM": "experts are merged, a norm has a bias",
    "bart:BartForConditionalGeneration": "three modules share one table, positions are shifted",
    "t5:T5ForConditionalGeneration": "a module asks for the dtype of its neighbour's weight",
    "mamba:MambaForCausalLM": "a mixer multiplies with the weight of its linear",
    "mamba2:Mamba2ForCausalLM": "infinite floats in config.json",
    "rwkv:RwkvForCausalLM": "weights are divided in place",
    "xlm-roberta-xl:XLMRobertaXLForCausalLM": "a table of one row",
    "xglm:XGLMForCausalLM": "an embedding scaled under another name",
    "falcon:FalconForCausalLM": "a Linear with a forward of its own",
    "olmo:OlmoForCausalLM": "nothing stays in 16 bits",
    "deepseek_v3:DeepseekV3ForCausalLM": "experts, a dense layer, compressed attention",
    "qwen2_vl:Qwen2VLForConditionalGeneration": "vision tower and text model are renamed",
}


@pytest.mark.parametrize("architecture", REPRESENTATIVES)
def test_it_is_transformers_model_with_the_stored_weights(architecture, tmp_path):
    model_type, class_name = architecture.split(":")
    found = outcome_of(model_type, class_name, tmp_path)
    assert found.outcome == "right", found.note


def rewritten(folder, change):
    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    return folder


def test_what_the_model_does_not_use_is_kept_and_left_out(tmp_path, caplog):
    """As the heads for several tokens at once that checkpoints carry along."""
    source = make_llama(tmp_path / "source", shard_size="10MB")
    rewritten(source, lambda tensors: tensors.update({"mtp.fc.weight": torch.ones(64, 64)}))
    report = halfweight.quantize(source, tmp_path / "int8")
    assert "tensor mtp.fc.weight: not used by the model" in report.notes
    assert "not used by the model: tensor mtp.fc.weight" in caplog.text
    assert "mtp.fc" not in quantized_modules(read_headers(tmp_path / "int8"))
    assert not verify(tmp_path / "int8").problems
    assert halfweight.load(tmp_path / "int8")(IDS).logits.isfinite().all()


def test_what_is_kept_is_part_of_the_job(tmp_path):
    source = make_llama(tmp_path / "source", shard_size="10MB")
    rewritten(source, lambda tensors: tensors.update({"mtp.fc.weight": torch.ones(64, 64)}))
    halfweight.quantize(source, tmp_path / "int8")
    job = json.loads((tmp_path / "int8" / "halfweight.json").read_text())["job"]
    assert job["kept"] == ["mtp.fc.weight"]


def test_one_scale_a_row_loads_and_is_saved_again(tmp_path):
    source = make_llama(tmp_path / "source")
    halfweight.quantize(source, tmp_path / "int8", Recipe(Scheme("row")))
    model = halfweight.load(tmp_path / "int8", dtype=torch.float32)
    assert model.model.layers[0].mlp.down_proj.group_size == 192
    model.save_pretrained(tmp_path / "again")
    again = halfweight.load(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_weight_that_no_module_can_hold_is_refused_at_load(tmp_path):
    """In a folder of another tool: ours would have kept it."""
    source = make_llama(tmp_path / "source", shard_size="10MB")
    halfweight.quantize(source, tmp_path / "int8")
    part = ("weight_packed", "weight_scale", "weight_shape")

    def move(tensors):
        del tensors["model.norm.weight"]
        for name in part:
            tensors[f"model.norm.{name}"] = tensors[f"lm_head.{name}"].clone()

    rewritten(tmp_path / "int8", move)
    with pytest.raises(CheckpointError, match=r"model of config|no Linear and no Embedding"):
        halfweight.load(tmp_path / "int8")


@pytest.mark.parametrize(
    "module", [QuantizedLinear((8, 4), "cpu"), QuantizedEmbedding((8, 4), "cpu", torch.float16)]
)
def test_a_weight_says_what_it_is_and_refuses_arithmetic(module):
    assert (module.weight.shape, module.weight.device.type) == ((8, 4), "cpu")
    assert module.weight.dtype == module.dtype
    with pytest.raises(NotImplementedError, match=r"mul of a weight in INT8"):
        module.weight * 2
    assert module.to(torch.float32).weight.dtype == torch.float32


def test_a_config_with_infinite_floats_is_read_as_transformers_writes_it(tmp_path):
    source = make_llama(tmp_path / "source")
    edit_json(source / "config.json", time_step_limit=[0.0, {"__float__": "Infinity"}])
    halfweight.quantize(source, tmp_path / "int8")
    assert halfweight.load(tmp_path / "int8").config.time_step_limit == [0.0, float("inf")]

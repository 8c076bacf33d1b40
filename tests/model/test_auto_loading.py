"""transformers' own from_pretrained and pipeline run our modules; other files stay its own."""

import copy
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from byte_tokenizer import make_tokenizer
from families import FAMILIES, save_family
from tiny import edit_json, make_llama
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CompressedTensorsConfig,
    LlamaForCausalLM,
    pipeline,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoQuantizationConfig

import halfweight
from halfweight.conversion.verification import verify
from halfweight.errors import CheckpointError, UsageError
from halfweight.model import registration
from halfweight.model.auto_loading import HalfweightFolderConfig
from halfweight.model.modules import QuantizedEmbedding, QuantizedLinear, QuantizedWeight
from halfweight.quantization.scheme import Recipe, Scheme

IDS = torch.tensor([[5, 3, 17, 300, 0, 2, 9, 41]])


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("auto")
    source = make_llama(root / "source", tied=request.param)
    halfweight.quantize(source, root / "int8", Recipe(Scheme(32)))
    return root / "int8"


def weight_bytes(model):
    return sum(parameter.nbytes for parameter in model.parameters())


def test_it_is_the_model_that_load_makes(folder):
    found, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    expected = halfweight.load(folder)
    assert not any(info.values())
    assert torch.equal(found(IDS).logits, expected(IDS).logits)
    assert weight_bytes(found) == weight_bytes(expected)
    assert found.config.to_dict() == expected.config.to_dict()
    assert found.generation_config.to_dict() == expected.generation_config.to_dict()
    assert isinstance(found.get_input_embeddings(), QuantizedEmbedding)
    assert isinstance(found.get_output_embeddings(), QuantizedLinear)
    assert not found.training


@pytest.mark.parametrize("kind", FAMILIES)
def test_families(kind, tmp_path):
    """Merged experts, fused projections and scaled embeddings among them."""
    halfweight.quantize(save_family(kind, tmp_path / "source"), tmp_path / "int8")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    assert torch.equal(found(IDS).logits, halfweight.load(tmp_path / "int8")(IDS).logits)
    found.save_pretrained(tmp_path / "saved")
    assert not verify(tmp_path / "saved").problems


def test_a_dtype_and_the_one_device_of_a_map(folder):
    for device_map in ("auto", "cpu", {"": "cpu"}, {"": torch.device("cpu")}):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, device_map=device_map
        )
        assert torch.equal(model(IDS).logits, halfweight.load(folder, dtype=torch.float32)(IDS)[0])


def test_load_takes_a_device_map_of_one_device(folder):
    expected = halfweight.load(folder)(IDS).logits
    for device_map in ("auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}):
        assert torch.equal(halfweight.load(folder, device_map=device_map)(IDS).logits, expected)


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"model": "cpu", "lm_head": "disk"}, "puts the model on cpu, disk, expected one device"),
        ({"": "disk"}, "puts the model on disk, expected one device"),
        ("nowhere", "is 'nowhere', expected the name of a device"),
        ("meta", "device_map is meta, where nothing is computed"),
        ("cuda:99", r"device is cuda:99, and torch finds \d GPUs here"),
        (99, r"device is cuda:99, and torch finds \d GPUs here"),
        ({"": 99}, r"device is cuda:99, and torch finds \d GPUs here"),
    ],
)
def test_other_maps_are_refused(folder, device_map, message):
    with pytest.raises(UsageError, match=message):
        halfweight.load(folder, device_map=device_map)
    if device_map != "nowhere":  # which transformers itself refuses
        with pytest.raises(UsageError, match=message):
            AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)


def test_a_body_without_its_head_and_a_new_head(folder):
    body = AutoModel.from_pretrained(folder)
    expected = halfweight.load(folder).model(IDS).last_hidden_state
    assert torch.equal(body(IDS).last_hidden_state, expected)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"score.weight"}
    assert type(model.score) is torch.nn.Linear
    assert torch.equal(model.model(IDS).last_hidden_state, expected)


def test_a_pipeline_of_the_folder(tmp_path):
    source = make_llama(tmp_path / "source")
    make_tokenizer().save_pretrained(source)
    halfweight.quantize(source, tmp_path / "int8")
    made = pipeline("text-generation", model=str(tmp_path / "int8"), device="cpu")
    assert any(isinstance(module, QuantizedWeight) for module in made.model.modules())
    (answer,) = made("All happy", max_new_tokens=4, do_sample=False, return_tensors=True)
    ids = made.tokenizer("All happy", return_tensors="pt")["input_ids"]
    model = halfweight.load(tmp_path / "int8")
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert answer["generated_token_ids"] == expected[0].tolist()


def test_importing_us_first_imports_nothing_heavy_and_is_enough(tmp_path):
    halfweight.quantize(make_llama(tmp_path / "source"), tmp_path / "int8", Recipe(Scheme(32)))
    code = (
        "import sys, halfweight\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "from transformers import AutoModelForCausalLM as A\n"
        f"model = A.from_pretrained({str(tmp_path / 'int8')!r})\n"
        "print(type(model.get_input_embeddings()).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "QuantizedEmbedding\n", done.stderr


def test_a_table_that_is_there_already_gets_its_row_at_once(folder, monkeypatch):
    table = {"compressed-tensors": CompressedTensorsConfig}
    there = SimpleNamespace(AUTO_QUANTIZATION_CONFIG_MAPPING=table)
    monkeypatch.setitem(sys.modules, registration.TABLE_MODULE, there)
    registration.register()
    declared = json.loads((folder / "config.json").read_text())["quantization_config"]
    found = table["compressed-tensors"].from_dict(declared)
    assert type(found) is HalfweightFolderConfig


@pytest.mark.parametrize(
    "change",
    [
        {"format": "float-quantized"},
        {"quant_method": "gptq"},
        {"kv_cache_scheme": {"num_bits": 8}},
        {"config_groups": {}},
        {"weights": {"num_bits": 4}},
        {"weights": {"symmetric": False}},
        {"weights": {"type": "float"}},
        {"weights": {"strategy": "block"}},
        {"weights": {"actorder": "group"}},
        {"input_activations": {"num_bits": 8, "type": "int"}},
    ],
    ids=str,
)
def test_descriptions_that_are_not_for_us(folder, change):
    declared = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert registration.is_for_us(declared)
    (group,) = declared["config_groups"].values()
    for key, value in change.items():
        if key == "weights":
            group["weights"] |= value
        elif key in group and key != "format":
            group[key] = value
        else:
            declared[key] = value
    assert not registration.is_for_us(declared)


def test_other_compressed_tensors_files_go_to_transformers_own_class(folder, monkeypatch):
    declared = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert type(AutoQuantizationConfig.from_dict(declared)) is HalfweightFolderConfig
    assert issubclass(
        AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"], CompressedTensorsConfig
    )
    (group,) = declared["config_groups"].values()
    four_bits = declared | {
        "config_groups": {"group_0": group | {"weights": group["weights"] | {"num_bits": 4}}}
    }
    theirs = CompressedTensorsConfig.from_dict(four_bits)
    found = AutoQuantizationConfig.from_dict(four_bits)
    assert type(found) is CompressedTensorsConfig
    assert found.to_dict() == theirs.to_dict()
    monkeypatch.setenv("HALFWEIGHT_TRANSFORMERS", "0")
    assert type(AutoQuantizationConfig.from_dict(declared)) is CompressedTensorsConfig


def test_the_loader_is_put_back_whatever_happens(folder, tmp_path):
    before = dict(LlamaForCausalLM.__dict__)
    AutoModelForCausalLM.from_pretrained(folder)
    assert dict(LlamaForCausalLM.__dict__) == before
    source = make_llama(tmp_path / "source")
    expected = LlamaForCausalLM.from_pretrained(source)(IDS).logits
    config = folder / "config.json"
    text = config.read_text()
    try:
        edit_json(config, intermediate_size=96)
        with pytest.raises((CheckpointError, RuntimeError), match=r"another shape|mismatch"):
            AutoModelForCausalLM.from_pretrained(folder)
    finally:
        config.write_text(text)
    assert torch.equal(LlamaForCausalLM.from_pretrained(source)(IDS).logits, expected)


def test_a_state_dict_is_refused(folder):
    config = AutoModelForCausalLM.from_pretrained(folder).config
    tensors = halfweight.load(folder).state_dict()
    with pytest.raises(UsageError, match="a state dict cannot be loaded by from_pretrained"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=tensors)


def test_a_load_that_was_given_up_leaves_the_class_usable(folder, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    expected = halfweight.load(folder)(IDS).logits
    monkeypatch.setattr(LlamaForCausalLM, "_get_dtype_plan", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            AutoModelForCausalLM.from_pretrained(folder)
    monkeypatch.undo()
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(IDS).logits, expected)
    assert "_load_pretrained_model" not in LlamaForCausalLM.__dict__


@pytest.mark.parametrize("keep", [("*embed*",), ("lm_head*",)])
def test_rows_are_neither_added_nor_dropped_while_one_of_both_is_in_int8(tmp_path, keep):
    source = make_llama(tmp_path / "source")
    halfweight.quantize(source, tmp_path / "int8", Recipe(Scheme(32), keep))
    for model in (
        halfweight.load(tmp_path / "int8"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "int8"),
    ):
        for options in ({"new_num_tokens": 400}, {"pad_to_multiple_of": 128}):
            with pytest.raises(UsageError, match="embedding or head are in INT8"):
                copy.deepcopy(model).resize_token_embeddings(**options)
        for options in (
            {},
            {"new_num_tokens": 320},
            {"new_num_tokens": 290, "pad_to_multiple_of": 32},
        ):
            assert model.resize_token_embeddings(**options) is model.get_input_embeddings()
        assert model(IDS).logits.shape[-1] == 320


def test_a_dtype_that_no_kernel_computes_in_is_refused(folder):
    message = "dtype is torch.float64, expected one that a model in INT8 computes in"
    for call in (
        lambda: halfweight.load(folder, dtype=torch.float64),
        lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64),
        lambda: halfweight.load(folder).double(),
    ):
        with pytest.raises(UsageError, match=message):
            call()


def test_a_model_in_int8_is_not_dequantized(folder):
    for model in (halfweight.load(folder), AutoModelForCausalLM.from_pretrained(folder)):
        with pytest.raises(UsageError, match="not dequantized in memory") as caught:
            model.dequantize()
        assert "halfweight export DIR OUT --to dequantized" in caught.value.hint


def test_what_is_kept_in_16_bits_is_resized(tmp_path):
    source = make_llama(tmp_path / "source", tied=True)
    halfweight.quantize(source, tmp_path / "int8", Recipe(Scheme(32), ("*embed*",)))
    model = halfweight.load(tmp_path / "int8")
    model.resize_token_embeddings(400)
    assert model(IDS).logits.shape[-1] == 400

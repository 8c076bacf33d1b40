"""Our files in the ecosystem's own hands: compressed-tensors' decompression, plain transformers."""

import json

import pytest
import torch
from tiny import SIZES, make_llama, tensors_of

from halfweight.conversion import convert
from halfweight.quantization.numerics import dequantize, quantize
from halfweight.quantization.scheme import Recipe, Scheme


def schemes_by_size(folder):
    """Group size -> compressed-tensors' own parse of that group of our config."""
    from compressed_tensors.quantization import QuantizationConfig

    fields = json.loads((folder / "config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig.model_validate(fields)
    return {g.weights.group_size: g for g in parsed.config_groups.values()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "scheme", [Scheme(), Scheme(32, "float16"), Scheme("row"), Scheme(64, "float32")], ids=str
)
def test_compressed_tensors_decompresses_to_the_same_bits(tmp_path, dtype, scheme):
    from compressed_tensors.compressors import PackedQuantizationCompressor

    source = make_llama(tmp_path / "src", dtype=dtype, head_dim=32)
    out = tmp_path / "out"
    convert.quantize(source, out, Recipe(scheme))
    before, after, groups = tensors_of(source), tensors_of(out), schemes_by_size(out)
    modules = [name.removesuffix(".weight_packed") for name in after if "weight_packed" in name]
    assert len(modules) == 16
    for module in modules:
        weight = before[f"{module}.weight"]
        parts = {p: after[f"{module}.{p}"] for p in ("weight_packed", "weight_scale")}
        parts["weight_shape"] = after[f"{module}.weight_shape"]
        chosen = scheme.for_in_features(weight.shape[1])
        group = groups[chosen.group_size if isinstance(chosen.group_size, int) else None]
        theirs = PackedQuantizationCompressor.decompress(parts, group)["weight"]
        ours = dequantize(quantize(weight, chosen), theirs.dtype)
        assert torch.equal(theirs, ours), module


@pytest.mark.parametrize("tied", [False, True])
def test_plain_transformers_loads_what_keeps_its_embedding(tmp_path, tied, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("HALFWEIGHT_TRANSFORMERS", "0")

    source = make_llama(tmp_path / "src", dtype=torch.float32, tied=tied, head_dim=32)
    out = tmp_path / "out"
    convert.quantize(source, out, Recipe(keep=("*embed*",)))
    model, found = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert not found["mismatched_keys"]
    reference = AutoModelForCausalLM.from_pretrained(source)
    for name, weight in list(reference.named_parameters()):
        if weight.dim() == 2 and "embed" not in name:
            chosen = Scheme().for_in_features(weight.shape[1])
            weight.data = dequantize(quantize(weight.data, chosen))
    ids = torch.tensor([[1, 5, 9, 200, 31]])
    with torch.no_grad():
        logits, expected = model(ids).logits, reference(ids).logits
    assert torch.allclose(logits.float(), expected, atol=1e-5, rtol=1e-4)


def test_a_mixture_of_experts_in_2d_linears(tmp_path):
    """Each expert's matrix is quantized, routers stay; the merged model accepts every tensor."""
    from transformers import MixtralConfig, MixtralForCausalLM

    source = tmp_path / "src"
    MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)).save_pretrained(source)
    names = tensors_of(source).keys()
    experts = [name for name in names if ".experts." in name]
    assert len(experts) == 2 * 4 * 3, "transformers saves Mixtral's experts one by one"
    convert.quantize(source, tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    for name in experts:
        assert f"{name.removesuffix('.weight')}.weight_packed" in after
    routers = [name for name in after if name.endswith(".gate.weight")]
    assert len(routers) == 2
    targets = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert any("gate" in module for module in targets["ignore"])


def test_an_encoder_with_biases_and_position_table(tmp_path):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128
    )
    BertModel(config).save_pretrained(tmp_path / "src")
    report = convert.quantize(tmp_path / "src", tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    assert "embeddings.position_embeddings.weight" in after
    assert "embeddings.word_embeddings.weight_packed" in after
    assert "encoder.layer.0.attention.self.query.bias" in after
    assert report.num_quantized == 9

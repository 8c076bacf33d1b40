"""Mixtures of experts: from a matrix an expert on disk to INT8 in memory, and back."""

import fnmatch

import pytest
import torch
from safetensors.torch import load_file
from tiny import SIZES
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

import halfweight
from halfweight.engine.engine import Engine
from halfweight.engine.request import Sampling
from halfweight.errors import CheckpointError, UsageError
from halfweight.model.experts import QuantizedExperts, has_experts
from halfweight.model.transformers_quantizer import HalfweightConfig
from halfweight.quantization.numerics import dequantize
from halfweight.quantization.scheme import Recipe

CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3": Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=96, num_experts=5, num_experts_per_tok=2, head_dim=32
    ),
}
IDS = torch.randint(0, 320, (2, 9))


@pytest.fixture(scope="module", params=CONFIGS)
def folders(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param]).to(torch.bfloat16)
    model.save_pretrained(root / "source")
    halfweight.quantize(root / "source", root / "int8")
    return root / "source", root / "int8"


def with_dequantized_weights(source, model):
    """The 16-bit model in float32, its weights replaced by what INT8 makes of them."""
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedExperts):
            fused = plain.get_submodule(name)
            for index, expert in enumerate(module.experts):
                parts = [dequantize(part.quantized) for part in (expert.gate, expert.up)]
                fused.gate_up_proj.data[index] = torch.cat(parts)
                fused.down_proj.data[index] = dequantize(expert.down.quantized)
        elif hasattr(module, "quantized") and ".experts." not in name:
            plain.get_submodule(name).weight.data = dequantize(module.quantized)
    return plain


def test_logits_are_those_of_the_dequantized_weights(folders):
    source, int8 = folders
    model = halfweight.load(int8, dtype=torch.float32)
    assert has_experts(model)
    expected = with_dequantized_weights(source, model)(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_nothing_of_an_expert_stays_in_16_bits(folders):
    model = halfweight.load(folders[1])
    dtypes = {p.dtype for n, p in model.named_parameters() if ".experts." in n}
    assert dtypes == {torch.uint8, torch.int8}


def test_the_engine_generates_as_transformers_does(folders):
    model = halfweight.load(folders[1], dtype=torch.float32)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(IDS[:1], max_new_tokens=6, **options)[0, IDS.shape[1] :]
    with Engine(model, max_context=32, max_sequences=2) as engine:
        prompt, greedy = IDS[0].tolist(), {"sampling": Sampling(), "stop_tokens": ()}
        found = engine.generate(prompt, max_new_tokens=6, **greedy)
    assert list(found.tokens) == expected.tolist()


def test_what_is_saved_is_what_was_loaded(folders, tmp_path):
    model = halfweight.load(folders[1])
    model.save_pretrained(tmp_path / "saved")
    found, expected = (load_file(f / "model.safetensors") for f in (tmp_path / "saved", folders[1]))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    again = halfweight.load(tmp_path / "saved")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_experts_kept_in_16_bits_load_as_transformers_has_them(folders, tmp_path):
    halfweight.quantize(folders[0], tmp_path / "kept", Recipe(keep=("*experts*",)))
    assert not has_experts(halfweight.load(tmp_path / "kept"))


@pytest.mark.parametrize("keep", ["*layers.1*experts.2.*", "*experts*down*", "*experts*w2*"])
def test_a_layer_with_a_matrix_in_16_bits_is_refused(folders, tmp_path, keep):
    """Before anything is written: transformers merges the matrices of a layer."""
    names = load_file(folders[0] / "model.safetensors")
    if not any(fnmatch.fnmatchcase(name, keep) for name in names):
        pytest.skip("the other family's names")
    with pytest.raises(CheckpointError, match=r"tensor model\.layers.*experts\.") as caught:
        halfweight.quantize(folders[0], tmp_path / "part", Recipe(keep=(keep,)))
    assert caught.value.hint == "--keep '*experts*' leaves them in 16 bits"
    assert not (tmp_path / "part").exists()


def test_merged_experts_are_refused_while_loading(folders):
    with pytest.raises(UsageError, match=r"experts: experts merged in one tensor"):
        AutoModelForCausalLM.from_pretrained(folders[0], quantization_config=HalfweightConfig())
    kept = HalfweightConfig(keep=("*experts*",))
    model = AutoModelForCausalLM.from_pretrained(folders[0], quantization_config=kept)
    assert model(IDS).logits.isfinite().all()

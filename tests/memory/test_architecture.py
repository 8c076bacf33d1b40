"""Shapes and caches by formula against transformers' own classes on the meta device."""

import pytest
import torch

from halfweight.errors import CheckpointError, UsageError
from halfweight.memory.architecture import architecture, context_tokens
from halfweight.memory.presets import PRESETS, preset


def on_meta(config):
    from transformers import AutoConfig, AutoModelForCausalLM

    parsed = AutoConfig.for_model(**config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(parsed)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_transformers_builds(name):
    config = preset(name)
    model, formula = on_meta(config), architecture(config, name)
    ours = {t.name: t.shape for t in formula.tensors}
    theirs = {n: tuple(p.shape) for n, p in model.named_parameters()}
    if "mixtral" not in name:
        assert ours == theirs
    assert formula.num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_the_cache_is_what_static_cache_allocates(name):
    """Every layer's own allocation, for a context past all windows."""
    from transformers import AutoConfig, StaticCache

    config = preset(name)
    formula = architecture(config, name)
    context = 6000
    cache = StaticCache(AutoConfig.for_model(**config), max_cache_len=context)
    assert [layer.tokens(context) for layer in formula.cache_layers] == [
        layer.max_cache_len for layer in cache.layers
    ]


def test_known_sizes():
    for name, parameters, token_bytes in (
        ("llama-3-8b", 8_030_261_248, 131_072),
        ("llama-3-70b", 70_553_706_496, 327_680),
        ("smollm2-135m", 134_515_008, 30 * 2 * 3 * 64 * 2),
    ):
        found = architecture(preset(name))
        assert (found.num_parameters, found.kv_bytes(1)) == (parameters, token_bytes)


def test_compressed_and_shared_layers():
    config = preset("llama-3-8b")
    latent = architecture({**config, "kv_lora_rank": 512, "qk_rope_head_dim": 64})
    assert latent.kv_bytes(10) == 10 * 32 * 576 * 2
    shared = architecture({**config, "num_kv_shared_layers": 8})
    assert shared.kv_bytes(1) == 131_072 * 24 // 32


def test_faults_are_named():
    with pytest.raises(CheckpointError, match="hidden_size is None, expected a positive number"):
        architecture({"model_type": "llama"})
    with pytest.raises(CheckpointError, match="model_type 'mamba' has no formula"):
        architecture({**preset("llama-3-8b"), "model_type": "mamba"})
    states = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128, "state_size": 8}
    with pytest.raises(CheckpointError, match="model_type 'falcon_mamba' has no formula"):
        architecture(states | {"model_type": "falcon_mamba"})
    with pytest.raises(CheckpointError, match="model_type 'rwkv': num_attention_heads is None"):
        architecture(
            {k: v for k, v in states.items() if k != "state_size"} | {"model_type": "rwkv"}
        )
    with pytest.raises(UsageError, match="no preset 'llama-9'"):
        preset("llama-9")


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        (None, 8192),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}, 32768),
        ({"rope_type": "yarn", "factor": 4.0}, 32768),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
        ({"rope_type": "linear", "factor": 2, "original_max_position_embeddings": 8192}, 16384),
        ({"rope_type": "linear", "factor": 2}, 8192),
        ({"rope_type": "dynamic", "factor": 3.0}, 24576),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}, 8192),
        ({"rope_type": "longrope", "original_max_position_embeddings": 4096}, 8192),
        ({"full_attention": {"rope_type": "yarn", "factor": 4.0}, "sliding_attention": {}}, 32768),
        ({"rope_type": "yarn", "factor": "many"}, 8192),
    ],
)
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_a_models_context_is_what_its_rotary_scaling_makes_room_for(rope, context, key):
    config = preset("llama-3-8b") | {key: rope}
    assert context_tokens(config) == context
    assert architecture(config).max_context == context


def test_plan_and_generate_say_one_context_of_a_model(tmp_path):
    from tiny import make_llama

    from halfweight.engine.engine import Engine
    from halfweight.memory.named_model import planned_model
    from halfweight.model.loading import load

    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    rope |= {"rope_theta": 10000.0}
    folder = make_llama(tmp_path / "m", max_position_embeddings=64, rope_parameters=rope)
    planned = planned_model(str(folder)).architecture.max_context
    assert planned == 256
    with Engine(load(folder)) as engine:
        engine.check(engine.request([1] * 200, max_new_tokens=planned - 200))
        with pytest.raises(UsageError, match="the context has room for 256"):
            engine.check(engine.request([1] * 200, max_new_tokens=planned - 199))


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"model_type": "bert"}, 0),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, 0),
        ({"model_type": "bert", "architectures": ["BertLMHeadModel"]}, 2),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, 0),
        ({"model_type": "llama"}, 2),
    ],
)
def test_an_encoder_keeps_no_cache(config, layers):
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 9}
    found = architecture(sizes | config, tensors=[])
    assert len(found.cache_layers) == layers
    assert (found.kv_bytes(100) > 0) == (layers > 0)


def test_gemma_3n_lists_its_widths_by_layer():
    from transformers import AutoConfig

    config = AutoConfig.for_model("gemma3n_text").to_dict()
    assert isinstance(config["intermediate_size"], list)
    assert architecture(config, tensors=[]).intermediate == max(config["intermediate_size"])

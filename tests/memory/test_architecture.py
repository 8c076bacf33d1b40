"""Shapes and caches by formula against transformers' own classes on the meta device."""

import pytest
import torch

from halfweight.errors import CheckpointError, UsageError
from halfweight.memory.architecture import architecture
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
    with pytest.raises(UsageError, match="no preset 'llama-9'"):
        preset("llama-9")

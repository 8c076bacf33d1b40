"""The cache that a plan counts is, byte for byte, what transformers' own cache holds."""

import json

import pytest
import torch
import transformers
from packaging import version

from halfweight.memory.architecture import architecture
from halfweight.memory.cache_layers import PERIODS

CONTEXT, PROMPT = 32, 20
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
MIXTURE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
NO_HEADS = {"num_attention_heads": None}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
GEMMA4 = {
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "sliding_window": 8,
    "num_hidden_layers": 6,
    "vocab_size_per_layer_input": 128,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}
MODELS = {
    "llama": GROUPED,
    "qwen3": GROUPED | {"head_dim": 24},
    "mistral": GROUPED | {"sliding_window": 8},
    "gemma2": GROUPED | {"sliding_window": 8},
    "gemma3_text": GROUPED | {"sliding_window": 8, "head_dim": 24, "num_hidden_layers": 7},
    "gemma3n_text": GROUPED
    | {
        "sliding_window": 8,
        "head_dim": 16,
        "num_hidden_layers": 10,
        "num_kv_shared_layers": 5,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 128,
        "laurel_rank": 8,
        "intermediate_size": [96] * 10,
        "activation_sparsity_pattern": [0.0] * 10,
    },
    "gemma4_text": GROUPED | GEMMA4 | {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8},
    "gemma4_text, keys are values": GROUPED
    | GEMMA4
    | {
        "attention_k_eq_v": True,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "global_head_dim": 24,
    },
    "gpt_oss": GROUPED | {"sliding_window": 8},
    "cohere2": GROUPED | {"sliding_window": 8},
    "exaone4": GROUPED | {"sliding_window": 8},
    "llama4_text": GROUPED
    | {"attention_chunk_size": 8, "intermediate_size_mlp": 96, "num_local_experts": 2}
    | {"head_dim": 16},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "bloom": {},
    "mpt": {"d_model": 64, "n_layers": 4, "n_heads": 4},
    "gpt_bigcode": {},
    "falcon": {"multi_query": True},
    "falcon, grouped": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon, all heads": {"multi_query": False},
    "jetmoe": GROUPED | {"kv_channels": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": LATENT | MIXTURE | {"q_lora_rank": 16, "n_group": 1, "topk_group": 1},
    "qwen3_next": GROUPED
    | EXPERTS
    | LINEAR
    | {"head_dim": 32, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": GROUPED | LINEAR | {"head_dim": 32},
    "olmo_hybrid": GROUPED | LINEAR,
    "lfm2": GROUPED | {"layer_types": ["conv", "full_attention"] * 2},
    "jamba": GROUPED
    | {"num_hidden_layers": 8, "attn_layer_period": 4, "attn_layer_offset": 2}
    | {"num_experts": 2, "mamba_d_state": 8, "mamba_d_conv": 4, "use_mamba_kernels": False},
    "bamba": GROUPED | MAMBA2 | {"attn_layer_indices": [1, 3]},
    "falcon_h1": GROUPED | MAMBA2 | {"mamba_d_ssm": 128, "head_dim": 16},
    "granitemoehybrid": GROUPED
    | MAMBA2
    | {"layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 32}
    | {"num_local_experts": 2, "num_experts_per_tok": 1},
    "zamba2": {
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "mamba_d_state": 16,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "num_mem_blocks": 1,
    },
    "nemotron_h": GROUPED
    | {
        "hybrid_override_pattern": "M*M-",
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "head_dim": 16,
    },
    "mamba": NO_HEADS | {"state_size": 8},
    "mamba2": NO_HEADS | {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1},
    "falcon_mamba": NO_HEADS | {"state_size": 8},
}


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    parts = list(value.values()) if isinstance(value, dict) else value
    return [t for part in parts for t in tensors(part)] if isinstance(parts, list | tuple) else []


def run_model(name):
    """The config.json of a tiny random model, and the bytes of its own cache after a prompt."""
    from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

    kind = name.partition(",")[0]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | MODELS[name])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    cache = StaticCache(model.config, max_cache_len=CONTEXT)
    argument = "cache_params" if "mamba" in kind else "past_key_values"
    if kind in ("falcon_h1", "jamba", "bamba"):
        argument = "past_key_values"
    with torch.no_grad():
        model(torch.randint(3, 100, (1, PROMPT)), **{argument: cache}, use_cache=True)
    held = [t for layer in cache.layers for v in vars(layer).values() for t in tensors(v)]
    return json.loads(model.config.to_json_string()), sum(t.nbytes for t in held if t.ndim > 1)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_a_plan_counts_the_bytes_of_transformers_own_cache(name):
    if name == "bloom" and version.parse(transformers.__version__) < version.parse("5.24"):
        pytest.skip("Bloom's forward takes no static cache in transformers 5.17")
    config, held = run_model(name)
    assert architecture(config, tensors=[]).kv_bytes(CONTEXT) == held > 0
    if name.partition(",")[0] in {*PERIODS, "qwen3_next", "llama4_text"}:
        published = {key: value for key, value in config.items() if key != "layer_types"}
        published |= {"full_attention_interval": 4} if "linear_num_value_heads" in config else {}
        if not config.get("per_layer_config"):
            assert architecture(published, tensors=[]).kv_bytes(CONTEXT) == held

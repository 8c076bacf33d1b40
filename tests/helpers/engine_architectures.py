"""Tiny random models of transformers' causal architectures, sharp enough to show a wrong token.

A config gets small sizes wherever it has a field of that name; what that leaves inconsistent is
mended by OVERRIDES. Weights are drawn larger than a fresh model's, so that attention and state
matter to the logits.
"""

import torch

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 4,
    "n_inner": 96,
    "d_model": 64,
    "d_ff": 96,
    "ffn_dim": 96,
    "num_layers": 4,
    "num_heads": 4,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "word_embed_proj_dim": 64,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "max_seq_len": 256,
    "sliding_window": 12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "qk_head_dim": 24,
    "state_size": 8,
    "time_step_rank": 8,
    "mamba_d_state": 8,
    "mamba_dt_rank": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 1,
    "chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "attention_hidden_size": 64,
    "lru_width": 64,
}


DECODERS = (
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie"),
    *("megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer"),
    *("xlm-roberta", "xlm-roberta-xl", "xmod"),
)
LATENT = (
    *("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"),
    *("glm_moe_dsa", "longcat_flash", "minicpm3", "youtu", "sarvam_mla", "dots3_note_text"),
)
_SHARED_KV = {
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 320,
}
OVERRIDES = {
    **{kind: {"is_decoder": True} for kind in DECODERS},
    **{kind: {"num_key_value_heads": 4, "head_dim": 8} for kind in LATENT},
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 8},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {
        **_SHARED_KV,
        "intermediate_size": [96] * 6,
        "activation_sparsity_pattern": [0.0] * 6,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
    },
    "gemma4_text": _SHARED_KV,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 12},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "helium": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "kimi_linear": {
        "num_key_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


def sized(config_class, **changes):
    """A small config of the class: SIZES where it has such a field, OVERRIDES, then `changes`."""
    known = set(vars(config_class())) | set(getattr(config_class, "attribute_map", {}))
    sizes = {name: size for name, size in SIZES.items() if name in known}
    parts = {
        name: sized(part).to_dict()
        for name, part in (getattr(config_class, "sub_configs", None) or {}).items()
        if hasattr(part, "model_type") and part.model_type
    }
    own = OVERRIDES.get(config_class.model_type, {})
    return config_class(**{**sizes, **parts, **own, **changes})


def sharpen(model, seed=0):
    """Draw every matrix anew with unit gain, vectors near their own; the model, ready to run."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * noise)
    return model.eval().requires_grad_(False)


def tiny(kind, seed=0, **changes):
    """A sharp tiny model of the architecture in float32."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    model_class = getattr(transformers, names if isinstance(names, str) else names[0])
    config = sized(transformers.CONFIG_MAPPING[kind], **changes)
    return sharpen(model_class._from_config(config, dtype=torch.float32), seed)

"""A tiny random model of any architecture of transformers: its own default config, made small.

Sizes are found by what a config calls them, in sub-configs too; OVERRIDES has what a config needs
beside that. Nothing here knows what a model computes.
"""

from __future__ import annotations

import re
from typing import Any

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SIZES: tuple[tuple[str, int], ...] = (
    (r"mamba_d_ssm", 128),
    (r"(mamba_n_heads|mamba_num_heads|n_mamba_heads)", 8),
    (r"(mamba_d_head|mamba_headdim|mamba_head_dim)", 16),
    (r"(mamba_)?n_groups", 2),
    (r"topk_group", 1),
    (r".*vocab_size.*|n_words", 384),
    (r"num_(key_value_heads|kv_heads|key_value_groups)|n_head_kv|.*num_key_value_heads", 2),
    (r".*(num_attention_heads|attention_heads|num_heads|n_heads?|num_query_heads)", 4),
    (r"linear_num_(key|value)_heads|.*num_v_heads|.*num_k_heads", 4),
    (
        r"(hidden_size|d_model|n_embd|dim|embed_dim|embedding_size|embedding_dim|hidden_dim|word_embed_proj_dim)",
        64,
    ),
    (
        r"(decoder_hidden_size|encoder_hidden_size|.*_hidden_size|d_embed|emb_dim|out_hidden_size)",
        64,
    ),
    (r"(.*intermediate_size|.*ffn_dim|d_ff|n_inner|.*ffn_hidden_size|.*ff_dim|mlp_dim)", 128),
    (r"(num_hidden_layers|num_layers|n_layers?|.*_layers|depth|num_blocks)", 2),
    (r"(.*head_dim|d_kv|kv_channels|attention_head_size|linear_.*_head_dim)", 16),
    (r"(n_routed_experts|num_(local_)?experts|.*num_experts|moe_num_experts)", 4),
    (r"(num_experts_per_tok(en)?|.*top_?k|num_selected_experts|moe_k)", 2),
    (r"(n_group|num_expert_groups?)", 1),
    (r"(q_lora_rank|kv_lora_rank|.*lora_rank|lora_.*_dim)", 32),
    (r"(.*_max_position_embeddings|max_position_embeddings|n_positions|n_ctx|max_seq_len)", 512),
    (r"(image_size)", 32),
    (r"(patch_size)", 16),
    (r"(mamba_expand)", 2),
    (r"(mamba_d_state|state_size|ssm_state_size)", 16),
    (r"rotary_dim", 8),
    (r"base_channels|num_filters|n_filters", 32),
    (r"encoder_hash_byte_group_vocab", 384),
    (r"(time_step_rank|mamba_dt_rank)", 8),
)
LAYER_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types")
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
ZAMBA = {
    "num_hidden_layers": 4,
    "layers_block_type": ["mamba", "hybrid"] * 2,
    "attention_hidden_size": 128,
    "attention_head_dim": 32,
}
ROPE = {"rope_parameters": MROPE}
HEADS = {"head_dim": 16}
OVERRIDES: dict[str, dict[str, Any]] = {
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xmod": {"default_language": "en_XX"},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "emu3": {"vocabulary_map": {"<image>": 5}},
    "dory": {
        "num_hidden_layers": 3,
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "layer_types": None,
    },
    "kimi_linear": {"topk_group": 1, "n_group": 1, "num_experts_per_tok": 2},
    "longcat_flash": {"qk_head_dim": 32},
    "mistral4": {"qk_nope_head_dim": 16, "rope_parameters": None},
}
"""Of the whole config, by model type."""
SUB_OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text", "ministral", "nemotron"),
        HEADS,
    ),
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    **dict.fromkeys(
        ("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text", "glm_ocr_text", "paddleocr_vl_text"),
        ROPE,
    ),
    "glm4v_moe_text": {
        "rope_parameters": MROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    },
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "attention_layers": ["global", "local"],
    },
    "xlnet": {"d_head": 16, "n_layer": 2, "n_head": 4},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "nemotron_h": {"n_groups": 2},
    "falcon_h1": {"mamba_d_head": 16},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    **dict.fromkeys(("zamba", "zamba2"), ZAMBA),
    "qwen2_5_omni_text": ROPE,
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "step3p7_text": {"sliding_window": 512},
    "cohere_compass_text": {"rope_parameters": None},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
}
"""Of a config or sub-config, by its model type."""


def architectures() -> dict[str, str]:
    """`model_type:class` -> kind, of all that this transformers knows: causal types first."""
    kinds = {
        "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "vision-language": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "speech": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    }
    found: dict[str, str] = {}
    for kind, names in kinds.items():
        for model_type, class_name in names.items():
            found.setdefault(f"{model_type}:{class_name}", kind)
    return found


def tiny_config(model_type: str, class_name: str) -> Any:
    """The default config of a model class with every size small."""
    config_class = getattr(transformers, class_name).config_class or CONFIG_MAPPING[model_type]
    default = config_class()
    small = _small(default.to_dict()) | OVERRIDES.get(model_type, {})
    return config_class(**small)


def _small(config: dict[str, Any]) -> dict[str, Any]:
    model_type = config.get("model_type", "")
    layers = _layers_shown(config)
    small: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("transformers_version", "model_type", "architectures", "dtype"):
            continue
        if isinstance(value, dict) and "model_type" in value:
            small[key] = _small(value) | {"model_type": value["model_type"]}
        elif isinstance(value, list) and layers and len(value) == layers[-1]:
            small[key] = [value[i] for i in layers[0]]
        elif key == "per_layer_config" and layers and value:
            shown = {str(i): place for place, i in enumerate(layers[0])}
            small[key] = {shown[str(i)]: v for i, v in value.items() if str(i) in shown}
        elif isinstance(value, dict) and "rope" in key:
            small[key] = _small_rope(value, config)
        elif type(value) is int and key.endswith("_token_id"):
            small[key] = 300 + value % 80 if value >= 384 else value
        elif type(value) is int:
            small[key] = _small_size(key, value)
        else:
            small[key] = value
    if layers:
        small[layers[1]] = len(layers[0])
    heads, kv_heads = (config.get(f"num_{kind}_heads") for kind in ("attention", "key_value"))
    if kv_heads is not None and (heads == kv_heads or "kv_lora_rank" in config):
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small | SUB_OVERRIDES.get(model_type, {})


def _small_rope(rope: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters whose sections fit heads of 16."""
    small = dict(rope)
    if "mrope_section" in rope:
        pairs = int(8 * (rope.get("partial_rotary_factor") or 1.0))
        first, second = pairs // 2, pairs // 4
        small["mrope_section"] = [first, second, pairs - first - second]
    return {k: _small_rope(v, config) if isinstance(v, dict) else v for k, v in small.items()}


def _layers_shown(config: dict[str, Any]) -> tuple[list[int], str, int] | None:
    """Layers to keep where a config lists them by type: the first of each, two at least."""
    types = next((config[n] for n in LAYER_LISTS if config.get(n)), None)
    name = next((n for n in ("num_hidden_layers", "n_layers", "num_layers") if n in config), None)
    if not isinstance(types, list) or name is None:
        return None
    firsts = {kind: i for i, kind in reversed(list(enumerate(types)))}
    shown = sorted(firsts.values())
    shown += [i for i in range(len(types)) if i not in shown][: max(0, 2 - len(shown))]
    return sorted(shown), name, len(types)


def _small_size(key: str, value: int) -> int:
    for pattern, size in SIZES:
        if value > size and re.fullmatch(pattern, key):
            return size
    return value

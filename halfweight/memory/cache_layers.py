"""What each layer of a model keeps of the past, from its config.json alone. No torch.

A layer keeps keys and values of every token (attention), of the last ones (sliding or chunked), a
state of fixed size (convolutions, Mamba, linear attention), both, or nothing (it uses another
layer's). Configs say which in a dozen ways: a list of layer types, a period, an offset, indices;
published ones often leave the list out. Sizes go by several names too, so each is looked up in one
table here. The bytes are those of transformers' own cache, which a test holds for every family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from halfweight.errors import CheckpointError

Config = Mapping[str, Any]

NAMES = {
    "hidden": ("hidden_size", "n_embd", "d_model", "model_dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "attention_heads"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "head_dim": ("head_dim", "attention_head_dim", "kv_channels"),
    "vocabulary": ("vocab_size",),
    "intermediate": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    "context": ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"),
    "mamba_heads": ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"),
    "mamba_head_dim": ("mamba_d_head", "mamba_head_dim", "mamba_headdim"),
    "mamba_groups": ("mamba_n_groups", "n_groups", "mamba_ngroups"),
    "state": ("mamba_d_state", "ssm_state_size", "state_size"),
    "kernel": ("mamba_d_conv", "conv_kernel", "linear_conv_kernel_dim"),
    "expand": ("mamba_expand", "expand"),
    "linear_key_heads": ("linear_num_key_heads",),
    "linear_value_heads": ("linear_num_value_heads",),
    "linear_key_dim": ("linear_key_head_dim",),
    "linear_value_dim": ("linear_value_head_dim",),
    "latent": ("kv_lora_rank",),
    "rope": ("qk_rope_head_dim",),
    "convolution": ("conv_L_cache",),
    "window": ("sliding_window", "attention_chunk_size", "attention_window_size"),
    "global_head_dim": ("global_head_dim",),
    "global_heads": ("num_global_key_value_heads",),
}
"""Size -> its names in configs, the first that is there counts."""
ONE_KEY_VALUE_HEAD = ("falcon", "gpt_bigcode", "RefinedWebModel")
"""Families whose `multi_query`, on by default, leaves one head of keys and values."""
PERIODS = {
    "afmoe": 4,
    "cohere2": 4,
    "exaone4": 4,
    "gemma2": 2,
    "gemma3_text": 6,
    "gemma3n_text": 5,
    "gemma4_text": 6,
    "gpt_oss": 2,
    "olmo3": 4,
}
"""model_type -> every so-manieth layer is no sliding one, where a config does not say."""
PERIOD_NAMES = (
    "sliding_window_pattern",
    "full_attention_interval",
    "global_attn_every_n_layers",
    "no_rope_layer_interval",
)
MOST_LAYERS = 2000
"""The deepest published models have under 200."""
ATTENTION, SLIDING, STATE, BOTH, NOTHING = "attention", "sliding", "state", "both", "nothing"
KINDS = {
    "full_attention": ATTENTION,
    "attention": ATTENTION,
    "global": ATTENTION,
    "indexed_attention": ATTENTION,
    "*": ATTENTION,
    "sliding_attention": SLIDING,
    "chunked_attention": SLIDING,
    "linear_attention": STATE,
    "mamba": STATE,
    "recurrent": STATE,
    "conv": STATE,
    "M": STATE,
    "hybrid": BOTH,
    "mlp": NOTHING,
    "moe": NOTHING,
    "-": NOTHING,
    "E": NOTHING,
}
"""What configs call a layer -> what it keeps."""


@dataclass(frozen=True)
class CacheLayer:
    """What one layer keeps of the past: `numbers` a token, at most `window` tokens if it slides.

    A layer that uses another's keys and values keeps none. `heads` is the number of KV heads that
    tensor parallelism can share out; 1 for a compressed cache, which every rank holds whole.
    `compressed` is a cache of latent vectors instead of heads; `state_bytes` a sequence are kept
    whatever its length.
    """

    numbers: int
    heads: int
    window: int | None = None
    state_bytes: int = 0
    compressed: bool = False

    def tokens(self, context: int) -> int:
        """Tokens that the layer holds of a sequence of `context`."""
        return context if self.window is None else min(context, self.window)


def found(config: Config, size: str, default: int | None = None) -> int | None:
    """A size by any of its names; of a list, as some give one a layer, the largest."""
    for name in NAMES[size]:
        value = config.get(name)
        if isinstance(value, list):
            value = max((v for v in value if isinstance(v, int)), default=None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return default


def needed(config: Config, size: str, default: int | None = None) -> int:
    """A size that a plan cannot do without. Raises CheckpointError naming it."""
    value = found(config, size, default)
    if value is None or value < 1:
        name, kind = NAMES[size][0], config.get("model_type")
        of = f" of model_type {kind!r}" if kind else ""
        raise CheckpointError(
            f"config.json{of}: {name} is {config.get(name)!r}, expected a positive number",
            hint="give the config.json of a language model",
        )
    return value


def num_heads(config: Config) -> int:
    """Heads of attention; 1 for a model without any, which keeps states only."""
    if found(config, "heads") is None and set(_kinds(config)) <= {STATE, NOTHING}:
        return 1
    return needed(config, "heads")


def head_dim(config: Config) -> int:
    """Numbers in a head of keys."""
    default = needed(config, "hidden") // num_heads(config)
    return needed(config, "head_dim", default or None)


def kv_heads(config: Config) -> int:
    """Heads of keys and values in the cache."""
    heads = num_heads(config)
    kind = config.get("model_type")
    if kind in ONE_KEY_VALUE_HEAD:
        alone = config.get("multi_query", True) and not config.get("new_decoder_architecture")
        return 1 if alone else heads
    nested = config.get("attn_config")
    for part in (config, nested if isinstance(nested, dict) else {}):
        for name in ("num_key_value_heads", "kv_n_heads", "num_kv_heads"):
            if isinstance(value := part.get(name), int) and value > 0:
                return value
    return heads


def cache_layers(config: Config) -> tuple[CacheLayer, ...]:
    """The cache of a model, layer by layer. Raises CheckpointError for a config without sizes."""
    kinds = _kinds(config)
    shared = config.get("num_kv_shared_layers") or 0
    first_shared = len(kinds) - shared if shared else len(kinds)
    return tuple(
        _layer(_of_layer(config, i, kind), NOTHING if i >= first_shared else kind)
        for i, kind in enumerate(kinds)
    )


def _of_layer(config: Config, index: int, kind: str) -> Config:
    """The config with what differs in one layer: listed by layer, or Gemma 4's full attention."""
    listed = config.get("per_layer_config")
    if isinstance(listed, dict):
        own = listed.get(str(index))
        return {**config, **own} if isinstance(own, dict) else config
    if kind != ATTENTION or not found(config, "global_head_dim"):
        return config
    changed = {"head_dim": needed(config, "global_head_dim")}
    if config.get("attention_k_eq_v") and found(config, "global_heads"):
        changed["num_key_value_heads"] = needed(config, "global_heads")
    return {**config, **changed}


def _layer(config: Config, kind: str) -> CacheLayer:
    heads = kv_heads(config)
    state = _state_bytes(config) if kind in (STATE, BOTH) else 0
    if kind in (STATE, NOTHING):
        return CacheLayer(0, heads, None, state)
    if found(config, "latent"):
        latent = needed(config, "latent") + max(0, found(config, "rope", 0) or 0)
        return CacheLayer(latent, 1, compressed=True)
    window = _window(config) if kind == SLIDING else None
    return CacheLayer(2 * heads * head_dim(config), heads, window, state)


def _window(config: Config) -> int | None:
    window = found(config, "window")
    return window if window is not None and window > 0 else None


def _kinds(config: Config) -> list[str]:
    """What each layer keeps."""
    count = found(config, "layers")
    if count is not None and count > MOST_LAYERS:
        raise CheckpointError(
            f"config.json: {count} layers, expected at most {MOST_LAYERS}",
            hint="give the config.json of a language model",
        )
    listed = config.get("layer_types") or config.get("layers_block_type")
    listed = listed or config.get("hybrid_override_pattern")
    if listed:
        names = list(listed)[:count] if count else list(listed)
    else:
        count = needed(config, "layers")
        names = [_unlisted(config, i) for i in range(count)]
    return [KINDS.get(name, ATTENTION) if isinstance(name, str) else ATTENTION for name in names]


def _unlisted(config: Config, index: int) -> str:
    """The kind of a layer by what a config says of periods and indices."""
    for name in ("attn_layer_indices", "full_attn_idxs"):
        if isinstance(indices := config.get(name), list):
            return "attention" if index in indices else "linear_attention"
    if period := config.get("attn_layer_period"):
        offset = config.get("attn_layer_offset") or 0
        return "attention" if index % period == offset else "linear_attention"
    if blocks := config.get("block_types"):
        name = str(blocks[index % len(blocks)])
        return "sliding_attention" if name == "attention" else name
    if found(config, "state") is not None:
        return "hybrid" if config.get("model_type") == "falcon_h1" else "linear_attention"
    return _attention_kind(config, index)


def _attention_kind(config: Config, index: int) -> str:
    linear = "full_attention_interval" in config and found(config, "linear_value_heads")
    rest = "linear_attention" if linear else "sliding_attention"
    if not linear and (not _window(config) or config.get("use_sliding_window") is False):
        return "full_attention"
    if isinstance(no_rope := config.get("no_rope_layers"), list) and len(no_rope) > index:
        return "chunked_attention" if no_rope[index] else "full_attention"
    periods = (config.get(name) for name in PERIOD_NAMES)
    stated = next((p for p in periods if isinstance(p, int) and p > 0), None)
    period = stated or PERIODS.get(str(config.get("model_type")))
    if period and (index + 1) % period == 0:
        return "full_attention"
    if str(config.get("model_type")).startswith("qwen2"):
        return rest if index >= (config.get("max_window_layers") or 0) else "full_attention"
    return rest


def _state_bytes(config: Config) -> int:
    """A layer's convolution in 16 bits and its recurrent state in 32, of one sequence."""
    if found(config, "convolution"):
        return 2 * needed(config, "hidden") * needed(config, "convolution")
    if found(config, "linear_value_heads"):
        key_dim = needed(config, "linear_key_dim")
        keys = needed(config, "linear_key_heads") * key_dim
        values = needed(config, "linear_value_heads") * needed(config, "linear_value_dim")
        channels, recurrent = 2 * keys + values, values * key_dim
    elif found(config, "state") is None:
        return 0  # a state that the model keeps to itself
    else:
        inner, state = _inner(config), needed(config, "state")
        grouped = found(config, "mamba_groups", 0) or 0
        channels = inner + 2 * max(grouped, 0) * state
        recurrent = inner * state
    return 2 * channels * needed(config, "kernel", 4) + 4 * recurrent


def _inner(config: Config) -> int:
    """Channels of a Mamba layer: heads x head_dim, or `expand` times the hidden size."""
    heads, width = found(config, "mamba_heads"), found(config, "mamba_head_dim")
    if config.get("model_type") in ("mamba", "falcon_mamba"):
        return needed(config, "intermediate", 2 * needed(config, "hidden"))
    if config.get("model_type") == "mamba2":
        heads, width = config.get("num_heads"), config.get("head_dim")
    if isinstance(heads, int) and isinstance(width, int) and heads > 0 and width > 0:
        return heads * width
    return needed(config, "expand", 2) * needed(config, "hidden")

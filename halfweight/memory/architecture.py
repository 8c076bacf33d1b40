"""What a model is made of, from its config.json alone: tensors, cache layers, sizes. No torch.

`architecture(config)` lists the tensors that a checkpoint of this configuration holds, by the names
of its files, and for every layer what one token leaves in the KV cache. Families differ in few
ways, so a family is one row of FAMILIES. Cache layers are general: grouped heads, a head_dim that
is not hidden / heads, sliding windows, compressed (MLA) and shared layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from halfweight.errors import CheckpointError
from halfweight.quantization.scheme import TensorInfo

SAFETENSORS_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
DEFAULT_EXPERTS_PER_TOKEN = 2
"""Mixtral's, whose config may leave it out."""
HINT = "give the model's folder: its headers say all that a config of an unknown family does not"


@dataclass(frozen=True)
class Family:
    """Where an architecture differs from Llama."""

    qkv_bias: bool = False
    head_norms: bool = False
    feedforward_norms: bool = False
    experts: bool = False
    tied: bool = False
    default_window_pattern: int = 0


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(head_norms=True),
    "mixtral": Family(experts=True),
    "gemma3_text": Family(
        head_norms=True, feedforward_norms=True, tied=True, default_window_pattern=6
    ),
}
"""model_type -> its differences."""


@dataclass(frozen=True)
class CacheLayer:
    """What one layer keeps of the past: `numbers` a token, at most `window` tokens if it slides.

    A layer that uses another's keys and values keeps none. `heads` is the number of KV heads that
    tensor parallelism can share out; 1 for a compressed cache, which every rank holds whole.
    """

    numbers: int
    heads: int
    window: int | None = None

    def tokens(self, context: int) -> int:
        """Tokens that the layer holds of a sequence of `context`."""
        return context if self.window is None else min(context, self.window)


@dataclass(frozen=True)
class Architecture:
    """One model: sizes, tensors as stored in 16 bits, cache layers.

    `fused_mlp` and `fused_attention`: one product makes gate and up, or queries, keys and values.
    `experts_per_token` is 0 for a dense model, `kind` the config's model_type.
    """

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_context: int | None
    dtype: str
    tensors: tuple[TensorInfo, ...]
    cache_layers: tuple[CacheLayer, ...]
    fused_mlp: bool = False
    fused_attention: bool = False
    experts_per_token: int = 0
    kind: str = ""

    @property
    def num_parameters(self) -> int:
        """Numbers in all tensors; a tied head is not counted twice."""
        return sum(tensor.num_elements for tensor in self.tensors)

    def kv_bytes(self, tokens: int, element_bytes: int = 2) -> int:
        """Bytes of the cache of one sequence of `tokens` tokens."""
        each = (layer.numbers * layer.tokens(tokens) for layer in self.cache_layers)
        return sum(each) * element_bytes


def architecture(
    config: dict[str, Any], name: str = "", tensors: Sequence[TensorInfo] | None = None
) -> Architecture:
    """The architecture of a config.json; `tensors` of a checkpoint's headers are taken as they are.

    Raises CheckpointError for a config that lacks sizes, or without tensors for an unknown family.
    """
    text = text_config(config)
    dtype = _dtype(config, text)
    hidden, heads = _size(text, "hidden_size"), _size(text, "num_attention_heads")
    found = Architecture(
        name=name or text.get("model_type", "model"),
        hidden=hidden,
        intermediate=text.get("intermediate_size") or 4 * hidden,
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or hidden // heads,
        vocabulary=_size(text, "vocab_size"),
        max_context=text.get("max_position_embeddings"),
        dtype=dtype,
        tensors=(),
        cache_layers=(),
    )
    layers = tuple(_cache_layers(text, found))
    listed = tuple(tensors) if tensors is not None else tuple(_tensors(text, found))
    return replace(
        found,
        tensors=listed,
        cache_layers=layers,
        fused_mlp=any("gate_up_proj" in tensor.name for tensor in listed),
        fused_attention=any("qkv_proj" in tensor.name for tensor in listed),
        experts_per_token=_experts_per_token(text),
        kind=text.get("model_type") or "",
    )


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that describes the language model."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, dict) else config


def _size(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"config.json: {key} is {value!r}, expected a positive number",
            hint="give the config.json of a language model",
        )
    return value


def _experts_per_token(config: dict[str, Any]) -> int:
    if not any(config.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts")):
        return 0
    return config.get("num_experts_per_tok") or DEFAULT_EXPERTS_PER_TOKEN


def _dtype(config: dict[str, Any], text: dict[str, Any]) -> str:
    name = text.get("dtype") or text.get("torch_dtype") or config.get("torch_dtype") or "bfloat16"
    return SAFETENSORS_DTYPES.get(str(name).removeprefix("torch."), "BF16")


def _cache_layers(config: dict[str, Any], a: Architecture) -> Iterator[CacheLayer]:
    num_layers = _size(config, "num_hidden_layers")
    shared = config.get("num_kv_shared_layers") or 0
    if config.get("kv_lora_rank"):
        latent = config["kv_lora_rank"] + config.get("qk_rope_head_dim", 0)
        yield from [CacheLayer(latent, 1)] * num_layers
        return
    for i in range(num_layers):
        if i >= num_layers - shared:
            yield CacheLayer(0, a.kv_heads)
        else:
            yield CacheLayer(2 * a.kv_heads * a.head_dim, a.kv_heads, _window(config, i))


def _window(config: dict[str, Any], layer: int) -> int | None:
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return None
    if types := config.get("layer_types"):
        return window if types[layer] == "sliding_attention" else None
    family = FAMILIES.get(config.get("model_type", ""), Family())
    pattern = config.get("sliding_window_pattern") or family.default_window_pattern
    if pattern and (layer + 1) % pattern == 0:
        return None
    if config.get("model_type", "").startswith("qwen"):
        return window if layer >= config.get("max_window_layers", 0) else None
    return int(window)


def _tensors(config: dict[str, Any], a: Architecture) -> Iterator[TensorInfo]:
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise CheckpointError(f"config.json: model_type {kind!r} has no formula", hint=HINT)
    family = FAMILIES[kind]

    def tensor(name: str, *shape: int) -> TensorInfo:
        return TensorInfo(name, a.dtype, shape)

    yield tensor("model.embed_tokens.weight", a.vocabulary, a.hidden)
    for i in range(_size(config, "num_hidden_layers")):
        prefix = f"model.layers.{i}."
        for name, shape in (*_attention(config, a, family), *_feedforward(config, a, family)):
            yield tensor(prefix + name, *shape)
    yield tensor("model.norm.weight", a.hidden)
    if not config.get("tie_word_embeddings", family.tied):
        yield tensor("lm_head.weight", a.vocabulary, a.hidden)


Named = tuple[str, tuple[int, ...]]


def _attention(config: dict[str, Any], a: Architecture, family: Family) -> Iterator[Named]:
    queries, keys = a.heads * a.head_dim, a.kv_heads * a.head_dim
    biased = family.qkv_bias or bool(config.get("attention_bias"))
    for name, rows in (("q", queries), ("k", keys), ("v", keys)):
        yield f"self_attn.{name}_proj.weight", (rows, a.hidden)
        if biased:
            yield f"self_attn.{name}_proj.bias", (rows,)
    yield "self_attn.o_proj.weight", (a.hidden, queries)
    if config.get("attention_bias"):
        yield "self_attn.o_proj.bias", (a.hidden,)
    if family.head_norms:
        yield "self_attn.q_norm.weight", (a.head_dim,)
        yield "self_attn.k_norm.weight", (a.head_dim,)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if family.feedforward_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for norm in norms:
        yield f"{norm}.weight", (a.hidden,)


def _feedforward(config: dict[str, Any], a: Architecture, family: Family) -> Iterator[Named]:
    up, down = (a.intermediate, a.hidden), (a.hidden, a.intermediate)
    if family.experts:
        experts = _size(config, "num_local_experts")
        yield "block_sparse_moe.gate.weight", (experts, a.hidden)
        for i in range(experts):
            for name, shape in (("w1", up), ("w2", down), ("w3", up)):
                yield f"block_sparse_moe.experts.{i}.{name}.weight", shape
        return
    for name, shape in (("gate", up), ("up", up), ("down", down)):
        yield f"mlp.{name}_proj.weight", shape
        if config.get("mlp_bias"):
            yield f"mlp.{name}_proj.bias", shape[:1]

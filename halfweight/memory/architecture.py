"""What a model is made of, from its config.json alone: tensors, cache layers, sizes. No torch.

`architecture(config)` lists the tensors that a checkpoint of this configuration holds, by the names
of its files, and for every layer what one token leaves in the KV cache. Families differ in few
ways, so a family is one row of FAMILIES. Cache layers are general: grouped heads, a head_dim that
is not hidden / heads, sliding windows, compressed (MLA) and shared layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from halfweight.errors import CheckpointError
from halfweight.memory.cache_layers import (
    CacheLayer,
    cache_layers,
    found,
    head_dim,
    kv_heads,
    needed,
    num_heads,
)
from halfweight.quantization.scheme import TensorInfo

SAFETENSORS_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
MOST_EXPERTS = 1024
DEFAULT_EXPERTS_PER_TOKEN = 2
"""Mixtral's, whose config may leave it out."""
LARGEST_FACTOR, LARGEST_CONTEXT = 1 << 20, 1 << 40
"""A config that says more of its rotary scaling is not believed."""
SCALED_ROPES = ("yarn", "dynamic", "linear")
"""Kinds of rotary scaling whose `factor` lengthens the context."""
GENERATING_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
READING_HEADS = (
    "ForMaskedLM",
    "ForQuestionAnswering",
    "ForSequenceClassification",
    "ForTokenClassification",
    "EncoderModel",
)
ENCODERS = (
    "albert",
    "bert",
    "camembert",
    "deberta",
    "deberta-v2",
    "distilbert",
    "electra",
    "eurobert",
    "modernbert",
    "mpnet",
    "nomic_bert",
    "roberta",
    "xlm-roberta",
)
"""Ends of class names, and model types, of models that read and do not write."""
HINT = "give the model's folder: its headers say all that a config of an unknown family does not"


@dataclass(frozen=True)
class Family:
    """Where an architecture differs from Llama."""

    qkv_bias: bool = False
    head_norms: bool = False
    feedforward_norms: bool = False
    experts: bool = False
    tied: bool = False


FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(head_norms=True),
    "mixtral": Family(experts=True),
    "gemma3_text": Family(head_norms=True, feedforward_norms=True, tied=True),
}
"""model_type -> its differences."""


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
        return sum(each) * element_bytes + sum(layer.state_bytes for layer in self.cache_layers)


def architecture(
    config: dict[str, Any], name: str = "", tensors: Sequence[TensorInfo] | None = None
) -> Architecture:
    """The architecture of a config.json; `tensors` of a checkpoint's headers are taken as they are.

    Raises CheckpointError for a config that lacks sizes, or without tensors for an unknown family.
    """
    text = text_config(config)
    dtype = _dtype(config, text)
    hidden, heads = needed(text, "hidden"), num_heads(text)
    bare = Architecture(
        name=name or text.get("model_type", "model"),
        hidden=hidden,
        intermediate=max(0, found(text, "intermediate") or 0) or 4 * hidden,
        heads=heads,
        kv_heads=kv_heads(text),
        head_dim=head_dim(text),
        vocabulary=needed(text, "vocabulary"),
        max_context=context_tokens(text),
        dtype=dtype,
        tensors=(),
        cache_layers=cache_layers(text) if is_causal(config) else (),
    )
    listed = tuple(tensors) if tensors is not None else tuple(_tensors(text, bare))
    return replace(
        bare,
        tensors=listed,
        fused_mlp=any("gate_up_proj" in tensor.name for tensor in listed),
        fused_attention=any("qkv_proj" in tensor.name for tensor in listed),
        experts_per_token=_experts_per_token(text),
        kind=text.get("model_type") or "",
    )


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that describes the language model."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, dict) else config


def is_causal(config: Mapping[str, Any]) -> bool:
    """Whether a model generates, and so keeps a cache: an encoder alone does not."""
    names = [str(name) for name in config.get("architectures") or ()]
    if any(name.endswith(GENERATING_HEADS) for name in names):
        return True
    reads = any(name.endswith(READING_HEADS) for name in names)
    return not reads and config.get("model_type") not in ENCODERS


def context_tokens(config: Mapping[str, Any]) -> int | None:
    """The tokens that a text model has positions for, or None where its config sets no limit.

    `max_position_embeddings`, unless that was left as it was before rotary scaling: then what the
    scaling makes of `original_max_position_embeddings`, which for YaRN and dynamic scaling is by
    transformers' own rule the former where it is not given. The one answer for plan and engine.
    """
    stated = found(config, "context")
    if stated is None or stated < 1:
        return None
    return max(stated, *(_scaled(rope, stated) for rope in _ropes(config)))


def _ropes(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rotary parameters of a config: one set, or one for each kind of layer."""
    given = config.get("rope_parameters") or config.get("rope_scaling")
    given = given if isinstance(given, Mapping) else {}
    nested = [value for value in given.values() if isinstance(value, Mapping)]
    return nested or [given]


def _scaled(rope: Mapping[str, Any], stated: int) -> int:
    """Tokens that a rotary scaling makes room for; 0 where it says nothing of that."""
    kind, factor = rope.get("rope_type") or rope.get("type"), rope.get("factor")
    default = stated if kind in ("yarn", "dynamic") else None
    original = rope.get("original_max_position_embeddings") or default
    if not isinstance(factor, int | float) or not isinstance(original, int | float):
        return 0
    likely = 0 < factor < LARGEST_FACTOR and 0 < original < LARGEST_CONTEXT
    return int(original * factor) if kind in SCALED_ROPES and likely else 0


def _experts_per_token(config: dict[str, Any]) -> int:
    if not any(config.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts")):
        return 0
    count = config.get("num_experts_per_tok")
    return count if isinstance(count, int) and count > 0 else DEFAULT_EXPERTS_PER_TOKEN


def _experts(config: dict[str, Any]) -> int:
    count = config.get("num_local_experts")
    if not isinstance(count, int) or not 1 <= count <= MOST_EXPERTS:
        raise CheckpointError(
            f"config.json: num_local_experts is {count!r}, expected 1 to {MOST_EXPERTS}",
            hint="give the config.json of a language model",
        )
    return count


def _dtype(config: dict[str, Any], text: dict[str, Any]) -> str:
    name = text.get("dtype") or text.get("torch_dtype") or config.get("torch_dtype") or "bfloat16"
    return SAFETENSORS_DTYPES.get(str(name).removeprefix("torch."), "BF16")


def _tensors(config: dict[str, Any], a: Architecture) -> Iterator[TensorInfo]:
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise CheckpointError(f"config.json: model_type {kind!r} has no formula", hint=HINT)
    family = FAMILIES[kind]

    def tensor(name: str, *shape: int) -> TensorInfo:
        return TensorInfo(name, a.dtype, shape)

    yield tensor("model.embed_tokens.weight", a.vocabulary, a.hidden)
    for i in range(needed(config, "layers")):
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
        experts = _experts(config)
        yield "block_sparse_moe.gate.weight", (experts, a.hidden)
        for i in range(experts):
            for name, shape in (("w1", up), ("w2", down), ("w3", up)):
                yield f"block_sparse_moe.experts.{i}.{name}.weight", shape
        return
    for name, shape in (("gate", up), ("up", up), ("down", down)):
        yield f"mlp.{name}_proj.weight", shape
        if config.get("mlp_bias"):
            yield f"mlp.{name}_proj.bias", shape[:1]

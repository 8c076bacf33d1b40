"""What a GGUF file says of a model beside its tokenizer, by llama.cpp's own conventions.

An architecture of transformers is a row of ARCHITECTURES. What llama.cpp would run otherwise than
transformers does is refused here by name, not written and hoped for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfweight.errors import CheckpointError

ATTENTION_BIASES = ("q_proj.bias", "k_proj.bias", "v_proj.bias")
OTHER_BIASES = ("o_proj.bias", "gate_proj.bias", "up_proj.bias", "down_proj.bias")
ROPE_TYPES = ("default", "linear", "yarn", "llama3")
GEMMA3_PATTERN = 6
"""Every sixth layer of Gemma 3 sees everything; llama.cpp has that fixed."""
GEMMA3_27B_LAYERS = 62
"""By which llama.cpp knows the Gemma 3 whose attention is scaled by hidden_size / num_heads."""
INSTEAD = (
    "halfweight export --to dequantized writes a checkpoint for llama.cpp's convert_hf_to_gguf.py"
)


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp has a class of transformers.

    `turns_heads`: rotary pairs are neighbours, so rows of q_proj and k_proj are permuted.
    `norm_offset` is added to the weights of norms. `biases` are endings of biases it knows.
    """

    name: str
    activation: str
    turns_heads: bool = False
    norm_offset: float = 0.0
    biases: tuple[str, ...] = ()


_LLAMA = Architecture("llama", "silu", turns_heads=True, biases=(*ATTENTION_BIASES, *OTHER_BIASES))
ARCHITECTURES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Architecture("qwen2", "silu", biases=ATTENTION_BIASES),
    "Qwen3ForCausalLM": Architecture("qwen3", "silu"),
    "Gemma3ForCausalLM": Architecture("gemma3", "gelu_pytorch_tanh", norm_offset=1.0),
}
"""Class of transformers -> how llama.cpp has it."""


@dataclass(frozen=True)
class Parameters:
    """A model's config as transformers completes it (`values`), and what llama.cpp makes of it.

    `rope` are the rotary parameters of layers that see everything.
    """

    architecture: Architecture
    values: Mapping[str, Any]
    rope: Mapping[str, Any]

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        heads = self.values["num_attention_heads"]
        return int(self.values.get("head_dim") or self.values["hidden_size"] // heads)

    @property
    def num_heads(self) -> int:
        """Heads of queries."""
        return int(self.values["num_attention_heads"])

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""
        return int(self.values.get("num_key_value_heads") or self.num_heads)


def read_parameters(where: str, config: Mapping[str, Any]) -> Parameters:
    """The parameters of a config.json. Raises CheckpointError for what llama.cpp runs otherwise."""
    from halfweight.model.building import parsed_config

    names = config.get("architectures") or ["no architecture"]
    architecture = ARCHITECTURES.get(names[0])
    if architecture is None:
        raise CheckpointError(
            f"{where}: {names[0]} is not exported to GGUF, expected one of "
            f"{', '.join(ARCHITECTURES)}",
            hint=INSTEAD,
        )
    values = parsed_config(config).to_dict()
    rope = values.get("rope_parameters") or {}
    found = Parameters(architecture, values, rope.get("full_attention", rope))
    fault = _fault(found)
    if fault:
        raise CheckpointError(
            f"{where}: {fault}, which llama.cpp has no {architecture.name} for", hint=INSTEAD
        )
    return found


def notes(parameters: Parameters) -> tuple[str, ...]:
    """What llama.cpp does otherwise than transformers far into a context."""
    window = parameters.values.get("sliding_window")
    context = parameters.values["max_position_embeddings"]
    if parameters.architecture.name == "llama" and window and window < context:
        return (f"llama.cpp attends to all tokens, not only to the last {window}",)
    return ()


def add_parameters(writer: Any, parameters: Parameters, vocab_size: int) -> None:
    """Give a GGUFWriter all that llama.cpp reads of a model's form."""
    values, name = parameters.values, parameters.architecture.name
    writer.add_block_count(values["num_hidden_layers"])
    writer.add_context_length(values["max_position_embeddings"])
    writer.add_embedding_length(values["hidden_size"])
    writer.add_feed_forward_length(values["intermediate_size"])
    writer.add_head_count(parameters.num_heads)
    writer.add_head_count_kv(parameters.num_kv_heads)
    writer.add_key_length(parameters.head_dim)
    writer.add_value_length(parameters.head_dim)
    writer.add_layer_norm_rms_eps(values["rms_norm_eps"])
    writer.add_vocab_size(vocab_size)
    _add_rope(writer, parameters)
    if name == "gemma3":
        writer.add_sliding_window(values["sliding_window"])
        if values.get("final_logit_softcapping"):
            writer.add_final_logit_softcapping(values["final_logit_softcapping"])


def rope_factors(parameters: Parameters) -> NDArray[np.float32] | None:
    """By what each rotary frequency is divided [head_dim / 2], where rope_type is llama3."""
    rope = parameters.rope
    if rope.get("rope_type") != "llama3":
        return None
    halves = np.arange(0, parameters.head_dim, 2) / parameters.head_dim
    wavelengths = 2 * math.pi * rope["rope_theta"] ** halves
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / factor + smooth), np.float32)


def _add_rope(writer: Any, parameters: Parameters) -> None:
    from gguf import RopeScalingType

    rope, local = parameters.rope, parameters.values.get("rope_parameters") or {}
    writer.add_rope_dimension_count(parameters.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if "sliding_attention" in local:
        writer.add_rope_freq_base_swa(local["sliding_attention"]["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _fault(parameters: Parameters) -> str | None:
    """What of a config llama.cpp would run otherwise, in words."""
    values, rope = parameters.values, parameters.rope
    activation = values.get("hidden_act") or values.get("hidden_activation")
    kind = rope.get("rope_type", "default")
    if activation != parameters.architecture.activation:
        return f"activation {activation}"
    if kind not in ROPE_TYPES:
        return f"rotary embedding {kind}"
    if kind == "yarn" and any(rope.get(k) is not None for k in ("attention_factor", "mscale")):
        return "yarn with its own attention factor"
    if (rope.get("partial_rotary_factor") or 1) != 1:
        return f"partial_rotary_factor {rope['partial_rotary_factor']}"
    if values.get("use_sliding_window"):
        return "a sliding window in some layers"
    return _gemma3_fault(parameters) if parameters.architecture.name == "gemma3" else None


def _gemma3_fault(parameters: Parameters) -> str | None:
    values = parameters.values
    layers = values["num_hidden_layers"]
    by_heads = layers == GEMMA3_27B_LAYERS
    scaled = values["hidden_size"] // parameters.num_heads if by_heads else parameters.head_dim
    pattern = ["sliding_attention"] * (GEMMA3_PATTERN - 1) + ["full_attention"]
    local = (values.get("rope_parameters") or {}).get("sliding_attention") or {}
    if values.get("layer_types") != [pattern[i % GEMMA3_PATTERN] for i in range(layers)]:
        return f"layers that see everything elsewhere than at every {GEMMA3_PATTERN}th"
    if values.get("query_pre_attn_scalar") != scaled:
        return f"query_pre_attn_scalar {values.get('query_pre_attn_scalar')}"
    if values.get("attn_logit_softcapping"):
        return "attn_logit_softcapping"
    if values.get("use_bidirectional_attention"):
        return "attention in both directions"
    if local.get("rope_type", "default") != "default":
        return f"rotary embedding {local['rope_type']} in layers with a window"
    return None

"""Which models have Llama's layers: those that the engine runs by kernels of our own.

RMS norms, rotary heads, full attention and a gated SiLU between linears in INT8. The runners of
GPUs and CPUs build their steps from these modules; all other models run through transformers' own
forward.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from halfweight.model.modules import QuantizedLinear

FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Models whose forward is the one our kernels follow."""
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles depend on the position alone."""
LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
"""The linears of a layer."""
SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of linears in one module that read the same x: on a GPU they are one product."""


def difference(model: PreTrainedModel) -> str | None:
    """What sets `model` apart from those that our kernels follow, or None."""
    name, config = type(model).__name__, model.config
    if name not in FAMILY:
        return f"{name} is not one of {', '.join(FAMILY)}"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}, not silu"
    if config.rope_parameters["rope_type"] not in STATIC_ROPE:
        return f"its rotary embedding is {config.rope_parameters['rope_type']}"
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        return "some layers attend to a sliding window"
    if getattr(config, "sliding_window", None) and name == "MistralForCausalLM":
        return "its layers attend to a sliding window"
    for layer in model.model.layers:
        for linear in layer_linears(layer):
            if not isinstance(linear, QuantizedLinear):
                return "not every linear of its layers is in INT8"
    return None


def layer_linears(layer: Any) -> list[Any]:
    """The modules called LINEARS, in that order."""
    return [layer.get_submodule(name) for name in LINEARS]

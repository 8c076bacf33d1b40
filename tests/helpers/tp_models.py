"""Small models of the families that several ranks run, whose sizes four ranks divide."""

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

import halfweight
from halfweight.quantization.scheme import Recipe, Scheme

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "head_dim": 32,
}
"""Of 8 heads four ranks have 2 each; of 2 heads of keys and values two ranks have the same one."""
CONFIGS = {
    "llama": LlamaConfig(**SIZES, attention_bias=True),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES | {"num_key_value_heads": 4}),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128
    ),
}


def make(kind, folder, recipe=None, **changes):
    """A random model of the kind in INT8, its norms and biases away from 1 and 0; `changes` of its
    config.
    """
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[kind])
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        scale = 1.0 if "embed" in name else 0.3 if parameter.dim() == 1 else 0.05
        parameter.data += scale * torch.randn_like(parameter)
    model.to(torch.bfloat16).save_pretrained(folder / "source")
    halfweight.quantize(folder / "source", folder / "int8", recipe or Recipe(Scheme(32)))
    return folder / "int8"

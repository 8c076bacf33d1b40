"""Small models of every family that our own decode steps take, quantized."""

import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

import halfweight

SIZES = tiny.SIZES | {"vocab_size": 323, "max_position_embeddings": 256}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILY = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-3": LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "llama-bias": LlamaConfig(**SIZES, attention_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
}


def quantized(tmp_path, config, dtype=torch.float32):
    """A random model of `config` in INT8, its norms and biases away from 1 and 0."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    halfweight.quantize(tmp_path / "source", tmp_path / "int8")
    return halfweight.load(tmp_path / "int8", dtype=dtype)

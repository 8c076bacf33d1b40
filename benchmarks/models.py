"""Random models of real shapes: a 16-bit checkpoint and its INT8 conversion, or INT8 in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import halfweight
from halfweight.evaluation.speed.rivals import Folders, activation_dtype
from halfweight.kernels.operations import choose_backend
from halfweight.kernels.timing import random_weight
from halfweight.model.placement import Options, stand_in

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama that matter for speed and memory."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int = 8192

    @property
    def config(self) -> LlamaConfig:
        """As transformers wants it, without a stop token."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=self.context,
            rope_theta=500000.0,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=None,
        )


SHAPES = {
    "llama-3-8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "llama-3.2-1b": Shape(2048, 8192, 16, 32, 8, 128256),
    "tiny": Shape(128, 256, 2, 4, 2, 512, context=512),
}


def folders(name: str, under: Path) -> Folders:
    """The two checkpoints of the shape `name`, made under a folder unless they are there."""
    source, quantized = under / f"{name}-16-bit", under / f"{name}-int8"
    if not (source / "complete").exists():
        torch.manual_seed(0)
        dtype = activation_dtype(DEVICE)
        with DEVICE:
            model = AutoModelForCausalLM.from_config(SHAPES[name].config, dtype=dtype)
        model.save_pretrained(source, max_shard_size="2GB")
        del model
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
        (source / "complete").touch()
    if not quantized.exists():
        halfweight.quantize(source, quantized)
    return Folders(source, quantized)


def random_model(name: str) -> Any:
    """A model of a named shape with random INT8 weights on the device."""
    torch.manual_seed(0)
    config, backend = SHAPES[name].config, choose_backend(DEVICE)
    config.max_position_embeddings = 1 << 17
    dtype = torch.float16 if DEVICE.type == "cuda" else torch.float32
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            new = stand_in(module, Options(backend), dtype)
            shape = (new.out_features, new.in_features)
            new.hold(random_weight(shape, DEVICE, min(128, shape[1])))
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
        elif getattr(module, "weight", None) is not None:
            module.weight = torch.nn.Parameter(torch.ones_like(module.weight, device=DEVICE))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(DEVICE)
    return model.eval().requires_grad_(False)

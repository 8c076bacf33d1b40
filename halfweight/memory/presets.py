"""Configurations of well-known models, by short names: their published config.json sizes."""

from __future__ import annotations

from typing import Any

from halfweight.errors import UsageError

FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)

_HEAD_128 = {"head_dim": 128}
_SIZES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "llama-3-8b": ("llama", (4096, 14336, 32, 32, 8, 128256, 8192), {}),
    "llama-3-70b": ("llama", (8192, 28672, 80, 64, 8, 128256, 8192), {}),
    "llama-3.1-405b": ("llama", (16384, 53248, 126, 128, 8, 128256, 131072), {}),
    "smollm2-135m": ("llama", (576, 1536, 30, 9, 3, 49152, 8192), {"tied": True}),
    "smollm2-360m": ("llama", (960, 2560, 32, 15, 5, 49152, 8192), {"tied": True}),
    "smollm2-1.7b": ("llama", (2048, 8192, 24, 32, 32, 49152, 8192), {"tied": True}),
    "qwen2.5-0.5b": ("qwen2", (896, 4864, 24, 14, 2, 151936, 32768), {"tied": True}),
    "qwen2.5-1.5b": ("qwen2", (1536, 8960, 28, 12, 2, 151936, 32768), {"tied": True}),
    "qwen2.5-3b": ("qwen2", (2048, 11008, 36, 16, 2, 151936, 32768), {"tied": True}),
    "qwen2.5-7b": ("qwen2", (3584, 18944, 28, 28, 4, 152064, 32768), {}),
    "qwen2.5-14b": ("qwen2", (5120, 13824, 48, 40, 8, 152064, 32768), {}),
    "qwen2.5-32b": ("qwen2", (5120, 27648, 64, 40, 8, 152064, 32768), {}),
    "qwen2.5-72b": ("qwen2", (8192, 29568, 80, 64, 8, 152064, 32768), {}),
    "qwen3-0.6b": ("qwen3", (1024, 3072, 28, 16, 8, 151936, 40960), {"tied": True, **_HEAD_128}),
    "qwen3-1.7b": ("qwen3", (2048, 6144, 28, 16, 8, 151936, 40960), {"tied": True, **_HEAD_128}),
    "qwen3-4b": ("qwen3", (2560, 9728, 36, 32, 8, 151936, 40960), {"tied": True, **_HEAD_128}),
    "qwen3-8b": ("qwen3", (4096, 12288, 36, 32, 8, 151936, 40960), _HEAD_128),
    "qwen3-14b": ("qwen3", (5120, 17408, 40, 40, 8, 151936, 40960), _HEAD_128),
    "qwen3-32b": ("qwen3", (5120, 25600, 64, 64, 8, 151936, 40960), _HEAD_128),
    "mistral-7b-v0.1": ("mistral", (4096, 14336, 32, 32, 8, 32000, 32768), {"window": 4096}),
    "mistral-7b-v0.3": ("mistral", (4096, 14336, 32, 32, 8, 32768, 32768), {}),
    "mistral-nemo-12b": ("mistral", (5120, 14336, 40, 32, 8, 131072, 131072), {"head_dim": 128}),
    "mixtral-8x7b": ("mixtral", (4096, 14336, 32, 32, 8, 32000, 32768), {"experts": 8}),
    "gemma-3-1b": (
        "gemma3_text",
        (1152, 6912, 26, 4, 1, 262144, 32768),
        {"tied": True, "head_dim": 256, "window": 512},
    ),
    "gemma-3-4b": (
        "gemma3_text",
        (2560, 10240, 34, 8, 4, 262208, 131072),
        {"tied": True, "head_dim": 256, "window": 1024},
    ),
    "gemma-3-12b": (
        "gemma3_text",
        (3840, 15360, 48, 16, 8, 262208, 131072),
        {"tied": True, "head_dim": 256, "window": 1024},
    ),
    "gemma-3-27b": (
        "gemma3_text",
        (5376, 21504, 62, 32, 16, 262208, 131072),
        {"tied": True, "head_dim": 128, "window": 1024},
    ),
}
"""name -> model_type, sizes in the order of FIELDS, what else differs. Gemma 3: the language model,
without the vision tower."""

PRESETS = tuple(_SIZES)
_KEYS = {"head_dim": "head_dim", "window": "sliding_window", "experts": "num_local_experts"}


def preset(name: str) -> dict[str, Any]:
    """The config of a preset. Raises UsageError with the names there are."""
    if name not in _SIZES:
        raise UsageError(f"no preset {name!r}", hint=f"use one of {', '.join(PRESETS)}")
    kind, sizes, extra = _SIZES[name]
    return {
        "model_type": kind,
        **dict(zip(FIELDS, sizes, strict=True)),
        "tie_word_embeddings": extra.get("tied", False),
        "sliding_window": None,
        "use_sliding_window": "window" in extra,
        "dtype": "bfloat16",
        **{_KEYS[key]: value for key, value in extra.items() if key in _KEYS},
    }

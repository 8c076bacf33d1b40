"""A KV cache in one byte a number: int8 keys and values, one 16-bit scale a token and head.

A drop-in for transformers' StaticCache, for who runs a model by transformers' own
`model.generate(..., past_key_values=Int8Cache(...))`; the engine's pages round the same way. Shapes
are static and every write is in place, so CUDA graphs hold it.
With head_dim 128 it takes (128 + 2) / 256 = 50.8 % of the 16-bit cache. What is read back is in
the model's dtype and lives for one layer: attention itself stays transformers'.

As for weights, the scale is rounded to its stored dtype first and numbers are rounded against the
stored scale, so |x - q * scale| <= scale / 2 but for the largest number of a head, whose scale may
have been rounded down. Sliding-window layers hold no more than a window and stay in 16 bits.

Refused: one scale a channel of the keys (finer for keys with outlier channels, but known only once
the whole prompt is; at 8 bits a scale a token costs almost nothing: benchmarks/kv_cache.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from halfweight.quantization.numerics import QMAX


def quantize_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """q int8 like x [..., D] and scales [..., 1] in x's dtype, one a vector of D numbers."""
    smallest = torch.finfo(x.dtype).smallest_normal
    scales = (x.float().abs().amax(dim=-1, keepdim=True) / QMAX).clamp(min=smallest).to(x.dtype)
    q = (x.float() / scales.float()).round().clamp(-QMAX, QMAX)
    return q.to(torch.int8), scales


class Int8Layer(StaticLayer):  # type: ignore[misc]  # transformers is not typed
    """One layer: keys and values int8 [batch, heads, max_cache_len, D], scales [..., 1]."""

    cumulative_length: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch, heads, dtype and device of the first states [B, H, T, D]."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        self.cumulative_length = self.cumulative_length.to(self.device)
        self.keys = self._zeros(self.k_head_dim, torch.int8)
        self.values = self._zeros(self.v_head_dim, torch.int8)
        self.key_scales = self._zeros(1, self.dtype)
        self.value_scales = self._zeros(1, self.dtype)
        for tensor in (*self._stored, self.cumulative_length):
            torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the states [B, H, T, D] of T new tokens; all keys and values, dequantized."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        num_tokens = key_states.shape[-2]
        positions = torch.arange(num_tokens, device=self.device) + self.cumulative_length
        self.cumulative_length.add_(num_tokens)
        new = (*quantize_heads(key_states), *quantize_heads(value_states))
        for stored, states in zip(self._stored, new, strict=True):
            stored.index_copy_(2, positions, states)
        return self.keys * self.key_scales, self.values * self.value_scales

    def reset(self) -> None:
        """Forget every token, keep the memory."""
        super().reset()
        if self.is_initialized:
            self.key_scales.zero_()
            self.value_scales.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch, for beam search."""
        super().reorder_cache(beam_idx)
        self.key_scales = self.key_scales.index_select(0, beam_idx.to(self.device))
        self.value_scales = self.value_scales.index_select(0, beam_idx.to(self.device))

    @property
    def _stored(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.keys, self.key_scales, self.values, self.value_scales

    def _zeros(self, width: int, dtype: torch.dtype) -> Tensor:
        shape = (self.batch_size, self.num_heads, self.max_cache_len, width)
        return torch.zeros(shape, dtype=dtype, device=self.device)


class Int8Cache(StaticCache):  # type: ignore[misc]
    """transformers' StaticCache with full-attention layers in int8; same arguments."""

    layers: list[Any]

    def __init__(self, config: Any, max_cache_len: int, **kwargs: Any) -> None:
        super().__init__(config, max_cache_len, **kwargs)
        self.layers = [
            Int8Layer(max_cache_len) if type(layer) is StaticLayer else layer
            for layer in self.layers
        ]

"""Decode on a GPU: ten launches a layer, recorded once as a CUDA graph (between_products.py).

Models whose layers are Llama's take it at any batch size, with either cache. The projections that
share an input (q, k, v; gate, up) are one product: their weights lie one behind the other in memory
(`stack`), which costs nothing where the loader has put them so.

The prompt of a single sequence goes the same way, with torch's causal attention over the cache as
it lies: no mask, and no keys and values repeated for grouped heads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel, StaticCache

from halfweight.engine.kv_cache import Int8Cache
from halfweight.kernels.triton.launch import device_info, launch
from halfweight.model.llama_like import difference, layer_linears
from halfweight.model.modules import QuantizedLinear, stack

log = logging.getLogger("halfweight")

SPLIT_TOKENS = 64
"""Cached tokens that attention loads at a time; no share is smaller."""
PROGRAMS_A_PROCESSOR = 4
FLASH_CAPABILITY = (8, 0)
LEAST_HEAD_SIZE = 32
COLUMNS = 1024
"""Of the gated activation, to a program."""
MIN_DOT_ROWS = 16


@dataclass(frozen=True)
class _Layer:
    """The parts of a layer as the step uses them."""

    input_norm: Tensor
    qkv: QuantizedLinear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: QuantizedLinear
    post_norm: Tensor
    gate_up: QuantizedLinear
    down: QuantizedLinear


Attend = Callable[[_Layer, Any, Tensor], Tensor]
"""Attention of a layer with its cache, of projected queries, keys and values [tokens, ...]."""


def unsupported(model: PreTrainedModel) -> str | None:
    """Why `model` has no step of this kind, or None."""
    reason = difference(model)
    if reason is not None:
        return reason
    head_size = model.model.layers[0].self_attn.head_dim
    if head_size < LEAST_HEAD_SIZE or head_size.bit_count() != 1:
        return f"its heads have {head_size} numbers, expected a power of two from {LEAST_HEAD_SIZE}"
    for layer in model.model.layers:
        q, k, v, _, gate, up, _ = layer_linears(layer)
        for linears in ([q, k, v], [gate, up]):
            kinds = {(x.group_size, x.weight_scale.dtype, x.bias is None) for x in linears}
            if len(kinds) > 1:
                return "projections that share their input differ in group size, scales or bias"
    return None


class GpuStep:
    """The decode step of a batch: `step()` -> logits float32 [B, V], from tensors that it reads.

    `ids` [B, 1] are the tokens to read, `slot` int32 [1] their place in the cache, `starts` int32
    [B] the place of each sequence's first token. A prefill through the model has filled `cache` up
    to `slot`; the step writes there. Every call does the same launches: a CUDA graph may hold them.
    """

    def __init__(
        self, model: PreTrainedModel, cache: StaticCache, ids: Tensor, slot: Tensor, starts: Tensor
    ) -> None:
        """Stacks the model's projections, once for each model; makes a cache that is not there."""
        self._model, self._cache = model, cache
        self._ids, self._slot, self._starts = ids, slot, starts
        self._layers = _layers_of(model)
        body = model.model
        self._epsilon = float(body.norm.variance_epsilon)
        self._attention = body.layers[0].self_attn
        sizes = (model.config.num_key_value_heads, self._attention.head_dim)
        cache.early_initialization(len(ids), *sizes, body.norm.weight.dtype, ids.device)
        max_length = cache.layers[0].keys.shape[2]
        positions = torch.arange(max_length, device=ids.device)[None]
        tables = body.rotary_emb(torch.empty(1, device=ids.device), positions)
        half = self._attention.head_dim // 2
        self._cos, self._sin = (t[0, :, :half].float().contiguous() for t in tables)

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        """Logits of the next token of every sequence."""
        hidden, delta = self._through_layers(self._ids, self._attend)
        return self._logits(hidden, delta)

    @property
    def reads_prompts(self) -> bool:
        """Whether `prefill` may be called: the cache is not int8, and torch has flash attention.

        Without that, attention over a long prompt would hold the scores of all its tokens.
        """
        keys = self._cache.layers[0].keys
        if keys.dtype not in (torch.float16, torch.bfloat16):
            return False
        if torch.version.hip is not None:
            return True
        return torch.cuda.get_device_capability(keys.device) >= FLASH_CAPABILITY

    @torch.inference_mode()
    def prefill(self, ids: Tensor, begin: int) -> Tensor:
        """Read tokens [1, T] of a sequence alone, from place `begin` on; logits [1, V] of the last.

        The cache holds all tokens before `begin`.
        """
        hidden, delta = self._through_layers(ids, partial(self._attend_all, begin))
        return self._logits(hidden[-1:], delta[-1:])

    def _through_layers(self, ids: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """Hidden states [tokens, H] of ids and what the last layer adds to them."""
        hidden: Tensor = self._model.get_input_embeddings()(ids).view(ids.numel(), -1)
        delta = None
        for layer, cached in zip(self._layers, self._cache.layers, strict=True):
            normed = self._norm(hidden, delta, layer.input_norm)
            delta = layer.o(attend(layer, cached, layer.qkv(normed)))
            normed = self._norm(hidden, delta, layer.post_norm)
            delta = layer.down(_gated(layer.gate_up(normed)))
        assert delta is not None
        return hidden, delta

    def _logits(self, hidden: Tensor, delta: Tensor) -> Tensor:
        last = self._norm(hidden, delta, self._model.model.norm.weight)
        logits: Tensor = self._model.get_output_embeddings()(last).float()
        return logits

    def _norm(self, hidden: Tensor, delta: Tensor | None, weight: Tensor) -> Tensor:
        """The norm of hidden + delta, which becomes hidden."""
        batch, size = hidden.shape
        out = torch.empty_like(hidden)
        launch(
            "add_norm",
            (batch, 1),
            batch,
            (hidden, delta, weight, out, self._epsilon),
            SIZE=size,
            BLOCK=_power_of_two(size),
            HAS_DELTA=delta is not None,
            num_warps=8,
        )
        return out

    def _attend_all(self, begin: int, layer: _Layer, cached: Any, qkv: Tensor) -> Tensor:
        """Causal attention of new tokens at places begin, begin + 1, ... of the only sequence."""
        (_, kv_heads, max_length, head_size), tokens = cached.keys.shape, len(qkv)
        heads, end = qkv.shape[1] // head_size - 2 * kv_heads, begin + tokens
        queries = qkv.new_empty(1, tokens, heads, head_size)
        launch(
            "rotate_into_cache",
            (tokens, 1),
            tokens,
            (
                *(qkv, layer.q_norm, layer.k_norm, queries, cached.keys, cached.values),
                *(self._cos, self._sin, begin, max_length, self._epsilon),
            ),
            HEADS=heads,
            KV_HEADS=kv_heads,
            HEAD_SIZE=head_size,
            Q_ROWS=_power_of_two(heads),
            KV_ROWS=_power_of_two(kv_heads),
            HAS_NORM=layer.q_norm is not None,
            num_warps=8,
        )
        out = scaled_dot_product_attention(
            queries.transpose(1, 2),
            cached.keys[:, :, :end],
            cached.values[:, :, :end],
            attn_mask=causal_lower_right(tokens, end) if begin else None,
            is_causal=begin == 0,
            scale=float(self._attention.scaling),
            enable_gqa=heads > kv_heads,
        )
        return out.transpose(1, 2).reshape(tokens, heads * head_size)

    def _attend(self, layer: _Layer, cached: Any, qkv: Tensor) -> Tensor:
        keys, values = cached.keys, cached.values
        batch, kv_heads, max_length, head_size = keys.shape
        heads = qkv.shape[1] // head_size - 2 * kv_heads
        splits = _num_splits(batch * kv_heads, max_length, qkv.device)
        out = qkv.new_empty(batch, heads * head_size)
        partials = qkv.new_empty(batch * heads, splits, head_size, dtype=torch.float32)
        stats = qkv.new_empty(batch * heads, splits, 2, dtype=torch.float32)
        is_int8 = keys.dtype == torch.int8
        launch(
            "attend",
            (batch * kv_heads, splits),
            batch,
            (
                *(qkv, layer.q_norm, layer.k_norm, keys, values),
                *((cached.key_scales, cached.value_scales) if is_int8 else (None, None)),
                *(self._cos, self._sin, self._slot, self._starts, out, partials, stats),
                *(max_length, float(self._attention.scaling), self._epsilon),
            ),
            HEADS=heads,
            KV_HEADS=kv_heads,
            HEAD_SIZE=head_size,
            ROWS=max(MIN_DOT_ROWS, _power_of_two(heads // kv_heads)),
            SPLITS=splits,
            BLOCK=SPLIT_TOKENS,
            HAS_NORM=layer.q_norm is not None,
            INT8=is_int8,
            SMALLEST=torch.finfo(qkv.dtype).smallest_normal,
            num_warps=4,
            num_stages=2,
        )
        if splits > 1:
            launch(
                "merge_splits",
                (batch * heads, 1),
                batch,
                (partials, stats, out),
                HEAD_SIZE=head_size,
                SPLITS=splits,
                ROWS=_power_of_two(splits),
            )
        return out


def step_for(
    model: PreTrainedModel, cache: Any, ids: Tensor, slot: Tensor, starts: Tensor
) -> GpuStep | None:
    """The fast step for a cache, or None where the model or cache has none."""
    reason = unsupported(model)
    if reason is None and type(cache) not in (StaticCache, Int8Cache):
        reason = f"its cache is a {type(cache).__name__}"
    if reason is not None:
        log.info("decode through transformers' forward: %s", reason)
        return None
    return GpuStep(model, cache, ids, slot, starts)


_stacked: WeakKeyDictionary[PreTrainedModel, list[_Layer]] = WeakKeyDictionary()


def _layers_of(model: PreTrainedModel) -> list[_Layer]:
    if model not in _stacked:
        with torch.inference_mode(False):
            _stacked[model] = [_layer(layer) for layer in model.model.layers]
    return _stacked[model]


def _layer(layer: Any) -> _Layer:
    q, k, v, o, gate, up, down = layer_linears(layer)
    attention = layer.self_attn
    return _Layer(
        layer.input_layernorm.weight,
        stack([q, k, v]),
        *(attention.q_norm.weight if hasattr(attention, "q_norm") else None,),
        *(attention.k_norm.weight if hasattr(attention, "k_norm") else None,),
        o,
        layer.post_attention_layernorm.weight,
        stack([gate, up]),
        down,
    )


def _gated(gate_up: Tensor) -> Tensor:
    """silu(gate) up of [B, 2 I]."""
    batch, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(batch, size)
    launch(
        "gated_silu", (-(-size // COLUMNS), batch), batch, (gate_up, out), SIZE=size, BLOCK=COLUMNS
    )
    return out


def _num_splits(programs: int, max_length: int, device: torch.device) -> int:
    """Shares of the cache: enough to fill the GPU, none without tokens when the cache is full."""
    wanted = PROGRAMS_A_PROCESSOR * device_info(device).num_processors // programs
    return max(1, min(wanted, -(-max_length // SPLIT_TOKENS)))


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()

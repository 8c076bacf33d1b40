"""Bytes of the cache of one layer: in the engine's pages, and in another engine's. No torch."""

from __future__ import annotations

from halfweight.memory.cache_layers import CacheLayer
from halfweight.memory.engine_memory import PAGE_TOKENS, RunnerKind
from halfweight.memory.workload import Workload


def page_slots(workload: Workload, runner: RunnerKind) -> int:
    """Tokens that the pages of the workload have places for, those of page 0 included."""
    size = PAGE_TOKENS[runner]
    return size * (1 + workload.batch * -(-workload.context // size))


def layer_bytes(layer: CacheLayer, workload: Workload, runner: RunnerKind) -> int:
    """Of a token in a page; scales are float32 on a CPU, else 16 bits."""
    if workload.kv_dtype == "16bit":
        return 2 * layer.numbers
    scale = 4 if runner == "cpu" else 2
    return layer.numbers + (2 * scale * layer.heads if layer.numbers else 0)


def other_layer_bytes(layer: CacheLayer, heads: int, workload: Workload) -> int:
    """Of all tokens of the workload in another engine's cache."""
    numbers = layer.numbers // layer.heads * heads
    each = 2 * numbers
    if workload.kv_dtype == "int8" and layer.window is None:
        each = numbers if workload.runtime == "vllm" else numbers + 2 * 2 * heads
    return workload.batch * each * layer.tokens(workload.context)


def kind_of_layer(layer: CacheLayer) -> str:
    """What follows "KV cache" in the name of a layer's part."""
    if layer.compressed:
        return ", compressed"
    return "" if layer.window is None else ", sliding window"

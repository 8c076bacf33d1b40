"""How many pages fit beside the model: what a step allocates is counted, the rest is pages."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from halfweight.engine.runners.gpu_attention import (
    DECODE_PROGRAMS,
    PAGE_TOKENS,
    TILE_ROWS,
    Shape,
)
from halfweight.engine.runners.gpu_read import READ_TOKENS
from halfweight.errors import DoesNotFitError

GIB = 1 << 30
FIXED_BYTES = 768 << 20
"""Workspaces of the products, CUDA graphs, and the code of kernels that are not loaded yet."""
LOGIT_ROWS = 2048
"""Rows of logits of a mixed step that are counted: prompts whose own log chances are wanted."""


@dataclass(frozen=True)
class Limits:
    """What a runner has to have room for."""

    max_context: int
    max_sequences: int
    max_step_tokens: int
    kv_cache: str
    num_processors: int

    @property
    def most_pages(self) -> int:
        """Pages that all slots can use, and page 0."""
        return self.max_sequences * self.max_pages + 1

    @property
    def max_pages(self) -> int:
        """Pages of the longest sequence."""
        return -(-self.max_context // PAGE_TOKENS)


def activation_bytes(model: PreTrainedModel, num_tokens: int) -> int:
    """The most that the layers' intermediate results take at once for so many tokens."""
    config, shape = model.config, Shape.of(model)
    hidden, inner = int(config.hidden_size), int(config.intermediate_size)
    width = shape.heads * shape.head_size
    qkv = width + 2 * shape.kv_heads * shape.head_size
    attention = 2 * hidden + qkv + 2 * width
    mlp = 3 * hidden + 3 * inner
    return int(num_tokens * (hidden + max(attention, mlp)) * shape.dtype.itemsize)


def step_bytes(model: PreTrainedModel, limits: Limits) -> int:
    """Bytes beside weights and pages: tables, the largest mixed step, recorded steps, logits."""
    shape, config = Shape.of(model), model.config
    size = shape.dtype.itemsize
    slots = limits.max_sequences + 1
    tables = slots * (limits.max_context + 1 + limits.max_pages) * 4
    rotary = 2 * limits.max_context * shape.head_size * 2
    row = (shape.head_size + 2) * 4
    programs = limits.num_processors
    parts = row * 2 * programs * TILE_ROWS
    parts += row * (
        max(DECODE_PROGRAMS.values()) * programs + limits.max_sequences * shape.kv_heads
    )
    logits = (LOGIT_ROWS + 2 * limits.max_sequences) * int(config.vocab_size) * size
    steps = activation_bytes(model, limits.max_step_tokens)
    recorded = max(limits.max_sequences, min(READ_TOKENS, limits.max_step_tokens))
    steps += 2 * activation_bytes(model, recorded)  # as it is recorded, and run before that
    return FIXED_BYTES + tables + rotary + parts + logits + steps + scratch_bytes(model, limits)


def scratch_pages(limits: Limits) -> int:
    """Pages of one layer in 16 bits that INT8 pages of prompts are turned to: the longest
    sequence's, or those of a step of many short ones.
    """
    if limits.kv_cache != "int8":
        return 0
    return max(limits.max_pages, 2 * -(-limits.max_step_tokens // PAGE_TOKENS))


def scratch_bytes(model: PreTrainedModel, limits: Limits) -> int:
    """Bytes of the scratch pages."""
    return scratch_pages(limits) * Shape.of(model).page_bytes("16bit")


def pages_that_fit(model: PreTrainedModel, limits: Limits, free_bytes: int) -> int:
    """Pages, page 0 included, no more than all slots can use; raises DoesNotFitError below one
    sequence of `max_context` tokens.
    """
    needed = step_bytes(model, limits)
    page = Shape.of(model).page_bytes(limits.kv_cache) * int(model.config.num_hidden_layers)
    found = max(0, free_bytes - needed) // page
    least = limits.max_pages + 1
    if found < least:
        raise DoesNotFitError(
            f"a KV cache of {limits.max_context} tokens needs {least * page / GIB:.2f} GiB and a "
            f"step {needed / GIB:.2f} GiB, {free_bytes / GIB:.2f} GiB are free",
            hint="lower max_context, max_sequences or max_step_tokens, or take kv_cache='int8'",
        )
    return min(found, limits.most_pages)

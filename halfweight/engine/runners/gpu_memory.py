"""How many pages fit beside the model, by the planner's arithmetic (memory/engine_memory.py)."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel

from halfweight.engine.runners.gpu_attention import PAGE_TOKENS, Shape
from halfweight.errors import DoesNotFitError
from halfweight.memory.engine_memory import (
    LOGIT_ROWS,
    Limits,
    Sizes,
    gpu_parts,
    page_bytes,
)
from halfweight.model.share import shared
from halfweight.model.stage import logits_width

GIB = 1 << 30
FIXED_BYTES = 768 << 20
"""Workspaces of the products, CUDA graphs, and the code of kernels that are not loaded yet."""


def sizes_of(model: PreTrainedModel) -> Sizes:
    """Those of a Llama-like model, or of a rank's part of one."""
    config, shape, by = model.config, Shape.of(model), shared(model)
    return Sizes(
        int(config.num_hidden_layers),
        int(config.hidden_size),
        int(config.intermediate_size),
        shape.heads,
        shape.kv_heads,
        shape.head_size,
        logits_width(model),
        shape.dtype.itemsize,
        1 if by is None else by.share.ranks,
    )


def step_bytes(sizes: Sizes, limits: Limits) -> int:
    """Bytes beside weights and pages, with what cannot be counted."""
    prompts = LOGIT_ROWS * sizes.vocabulary * sizes.number_bytes
    return FIXED_BYTES + prompts + sum(gpu_parts(sizes, limits).values())


def pages_that_fit(sizes: Sizes, limits: Limits, free_bytes: int) -> int:
    """Pages, page 0 included, no more than all slots can use; raises DoesNotFitError below one
    sequence of `max_context` tokens.
    """
    needed, page = step_bytes(sizes, limits), _page_bytes(sizes, limits)
    found, least = max(0, free_bytes - needed) // page, limits.max_pages + 1
    if found < least:
        raise DoesNotFitError(
            f"a KV cache of {limits.max_context} tokens needs {least * page / GIB:.2f} GiB and a "
            f"step {needed / GIB:.2f} GiB, {free_bytes / GIB:.2f} GiB are free",
            hint="lower max_context, max_sequences or max_step_tokens, or take kv_cache='int8'",
        )
    return min(found, limits.most_pages)


def longest_context(sizes: Sizes, limits: Limits, free_bytes: int) -> int:
    """The longest context up to that of `limits`, in whole pages below it, of which one sequence
    fits; a page's where none does.
    """

    def fits(pages: int) -> bool:
        some = replace(limits, max_context=pages * PAGE_TOKENS)
        needed = step_bytes(sizes, some) + (pages + 1) * _page_bytes(sizes, some)
        return needed <= free_bytes

    good, bad = 1, limits.max_pages + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return min(limits.max_context, good * PAGE_TOKENS)


def _page_bytes(sizes: Sizes, limits: Limits) -> int:
    """Of a page of all layers."""
    return page_bytes(sizes, limits.kv_cache) * sizes.layers

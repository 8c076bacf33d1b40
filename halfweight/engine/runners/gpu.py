"""Llama-like models on a GPU: our own kernels over pages, a step as few launches.

A step takes one of four ways (gpu_steps.py, gpu_read.py):

    decode   one token a sequence: a CUDA graph, recorded for each bucket of batch sizes
    verify   a few tokens of a few sequences (drafts to verify): a CUDA graph as well
    read     few prompts of up to a thousand tokens together: a CUDA graph for each bucket of them
    mixed    anything else: decoding sequences and chunks of prompts share the products, launched
             one by one

What changes from step to step is one int32 array (gpu_inputs.py), sent by one copy before the
launches; token ids come from the token table on the device. gpu_layers.py has what is between the
products, gpu_attention.py attention over the pages, gpu_memory.py how many of these there are.
Where products do not depend on the batch, attention does not either (gpu_invariant.py).
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfweight.engine.runners.gpu_attention import (
    PAGE_TOKENS,
    PagedAttention,
    Pool,
    Scratch,
    Shape,
)
from halfweight.engine.runners.gpu_inputs import Inputs, PageTables
from halfweight.engine.runners.gpu_invariant import (
    InvariantAttention,
    has_invariant_products,
    row_by_row,
)
from halfweight.engine.runners.gpu_layers import Layers
from halfweight.engine.runners.gpu_memory import (
    GIB,
    longest_context,
    pages_that_fit,
    sizes_of,
)
from halfweight.engine.runners.gpu_read import ReadStep, read_bucket, read_buckets
from halfweight.engine.runners.gpu_steps import FewTokens, MixedStep, Parts, Recordings
from halfweight.engine.runners.unfit import UnfitError
from halfweight.engine.step import KvCache, Step, wanting_all
from halfweight.kernels.triton.launch import device_info, launch
from halfweight.memory.engine_memory import (
    FEW_SEQUENCES,
    FEW_TOKENS,
    READ_TOKENS,
    STEP_TOKENS,
    Limits,
    bucket,
    recorded_rows,
)
from halfweight.model.llama_like import difference, layer_linears
from halfweight.model.share import can_be_recorded, free_on_all
from halfweight.model.stage import logits_width

log = logging.getLogger("halfweight")

UPDATE_BLOCK = 256
LEAST_HEAD_SIZE = 32
LEAST_CAPABILITY = (8, 0)
"""Before, Triton has no products of tiles on the tensor cores."""


class GpuRunner:
    """Runner (engine/step.py) of a Llama-like model whose linears are in INT8, on one GPU."""

    page_tokens = PAGE_TOKENS
    shares_prefixes = True
    most_drafts = FEW_TOKENS - 1

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_context: int | None = None,
        max_sequences: int = 256,
        max_step_tokens: int = STEP_TOKENS["gpu"],
        kv_cache: KvCache = "16bit",
        cache_tokens: int | None = None,
        shortens: bool = False,
    ) -> None:
        """`cache_tokens` of pages, by default what fits; `max_context` is by default the model's.

        With `shortens` it becomes less where one sequence of it does not fit.

        Raises UnfitError for a model that has no such step, DoesNotFitError where the pages of one
        sequence do not fit.
        """
        reason = unfit(model)
        if reason is not None:
            raise UnfitError(reason)
        self.device, self.kv_cache = model.device, kv_cache
        self.max_sequences, self.max_step_tokens = max_sequences, max_step_tokens
        self.vocab_size = logits_width(model)
        is_invariant, shape = has_invariant_products(model), Shape.of(model)
        layers = Layers(model, row_by_row) if is_invariant else Layers(model)
        self._can_be_recorded = can_be_recorded(model)
        limits = self._choose_pages(model, max_context, cache_tokens, shortens=shortens)
        pool = Pool(shape, model.config.num_hidden_layers, self.num_pages, kv_cache, self.device)
        self.cache_bytes = pool.nbytes
        self._page_tables = PageTables(max_sequences + 1, limits.max_pages, self.device)
        room = 0 if is_invariant else limits.scratch_pages
        scratch = Scratch.make(shape, room, self.device) if room else None
        table = self._page_tables.device_table
        form = InvariantAttention if is_invariant else PagedAttention
        attention = form(model, pool, table, self.max_context, scratch)
        rows = (max_sequences + 1, self.max_context + 1)
        self.table = torch.zeros(rows, dtype=torch.int32, device=self.device)
        self._parts = Parts(layers, attention, self.table, limits.max_pages, room)
        self._make_steps(shape.dtype)
        log.info("KV cache: %s", self._sizes(pool))

    @torch.inference_mode()
    def run(self, step: Step) -> Tensor:
        """Logits [sum of num_logits, V] in the model's dtype; see Runner.

        Of a stage the states of all tokens, by the way that the whole model takes for the step.
        """
        self._send_pages(step)
        own = wanting_all(step) if self._parts.layers.leaves else step
        most = max(chunk.num_tokens for chunk in step)
        if most == 1:
            return self._few(len(step), 1)(own)
        if most <= FEW_TOKENS and len(step) <= FEW_SEQUENCES:
            return self._few(len(step), FEW_TOKENS)(own)
        if ReadStep.takes(self._parts, step):
            logits = self._read(sum(chunk.num_tokens for chunk in step))(own)
            return logits[: sum(chunk.num_logits for chunk in own)]
        return self._mixed(own)

    @torch.inference_mode()
    def record(self, batch_sizes: list[int]) -> None:
        """Record the graphs of these batch sizes, and of prompts, now, not when first met."""
        for tokens, most in ((1, self.max_sequences), (FEW_TOKENS, FEW_SEQUENCES)):
            for batch in {bucket(b) for b in batch_sizes if b <= most}:
                for _ in range(2):
                    self._few(batch, tokens)([])
        if ReadStep.takes(self._parts, []):
            for tokens in read_buckets(self._most_read()):
                for _ in range(2):
                    self._read(tokens)([])

    def close(self) -> None:
        """Free pages, graphs and buffers; the runner is of no use after."""
        for name in ("_parts", "_page_tables", "_inputs", "_logits", "_recordings", "_steps"):
            self.__dict__.pop(name, None)
        for name in ("_reads", "_mixed"):
            self.__dict__.pop(name, None)
        self.table = self.table[:0]

    def _choose_pages(
        self,
        model: PreTrainedModel,
        max_context: int | None,
        cache_tokens: int | None,
        *,
        shortens: bool,
    ) -> Limits:
        """Set the context and the number of pages: as asked, else what the device has room for."""
        sizes, free = sizes_of(model), free_on_all(model)
        limits = Limits(
            int(max_context or model.config.max_position_embeddings),
            *(self.max_sequences, self.max_step_tokens, self.kv_cache),
            device_info(self.device).num_processors,
        )
        if shortens and cache_tokens is None and free is not None:
            limits = replace(limits, max_context=longest_context(sizes, limits, free))
        self.max_context = limits.max_context
        if cache_tokens is not None:
            self.num_pages = -(-cache_tokens // self.page_tokens) + 1
        elif free is None:
            self.num_pages = limits.most_pages
        else:
            self.num_pages = pages_that_fit(sizes, limits, free)
        return limits

    def _make_steps(self, dtype: torch.dtype) -> None:
        """Buffers that recorded steps share, and the mixed step."""
        largest = ((bucket(self.max_sequences), 1), (FEW_SEQUENCES, FEW_TOKENS))
        size = max(FewTokens.sections(self._parts, *sizes).total for sizes in largest)
        size = max(size, ReadStep.sections(self._parts, self._most_read()).total)
        self._inputs = Inputs(size, self.device)
        self._updates = Inputs(2 * self._page_tables.max_pages, self.device)
        rows = recorded_rows(self.max_sequences)
        if self._parts.layers.leaves:
            rows = max(rows, self._most_read())
        self._logits = torch.empty(rows, self.vocab_size, dtype=dtype, device=self.device)
        self._recordings = Recordings(self.device, is_on=self._can_be_recorded)
        self._steps: dict[tuple[int, int], FewTokens] = {}
        self._reads: dict[int, ReadStep] = {}
        self._mixed = MixedStep(self._parts)

    def _few(self, batch: int, tokens: int) -> FewTokens:
        key = (bucket(batch), tokens)
        if key not in self._steps:
            self._steps[key] = FewTokens(
                self._parts, *key, self._inputs, self._logits, self._recordings
            )
        return self._steps[key]

    def _most_read(self) -> int:
        """Tokens of the largest recorded step that reads prompts."""
        return read_bucket(min(READ_TOKENS, self.max_step_tokens))

    def _read(self, num_tokens: int) -> ReadStep:
        tokens = read_bucket(num_tokens)
        if tokens not in self._reads:
            shared = self._inputs, self._logits, self._recordings
            self._reads[tokens] = ReadStep(self._parts, tokens, *shared)
        return self._reads[tokens]

    def _send_pages(self, step: Step) -> None:
        """Tell the device's page tables what is new."""
        new = [pair for c in step for pair in self._page_tables.updates(c.slot, c.pages)]
        room = self._updates.size // 2
        for begin in range(0, len(new), room):
            part = np.array(new[begin : begin + room], np.int32)
            self._updates.host_array()[: part.size] = part.reshape(-1)
            sent = self._updates.send(part.size)
            operands = (sent, self._page_tables.device_table)
            grid = (-(-len(part) // UPDATE_BLOCK), 1)
            launch("write_page_table", grid, len(part), operands, BLOCK=UPDATE_BLOCK)

    def _sizes(self, pool: Pool) -> str:
        return (
            f"{self.num_pages} pages of {PAGE_TOKENS} tokens in {self.kv_cache}, "
            f"{pool.nbytes / GIB:.2f} GiB ({pool.nbytes / 1e9:.2f} GB); "
            f"{self.max_sequences} sequences, context {self.max_context}"
        )


def unfit(model: PreTrainedModel) -> str | None:
    """Why GpuRunner cannot run `model` where it is, or None."""
    if model.device.type == "cuda" and torch.version.hip is None:
        found = torch.cuda.get_device_capability(model.device)
        if found < LEAST_CAPABILITY:
            return f"needs compute capability 8.0, this GPU has {found[0]}.{found[1]}"
    reason = difference(model)
    if reason is not None:
        return reason
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "its weights lie on several devices"
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

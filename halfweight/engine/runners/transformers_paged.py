"""Any causal model of transformers over pages: its own forward, our attention.

The tokens of a step, of all sequences, are one row [1, T] with their positions; everything in a
model but attention treats tokens one by one, and attention is ours (`attention_interface.py`,
`paged_attention.py`). The forward is told of no cache: keys and values of each attention call go
into that call's own pool, so layers may differ in heads and widths, and a layer that is given an
earlier layer's keys reads that one's pool.

Whether that holds for a model is not looked up but tried: the constructor raises UnfitError
unless a few tokens of two sequences, in chunks beside each other, give the logits of the plain
forward of each (`probe.py`).

Steps in which every chunk is one token take fixed shapes on CUDA: sequences and pages rounded up to
powers of two, padding reads the table's last row and writes page 0. Such a step is recorded as a
graph once and replayed.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfweight.engine.runners.attention_interface import (
    PAGED,
    Call,
    configs_of,
    learn,
    using,
)
from halfweight.engine.runners.paged_attention import Manner, PagePool, Places, attend
from halfweight.engine.runners.probe import deviation, limit, texts
from halfweight.engine.runners.rotary import LengthClasses
from halfweight.engine.runners.row import (
    Layout,
    Part,
    Row,
    num_pages_of,
    pack,
    pack_decoding,
    to_device,
)
from halfweight.engine.runners.unfit import UnfitError
from halfweight.engine.step import Chunk, KvCache, Step, wanting_all
from halfweight.memory import engine_memory
from halfweight.memory.device_memory import out_of_memory
from halfweight.memory.engine_memory import power_of_two
from halfweight.model.experts import has_experts
from halfweight.model.share import can_be_recorded, free_in_memory, free_on_all
from halfweight.model.stage import leaves

log = logging.getLogger("halfweight")

PAGE_TOKENS = engine_memory.PAGE_TOKENS["transformers"]
STEP_TOKENS = engine_memory.STEP_TOKENS["transformers"]
"""Most tokens of a step: bounds the memory of activations."""
CPU_CACHE_TOKENS = 16384
"""Tokens of cache on a CPU, or one text if that is longer, where memory allows."""
CACHE_SHARE, CPU_CACHE_SHARE = 0.8, 0.5
"""Part of a GPU's free memory that becomes pages, and the most of a CPU's."""


class TransformersRunner:
    """A Runner (`engine/step.py`) by transformers' own forward, for models that page."""

    page_tokens = PAGE_TOKENS
    max_step_tokens = STEP_TOKENS
    most_drafts = 8
    """Tokens that are not taken are written over."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_sequences: int,
        max_context: int,
        cache_tokens: int | None = None,
        kv_cache: KvCache = "16bit",
        fixed_shapes: bool | None = None,
    ) -> None:
        """Raises UnfitError, with the reason, where logits would not be the model's own.

        `cache_tokens` in pages by default fill the device, or hold all sequences if that is less.
        `fixed_shapes` says whether decoding pads to buckets; by default on CUDA.
        """
        self.device = model.device
        self.max_sequences, self.max_context = max_sequences, max_context
        self._model, self._configs = model, configs_of(model)
        self._leaves = leaves(model)
        self._arguments = inspect.signature(type(model).forward).parameters
        self._classes = LengthClasses(model, max_context)
        self.shares_prefixes = not self._classes.boundaries
        rows = max_sequences + 1
        self.table = torch.zeros(rows, max_context + 1, dtype=torch.int32, device=self.device)
        self._calls = self._learn()
        self._make_pools(cache_tokens, int8=kv_cache == "int8")
        on_cuda = self.device.type == "cuda"
        self._fixed_shapes = on_cuda if fixed_shapes is None else fixed_shapes
        records = on_cuda and can_be_recorded(model) and not has_experts(model)
        self._recorder = _Recorder(is_on=records)
        self._buckets: dict[Layout, _Bucket] = {}
        self._check(kv_cache)

    def run(self, step: Step) -> Tensor:
        """Logits [sum of num_logits, V] of the chunks, in their order."""
        step = wanting_all(step) if self._leaves else step
        with torch.inference_mode():
            for chunk in step:
                self._read_again(chunk)
            ends = [chunk.start + chunk.num_tokens for chunk in step]
            classes = map(self._classes.class_of, ends)
            return self._run([Part(*both) for both in zip(step, classes, strict=True)])

    def close(self) -> None:
        """Free pages and graphs."""
        self.pools.clear()
        self._buckets.clear()

    def _read_again(self, chunk: Chunk) -> None:
        """Where a sequence passes into another length class, bring all before the chunk there."""
        new = self._classes.class_of(chunk.start + chunk.num_tokens)
        if chunk.start == 0 or self._classes.class_of(chunk.start) == new:
            return
        for start in range(0, chunk.start, STEP_TOKENS):
            num = min(STEP_TOKENS, chunk.start - start)
            self._run([Part(Chunk(chunk.slot, start, num, 0, chunk.pages), new)])

    def _run(self, parts: Sequence[Part]) -> Tensor:
        if self._fixed_shapes and parts[-1].chunk.num_tokens == 1:
            return self._decode(parts)
        numbers, layout = pack(parts, PAGE_TOKENS)
        logits = self._forward(layout.cut(to_device(numbers, self.device)))
        return logits[: sum(part.chunk.num_logits for part in parts)]

    def _decode(self, parts: Sequence[Part]) -> Tensor:
        """A step of single tokens in the shapes of its bucket."""
        shape = (power_of_two(len(parts)), power_of_two(num_pages_of(parts, PAGE_TOKENS)))
        numbers, layout = pack_decoding(parts, PAGE_TOKENS, shape, self.max_sequences)
        if layout not in self._buckets:
            self._buckets[layout] = _Bucket(self._forward, layout, self._recorder)
        new = to_device(numbers, self.device)
        logits = self._buckets[layout].run(new)[: len(parts)]
        wanted = [i for i, part in enumerate(parts) if part.chunk.num_logits]
        return logits if len(wanted) == len(parts) else logits[wanted]

    def _forward(self, row: Row) -> Tensor:
        """Logits [R, V] of the tokens of a row that `logits_rows` names."""
        asked: dict[str, Any] = {"input_ids": self.table[row.slots, row.positions].long()[None]}
        if "position_ids" in self._arguments:
            asked["position_ids"] = row.positions[None]
        keeps = "logits_to_keep" in self._arguments
        if keeps:
            asked["logits_to_keep"] = row.logits_rows
        attention = _RowAttention(self._calls, self.pools, row.places)
        with using(self._configs, PAGED, attention), self._classes.of_tokens(row.classes):
            logits: Tensor = self._model(**asked, use_cache=False).logits[0]
        return logits if keeps else logits[row.logits_rows]

    def _learn(self) -> list[Call]:
        ids = texts(self._model)[0][:7]
        asked = {"input_ids": ids[None], "use_cache": False}
        if "position_ids" in self._arguments:
            asked["position_ids"] = torch.arange(len(ids), device=self.device)[None]

        def forward() -> Tensor:
            logits: Tensor = self._model(**asked).logits
            return logits

        with torch.inference_mode():
            calls, logits = learn(self._model, forward, len(ids), self.max_context)
        self.vocab_size = logits.shape[-1]
        return calls

    def _make_pools(self, cache_tokens: int | None, *, int8: bool) -> None:
        size = sum(call.num_bytes(int8=int8) for call in self._calls if call.source is None)
        if cache_tokens is None:
            room = self._room(size)
            cache_tokens = min(room, self.max_sequences * self.max_context)
        self.num_pages = 1 + max(2, -(-cache_tokens // PAGE_TOKENS))
        self.pools: list[PagePool] = []
        """One for each attention call; a call with an earlier one's keys has its pool."""
        with out_of_memory(self.device, "the KV cache", hint="use a smaller --cache-tokens"):
            for call in self._calls:
                old = call.source
                self.pools.append(self._pool(call, int8) if old is None else self.pools[old])
        tensors = {id(t): t for pool in self.pools for t in pool.tensors}
        self.cache_bytes = sum(tensor.nbytes for tensor in tensors.values())

    def _room(self, token_bytes: int) -> int:
        """Tokens of cache that the device has room for."""
        free = free_on_all(self._model)
        if free is not None:
            return int(free * CACHE_SHARE) // token_bytes
        wanted = max(CPU_CACHE_TOKENS, self.max_context)
        return min(wanted, int(free_in_memory(self._model) * CPU_CACHE_SHARE) // token_bytes)

    def _pool(self, call: Call, int8: bool) -> PagePool:
        shape = (self.num_pages, PAGE_TOKENS, call.num_heads)
        return PagePool(shape, call.widths, call.dtype, self.device, int8=int8)

    def _check(self, kv_cache: KvCache) -> None:
        bound = limit(self._model.dtype, kv_cache)
        found = deviation(self, self._model, bound)
        if not found <= bound:
            raise UnfitError(f"over pages its logits are off by {found:.2g} of their spread")


class _RowAttention:
    """Answers the attention calls of one forward, in their order."""

    def __init__(self, calls: Sequence[Call], pools: Sequence[PagePool], places: Places) -> None:
        self._calls = iter(zip(calls, pools, strict=True))
        self._places = places

    def __call__(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        call, pool = next(self._calls)
        if call.source is None:
            pool.write(self._places.writes, k[0].transpose(0, 1), v[0].transpose(0, 1))
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        manner = Manner(scale, softcap, s_aux)
        return attend(q[0].transpose(0, 1), pool, self._places, call.span, manner)[None]


class _Recorder:
    """Records steps as CUDA graphs, in one pool of memory; stops for good where one cannot be."""

    def __init__(self, *, is_on: bool) -> None:
        self.is_on = is_on
        self._pool: Any = None

    def record(self, call: Callable[[], Tensor]) -> tuple[Any, Tensor] | None:
        """The graph of a call and the tensor that replays write; None if it cannot be recorded."""
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                result = call()
        except RuntimeError as error:
            self.is_on = False
            log.info("decoding is not recorded as CUDA graphs: %s", str(error).partition("\n")[0])
            return None
        return graph, result


class _Bucket:
    """A step of fixed shapes: run once as it is, on CUDA then recorded and replayed."""

    def __init__(
        self, forward: Callable[[Row], Tensor], layout: Layout, recorder: _Recorder
    ) -> None:
        self._forward, self._layout, self._recorder = forward, layout, recorder
        self._numbers: Tensor | None = None
        self._recorded: tuple[Any, Tensor] | None = None

    @property
    def is_recorded(self) -> bool:
        """Whether steps are replayed."""
        return self._recorded is not None

    def run(self, numbers: Tensor) -> Tensor:
        """Logits of the step with these numbers on the device; overwritten by the next."""
        if self._numbers is None or not self._recorder.is_on:
            self._numbers = numbers
            return self._forward(self._layout.cut(numbers))
        self._numbers.copy_(numbers)
        if self._recorded is None:
            row = self._layout.cut(self._numbers)
            self._recorded = self._recorder.record(lambda: self._forward(row))
            if self._recorded is None:
                return self._forward(row)
        graph, logits = self._recorded
        graph.replay()
        return logits

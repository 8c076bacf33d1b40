"""A step of some tokens of a Llama-like model on the CPU, by one kernel call.

Holds what the kernel of batch_step.py is told once (weights, norms, pages) and tells it
at each call which tokens of which sequences run.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfweight.engine.step import Chunk
from halfweight.kernels.cpu import attention_products as products
from halfweight.kernels.cpu import batch_cells as names
from halfweight.kernels.cpu import batch_loops as loops
from halfweight.kernels.cpu.backend import FORMATS, exact_parts, has_matrix_unit, linear_cells
from halfweight.kernels.cpu.batch_step import (
    all_turned_bytes,
    prepare_one,
    run_batch_step,
    work_bytes,
)
from halfweight.kernels.cpu.decode_products import PARTS, PRODUCT
from halfweight.kernels.cpu.threads import Arguments, CFunction, Kernel, num_threads
from halfweight.memory.engine_memory import STEP_TOKENS
from halfweight.model.llama_like import layer_linears
from halfweight.model.modules import QuantizedWeight
from halfweight.model.stage import enters, leaves

MIN_CALL_TOKENS, MAX_CALL_TOKENS = 32, STEP_TOKENS["cpu"]
"""Tokens of one call, at most: the larger number where a core's cache holds them."""
CACHE_BYTES = 1 << 20
"""Half of a usual L2 cache."""

_by_floats, _prepare = CFunction(loops.batch_float), CFunction(prepare_one)
_by_digits = {2: CFunction(loops.batch_digits_2), 3: CFunction(loops.batch_digits_3)}
_by_matrix = {2: CFunction(loops.batch_matrix_2), 3: CFunction(loops.batch_matrix_3)}
_attention = {
    dtype: (CFunction(score), CFunction(add))
    for dtype, score, add in (
        (torch.float32, products.score_float32, products.sum_float32),
        (torch.bfloat16, products.score_bfloat16, products.sum_bfloat16),
        (torch.float16, products.score_float16, products.sum_float16),
        (torch.int8, products.score_int8, products.sum_int8),
    )
}
_kernel = Kernel(run_batch_step)


class Pages:
    """The KV cache of every layer, in the model's dtype or in INT8.

    Keys [num_pages, kv_heads, head_size, page_tokens], values [.., page_tokens, head_size]; in INT8
    [num_pages, kv_heads, (head_size + 4) page_tokens] bytes, the last of them float32 scales.
    """

    def __init__(
        self, model: PreTrainedModel, num_pages: int, page_tokens: int, int8: bool
    ) -> None:
        """Memory that the system hands out when it is first written."""
        self.page_tokens, self.dtype = page_tokens, torch.int8 if int8 else model.dtype
        size, heads = model.model.layers[0].self_attn.head_dim, model.config.num_key_value_heads
        keys: tuple[int, ...] = (size, page_tokens)
        values: tuple[int, ...] = (page_tokens, size)
        if int8:
            keys = values = ((size + 4) * page_tokens,)
        layers = range(model.config.num_hidden_layers)
        self.keys = [torch.empty(num_pages, heads, *keys, dtype=self.dtype) for _ in layers]
        self.values = [torch.empty(num_pages, heads, *values, dtype=self.dtype) for _ in layers]

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


def token_bytes(model: PreTrainedModel, int8: bool) -> int:
    """Bytes of a token's keys and values in all layers."""
    size, config = model.model.layers[0].self_attn.head_dim, model.config
    width = size + 4 if int8 else size * model.dtype.itemsize
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * width)


class Rotary:
    """cos and sin float32 [T, head_size] of positions, the model's own; they grow when needed."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._embedding = model.model.rotary_emb
        self.cos = self.sin = torch.empty(0)

    def reach(self, length: int) -> None:
        """Have positions 0 .. length - 1."""
        if length > len(self.cos):
            positions = torch.arange(max(length, 2 * len(self.cos), 256))[None]
            cos, sin = self._embedding(torch.empty(1), positions)
            self.cos, self.sin = cos[0].float().contiguous(), sin[0].float().contiguous()


class BatchStep:
    """Chunks of several sequences, at most `max_tokens` together, through all layers."""

    def __init__(self, model: PreTrainedModel, pages: Pages, max_context: int) -> None:
        """Takes addresses of the model's tensors and the pages; keeps both alive."""
        self._kept: list[Any] = [model, pages]
        self._page_tokens = pages.page_tokens
        self._vocab_size = model.get_output_embeddings().out_features
        self._parts = exact_parts(model.dtype)
        self._enters, self.leaves = enters(model), leaves(model)
        """Where states enter, and whether they leave: of a stage (model/stage.py)."""
        self._arguments = Arguments(*[0] * names.STEP_CELLS)
        self.rotary = Rotary(model)
        self._work = torch.empty(0, dtype=torch.uint8)
        self._describe(model, pages)
        self._allocate(-(-max_context // pages.page_tokens))

    def __call__(self, chunks: Sequence[Chunk], ids: np.ndarray[Any, Any], logits: Tensor) -> None:
        """Write the chunks' tokens to their pages and logits float32 [L, V].

        `ids` int64 [M] are the new tokens of all chunks in order; L is the sum of their num_logits.
        A stage (model/stage.py) takes up states where they enter, and gives them as logits.
        """
        cells = self._arguments.cells
        count, longest = self._place(chunks)
        self._ids[:count] = ids
        self.rotary.reach(longest)
        cells[names.COS], cells[names.SIN] = self.rotary.cos.data_ptr(), self.rotary.sin.data_ptr()
        cells[names.NUM_TOKENS], cells[names.NUM_SEQUENCES] = count, len(chunks)
        cells[names.NUM_LOGITS], cells[names.LOGITS] = len(logits), logits.data_ptr()
        self._counters.fill(0)
        if self._enters is not None:
            self._hidden[:count] = self._enters.table[torch.from_numpy(ids)]
            self._counters[[names.EMBEDDING_TICKET, names.EMBEDDING_DONE]] = count
        if self.leaves:
            cells[names.NUM_LOGITS] = 0
        threads = num_threads()
        if len(self._work) < threads * cells[names.WORK_BYTES]:
            self._work = torch.empty(threads * cells[names.WORK_BYTES], dtype=torch.uint8)
            cells[names.WORK] = self._work.data_ptr()
        cells[names.THREADS] = threads
        _kernel.run(self._arguments, threads)
        if self.leaves:
            logits.copy_(self._hidden[torch.from_numpy(self._wanted[: len(logits)])])

    def _place(self, chunks: Sequence[Chunk]) -> tuple[int, int]:
        """Fill in positions, page tables and wanted logits; tokens, and the longest sequence."""
        token = wanted = longest = 0
        for i, chunk in enumerate(chunks):
            end, after = chunk.start + chunk.num_tokens, token + chunk.num_tokens
            used = -(-end // self._page_tokens)
            self._tables[i, :used] = chunk.pages[:used]
            self._sequences[i, names.FIRST], self._sequences[i, names.COUNT] = (
                token,
                chunk.num_tokens,
            )
            self._positions[token:after] = range(chunk.start, end)
            self._wanted[wanted : wanted + chunk.num_logits] = range(
                after - chunk.num_logits, after
            )
            token, wanted, longest = after, wanted + chunk.num_logits, max(longest, end)
        return token, longest

    def _allocate(self, max_pages: int) -> None:
        """The arrays that a call fills in."""
        num_layers = self._arguments.cells[names.NUM_LAYERS]
        self._counters = self._array(
            names.COUNTERS, names.COUNTERS_A_STEP + names.COUNTERS_A_LAYER * num_layers
        )
        self._ids = self._array(names.IDS, self.max_tokens)
        self._positions = self._array(names.POSITIONS, self.max_tokens)
        self._wanted = self._array(names.LOGIT_TOKENS, self.max_tokens)
        self._tables = np.zeros((self.max_tokens, max_pages), np.int64)
        self._sequences = self._array(names.SEQUENCES, self.max_tokens, names.SEQUENCE_CELLS)
        rows = self._tables.ctypes.data + 8 * max_pages * np.arange(self.max_tokens)
        self._sequences[:, names.TABLE] = rows

    def _array(self, cell: int, *shape: int) -> np.ndarray[Any, Any]:
        """Zeros int64, their address in a cell."""
        array = np.zeros(shape, np.int64)
        self._arguments.cells[cell] = array.ctypes.data
        return array

    def _describe(self, model: PreTrainedModel, pages: Pages) -> None:
        """The cells that stay as they are."""
        config, body, digits = model.config, model.model, self._parts
        attention = body.layers[0].self_attn
        triples = zip(body.layers, pages.keys, pages.values, strict=True)
        layers = torch.tensor([self._layer(*triple) for triple in triples])
        attended, inner = attention.o_proj.in_features, config.intermediate_size
        widest = max(config.hidden_size, inner, attended)
        qkv = sum(getattr(attention, f"{name}_proj").out_features for name in "qkv")
        size, page_tokens = attention.head_dim, pages.page_tokens
        self.max_tokens = MAX_CALL_TOKENS
        if all_turned_bytes(widest, digits, self.max_tokens) > CACHE_BYTES:
            self.max_tokens = MIN_CALL_TOKENS
        self._hidden = torch.empty(self.max_tokens, config.hidden_size)
        sizes = work_bytes(widest, digits, size, page_tokens, self.max_tokens)
        score, add = _attention[pages.dtype]
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        values = {
            names.NUM_LAYERS: len(layers),
            names.LAYERS: self._address(layers),
            names.HEADS: config.num_attention_heads,
            names.KV_HEADS: config.num_key_value_heads,
            names.HEAD_SIZE: size,
            names.PAGE_TOKENS: page_tokens,
            names.CACHE_FORMAT: FORMATS.get(pages.dtype, names.INT8),
            names.SCORE: score.address,
            names.SUM_VALUES: add.address,
            names.DIGITS: digits,
            names.EPSILON: _bits(body.norm.variance_epsilon),
            names.SCALING: _bits(attention.scaling),
            names.HIDDEN: self._address(self._hidden),
            names.QKV: self._floats(qkv),
            names.ATTENDED: self._floats(attended),
            names.ACTIVATED: self._floats(inner),
            names.EMBEDDING: 0 if self._enters else self._linear_address(table),
            names.FINAL_NORM: self._norm(body.norm),
            names.HEAD: 0 if self.leaves else self._linear_address(head),
            names.WIDEST: widest,
            names.PREPARED: self._address(torch.zeros(sizes.prepared, dtype=torch.uint8)),
            names.WORK_BYTES: sizes.own,
            names.TURNED: sizes.turned_at,
            names.MATRIX: _by_matrix[digits].address if digits and has_matrix_unit() else 0,
            names.PREPARE: _prepare.address,
        }
        for cell, value in values.items():
            self._arguments.cells[cell] = value

    def _layer(self, layer: Any, keys: Tensor, values: Tensor) -> list[int]:
        """The cells of a layer."""
        attention = layer.self_attn
        return [
            *(value for linear in layer_linears(layer) for value in self._linear(linear)),
            self._norm(layer.input_layernorm),
            self._norm(getattr(attention, "q_norm", None)),
            self._norm(getattr(attention, "k_norm", None)),
            self._norm(layer.post_attention_layernorm),
            keys.data_ptr(),
            values.data_ptr(),
        ]

    def _linear(self, module: QuantizedWeight) -> list[int]:
        bias = getattr(module, "bias", None)
        if bias is not None:
            bias = bias.detach().float().contiguous()
            self._kept.append(bias)
        stored = (module.weight_packed, module.weight_scale, module.weight_exponent)
        cells = list(linear_cells(*stored, bias, self._parts))
        product = _by_digits[self._parts] if cells[PARTS] else _by_floats
        cells[PRODUCT] = product.address
        return cells

    def _linear_address(self, module: QuantizedWeight) -> int:
        return self._address(torch.tensor(self._linear(module)))

    def _norm(self, module: nn.Module | None) -> int:
        """Address of a norm's weight in float32; 0 for none."""
        if module is None:
            return 0
        weight: Any = module.weight
        return self._address(weight.detach().float().contiguous())

    def _floats(self, width: int) -> int:
        return self._address(torch.empty(self.max_tokens, width))

    def _address(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()


def _bits(value: float) -> int:
    """A float32 as the low half of a cell."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])

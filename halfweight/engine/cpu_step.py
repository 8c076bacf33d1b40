"""Decode on the CPU without the interpreter: one kernel call a token (decode_step.py).

Models whose layers are Llama's (RMS norms, rotary heads, a gated SiLU between three linears) take
it at batch 1, where every linear is in INT8; for all others `step_for` says why not, and they run
through transformers' own forward. Which it is, is chosen once, when a sequence starts.
"""

from __future__ import annotations

import logging
import struct
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache

from halfweight.kernels.cpu.threads import Arguments, Kernel, num_threads
from halfweight.model.llama_like import difference, layer_linears
from halfweight.model.modules import QuantizedEmbedding, QuantizedLinear, QuantizedWeight

log = logging.getLogger("halfweight")


def unsupported(model: PreTrainedModel) -> str | None:
    """Why `model` cannot decode by one kernel, or None."""
    reason = difference(model)
    if reason is not None:
        return reason
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, QuantizedEmbedding) or embedding.embed_scale is not None:
        return "its embedding is not in INT8"
    linears = [linear for layer in model.model.layers for linear in layer_linears(layer)]
    for linear in (*linears, model.get_output_embeddings()):
        if not isinstance(linear, QuantizedLinear) or linear.backend_name != "cpu":
            return "not every linear is in INT8 on the backend 'cpu'"
    return None


class CpuStep:
    """The decode step of one sequence: `step(token, position)` -> logits float32 [1, V].

    Reads and extends `cache`, which a prefill through the model has filled up to `position`.
    """

    def __init__(self, model: PreTrainedModel, cache: StaticCache) -> None:
        """Takes addresses of the model's and the cache's tensors; keeps both alive."""
        from halfweight.kernels.cpu import decode_step

        self._cells = decode_step
        self._kernel = _kernel()
        self._kept: list[Any] = [model, cache]
        self._arguments = Arguments(*[0] * decode_step.STEP_CELLS)
        self.logits = torch.empty(1, model.get_output_embeddings().out_features)
        self._describe(model, cache)

    def __call__(self, token: int, position: int) -> Tensor:
        """Logits of the next token; the tensor is overwritten by the next call."""
        cells, names = self._arguments.cells, self._cells
        self._counters.zero_()
        cells[names.TOKEN], cells[names.POSITION] = token, position
        threads = num_threads()
        work = torch.empty(threads * cells[names.WORK_BYTES], dtype=torch.uint8)
        cells[names.WORK], cells[names.THREADS] = work.data_ptr(), threads
        self._kernel.run(self._arguments, threads)
        return self.logits

    def _describe(self, model: PreTrainedModel, cache: StaticCache) -> None:
        from halfweight.kernels.cpu.backend import exact_parts, max_record_bytes

        names, config, body = self._cells, model.config, model.model
        self._parts = exact_parts(model.dtype)
        keys = cache.layers[0].keys
        kv_heads, max_length, head_size = keys.shape[1:]
        pairs = zip(body.layers, cache.layers, strict=True)
        layers = torch.tensor([self._layer(*pair) for pair in pairs])
        num_counters = names.COUNTERS_A_STEP + names.COUNTERS_A_LAYER * len(layers)
        self._counters = torch.zeros(num_counters, dtype=torch.int64)
        cos, sin = body.rotary_emb(torch.empty(1), torch.arange(max_length)[None])
        widest = max(
            config.hidden_size,
            config.intermediate_size,
            body.layers[0].self_attn.o_proj.in_features,
        )
        record = max_record_bytes(widest, self._parts)
        work = [torch.empty(widest) for _ in range(3)]
        qkv = torch.empty((config.num_attention_heads + 2 * kv_heads) * head_size)
        values = {
            names.COUNTERS: self._address(self._counters),
            names.NUM_LAYERS: len(layers),
            names.LAYERS: self._address(layers),
            names.HEADS: config.num_attention_heads,
            names.KV_HEADS: kv_heads,
            names.HEAD_SIZE: head_size,
            names.MAX_LENGTH: max_length,
            names.CACHE_FORMAT: _formats()[keys.dtype],
            names.EPSILON: _bits(body.norm.variance_epsilon),
            names.SCALING: _bits(body.layers[0].self_attn.scaling),
            names.COS: self._address(cos.float().contiguous()),
            names.SIN: self._address(sin.float().contiguous()),
            names.HIDDEN: self._address(work[0]),
            names.QKV: self._address(qkv),
            names.ATTENDED: self._address(work[1]),
            names.ACTIVATED: self._address(work[2]),
            names.LOGITS: self._address(self.logits),
            names.EMBEDDING: self._linear_address(model.get_input_embeddings()),
            names.FINAL_NORM: self._norm(body.norm),
            names.HEAD: self._linear_address(model.get_output_embeddings()),
            names.WIDEST: widest,
            names.RECORD: record,
            names.WORK_BYTES: names.work_bytes(widest, record, head_size, max_length),
        }
        for cell, value in values.items():
            self._arguments.cells[cell] = value

    def _layer(self, layer: Any, cached: Any) -> list[int]:
        """The cells of a layer."""
        attention = layer.self_attn
        return [
            *(value for linear in layer_linears(layer) for value in self._linear(linear)),
            self._norm(layer.input_layernorm),
            self._norm(getattr(attention, "q_norm", None)),
            self._norm(getattr(attention, "k_norm", None)),
            self._norm(layer.post_attention_layernorm),
            self._address(cached.keys),
            self._address(cached.values),
        ]

    def _linear(self, module: QuantizedWeight) -> tuple[int, ...]:
        from halfweight.kernels.cpu.backend import linear_cells

        bias = getattr(module, "bias", None)
        if bias is not None:
            bias = bias.detach().float().contiguous()
            self._kept.append(bias)
        stored = (module.weight_packed, module.weight_scale, module.weight_exponent)
        return linear_cells(*stored, bias, self._parts)

    def _linear_address(self, module: QuantizedWeight) -> int:
        return self._address(torch.tensor(self._linear(module)))

    def _norm(self, module: nn.Module | None) -> int:
        """Address of a norm's weight in float32; 0 for none."""
        if module is None:
            return 0
        weight: Any = module.weight
        return self._address(weight.detach().float().contiguous())

    def _address(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()


def step_for(model: PreTrainedModel, cache: Any, batch_size: int) -> CpuStep | None:
    """The fast step for a filled cache, or None where the model, cache or batch has none."""
    if batch_size != 1 or type(cache) is not StaticCache:
        return None
    reason = unsupported(model)
    if reason is not None:
        log.info("decode through transformers' forward: %s", reason)
        return None
    return CpuStep(model, cache)


_step_kernel: Kernel | None = None


def _kernel() -> Kernel:
    global _step_kernel
    if _step_kernel is None:
        from halfweight.kernels.cpu.decode_step import run_step

        _step_kernel = Kernel(run_step)
    return _step_kernel


def _formats() -> dict[torch.dtype, int]:
    from halfweight.kernels.cpu.backend import FORMATS

    return FORMATS


def _bits(value: float) -> int:
    """A float32 as the low half of a cell."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])

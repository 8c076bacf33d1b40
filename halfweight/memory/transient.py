"""What comes and goes while a model runs, beside weights and cache: counted op by op. No torch.

Prompts go through the model CHUNK_TOKENS at a time (all sequences together), by SDPA with a mask.
What prefill holds at its worst moment is either inside attention (mask in two forms, keys and
values repeated for grouped heads), inside the MLP (three of its widths) or inside a norm. Where our
own kernels read the prompt of a sequence alone, attention has neither mask nor repetitions.

A decode step is recorded as a CUDA graph, whose memory stays. Before recording, torch gives all
that prefill left back to the driver, so the two never exist together: the peak holds the larger.
Only what both use is there throughout: the decoder's own tensors, and the workspaces of products,
of which a graph has its own as well because it is recorded on a stream of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from halfweight.memory.architecture import Architecture
from halfweight.memory.workload import Weights, Workload

CHUNK_TOKENS = 2048
"""As in decoder.py; a test keeps them equal. Also what vLLM schedules at once by default."""
CUBLAS_WORKSPACE_BYTES = 32 << 20
"""Of each stream, as torch sets it on Hopper; on other GPUs about 8 MiB."""
MULTIPROCESSORS = 132
"""Of an H100, by which work is shared out; other cards have 20 to 170."""
PARTIAL_SUMS = 128 * 256
"""Float32 sums that each multiprocessor may leave for another: the Hopper backend's, by a test.
Elsewhere a block of weights in 16 bits takes their place, of 32 MiB."""
SPLIT_TOKENS, PROGRAMS_A_PROCESSOR = 64, 4
"""As in gpu_step.py; a test keeps them equal."""
TOKEN_BYTES = 4 * 8
"""Of each token of a prompt: id, position, mask, and the decoder's mask of all it will hold."""


@dataclass(frozen=True)
class Moments:
    """Bytes alive at the three moments of a forward pass that may be its worst, beside weights and
    cache. `mask` lives throughout and is in all of them; `inside_attention` is the part of
    `attention` that the attention kernel makes for itself: the mask once more, in 16 bits.
    """

    mask: int
    mlp: int
    norm: int
    attention: int
    inside_attention: int

    @property
    def peak(self) -> int:
        """The worst of the three."""
        return max(self.mlp, self.norm, self.attention)


def prefill_bytes(a: Architecture, workload: Workload, own_step: bool = False) -> int:
    """The most that reading the prompts holds, their tokens included; vLLM's are its own affair.

    `own_step` is whether gpu_step.py takes the model: it reads the prompt of a sequence alone.
    """
    tokens = workload.batch * workload.context
    held = 0 if workload.runtime == "vllm" else TOKEN_BYTES * tokens
    if own_step and workload.batch == 1 and workload.kv_dtype == "16bit":
        return held + own_prefill_bytes(a, workload)
    return held + prefill_moments(a, workload).peak


def own_prefill_bytes(a: Architecture, workload: Workload) -> int:
    """The most tensors alive in GpuStep.prefill: in the MLP or in attention, where there is no mask
    and nothing is repeated; and the tables of the step.
    """
    tokens, queries = min(workload.context, CHUNK_TOKENS), a.heads * a.head_dim
    mlp = 3 * a.hidden + 3 * a.intermediate
    attention = 3 * a.hidden + 3 * queries + 2 * a.kv_heads * a.head_dim
    return 2 * tokens * max(mlp, attention) + step_tables_bytes(a, workload)


def step_tables_bytes(a: Architecture, workload: Workload) -> int:
    """Cosines and sines of a GpuStep, float32, half a head each."""
    return 4 * workload.context * a.head_dim


def prefill_moments(a: Architecture, workload: Workload) -> Moments:
    """Inside the prefill of one chunk of prompts."""
    chunk = max(1, CHUNK_TOKENS // workload.batch)
    return forward_moments(a, min(workload.context, chunk), workload)


def forward_moments(a: Architecture, length: int, workload: Workload) -> Moments:
    """Of a forward pass over `length` new tokens of each sequence.

    Counted in transformers' forward pass. In the MLP: four hidden states and three widths (four
    where one product makes gate and up, and those and a hidden state for each expert of a token).
    In a norm: three hidden states, and as many in 32 bits. In attention: three hidden states,
    queries, output, new keys and values (twice where one product makes them), and for more than
    one token a sequence keys and values repeated to all heads (by transformers 5.17 for one token
    too; prefill, which takes no less, is then the peak). One mask for each kind of layer;
    vLLM's attention reads its cache as it lies and has none.
    """
    ranks, batch = workload.ranks, workload.batch
    heads, kv_heads = -(-a.heads // ranks), -(-a.kv_heads // ranks)
    tokens, width = batch * length, -(-a.intermediate // ranks)
    numbers = 3 * a.hidden + 2 * (heads + kv_heads) * a.head_dim
    numbers += (heads + 2 * kv_heads) * a.head_dim if a.fused_attention else 0
    attention, masks = 2 * tokens * numbers, [0]
    if workload.runtime != "vllm":
        reaches = _reaches(a, length, workload.context)
        masks = [tokens * reach for reach in reaches]
        layer = 4 * batch * max(reaches) * a.head_dim
        attention += layer * heads if heads > kv_heads and length > 1 else 0
        attention += layer * kv_heads if workload.kv_dtype == "int8" else 0
    mask = sum(masks)
    return Moments(
        mask=mask,
        mlp=mask + 2 * tokens * _mlp_numbers(a, width),
        norm=mask + tokens * (3 * 2 + 3 * 4) * a.hidden,
        attention=mask + attention + 2 * max(masks),
        inside_attention=2 * max(masks),
    )


def _reaches(a: Architecture, length: int, context: int) -> list[int]:
    """Tokens that attention sees, for each kind of layer: a window and the new tokens, or all."""
    windows = {layer.window for layer in a.cache_layers if layer.numbers} or {None}
    return [context if w is None else min(context, w + length) for w in windows]


def _mlp_numbers(a: Architecture, width: int) -> int:
    if a.experts_per_token:
        return 4 * a.hidden + a.experts_per_token * (4 * width + a.hidden)
    return 4 * a.hidden + (4 if a.fused_mlp else 3) * width


def logits_bytes(a: Architecture, batch: int) -> int:
    """Of one token a sequence, in 16 and in 32 bits."""
    return 6 * batch * a.vocabulary


def workspace_bytes(workload: Workload, weights: Weights) -> int:
    """What products of one stream keep: cuBLAS always, our kernels for INT8."""
    ours = weights == "int8" and workload.runtime == "halfweight"
    return CUBLAS_WORKSPACE_BYTES + (_partial_sums_bytes() if ours else 0)


def _partial_sums_bytes() -> int:
    return 4 * MULTIPROCESSORS * PARTIAL_SUMS


def decode_bytes(a: Architecture, workload: Workload, weights: Weights, own_step: bool) -> int:
    """What a decode step and its graph hold: `own_step` by gpu_step.py, else by transformers."""
    if not own_step:
        forward = forward_moments(a, 1, workload).peak + logits_bytes(a, workload.batch)
        return forward + workspace_bytes(workload, weights)
    tables = step_tables_bytes(a, workload)
    return tables + _partial_sums_bytes() + step_bytes(a, workload)


def step_bytes(a: Architecture, workload: Workload) -> int:
    """The most tensors alive in one GpuStep of gpu_step.py: in attention or after the head.

    Attention reads the cache as it lies, so an INT8 cache is never dequantized. The MLP's moment is
    below the head's in any model whose vocabulary is no smaller than its MLP is wide.
    """
    batch, heads = workload.batch, a.heads
    queries = heads * a.head_dim
    qkv = queries + 2 * a.kv_heads * a.head_dim
    programs = batch * a.kv_heads
    wanted = PROGRAMS_A_PROCESSOR * MULTIPROCESSORS // programs
    splits = max(1, min(wanted, -(-workload.context // SPLIT_TOKENS)))
    partials = 4 * batch * heads * splits * (a.head_dim + 2)
    attention = 2 * batch * (3 * a.hidden + qkv + queries) + partials
    head = 2 * batch * 3 * a.hidden + logits_bytes(a, batch)
    return max(attention, head)

"""What comes and goes in transformers' forward pass, beside weights and cache: op by op. No torch.

Where the engine runs a model by transformers' forward, a step is one row of tokens and attention is
the engine's own, over pages: what it holds at its worst moment is inside the MLP (three of its
widths), a norm, or attention. Other engines read prompts CHUNK_TOKENS at a time; transformers'
tensor parallelism by SDPA, with a mask in two forms and keys and values repeated for grouped heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from halfweight.memory.architecture import Architecture
from halfweight.memory.engine_memory import STEP_TOKENS, power_of_two
from halfweight.memory.workload import Weights, Workload

CHUNK_TOKENS = 2048
"""Of prompts at once in another engine: what vLLM schedules by default."""
CUBLAS_WORKSPACE_BYTES = 32 << 20
"""Of each stream, as torch sets it on Hopper; on other GPUs about 8 MiB."""
MULTIPROCESSORS = 132
"""Of an H100, by which work is shared out; other cards have 20 to 170."""
PARTIAL_SUMS = 128 * 256
"""Float32 sums that each multiprocessor may leave for another: the Hopper backend's, by a test.
Elsewhere a block of weights in 16 bits takes their place, of 32 MiB."""


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


def row_parts(a: Architecture, workload: Workload, weights: Weights) -> dict[str, int]:
    """Bytes by part of the plan of the engine's steps through transformers' forward.

    On a GPU decoding is recorded, for sequences in powers of two, on a stream with workspaces of
    its own; on a CPU the logits are sampled in 32 bits.
    """
    batch, context = workload.batch, workload.context
    logits, recorded = 2 * a.vocabulary, 0
    if workload.device == "cuda":
        padded = power_of_two(batch)
        recorded = row_bytes(a, padded, workload) + workspace_bytes(workload, weights)
        rows = (batch + padded) * logits
    else:
        rows = 3 * batch * logits
    tokens = min(STEP_TOKENS["transformers"], batch * context)
    return {
        "tables": 4 * (batch + 1) * (context + 1),
        "step activations": row_bytes(a, tokens, workload),
        "recorded steps": recorded,
        "logits": rows,
    }


def row_bytes(a: Architecture, tokens: int, workload: Workload) -> int:
    """The most that one forward pass over a row of tokens holds: in the MLP, a norm or attention.

    On a CPU attention reads a copy of a sequence's keys and values, and a mask in bytes, made of
    two others, says what each token of a prompt sees.
    """
    numbers = 3 * a.hidden + 2 * (a.heads + a.kv_heads) * a.head_dim
    numbers += (a.heads + 2 * a.kv_heads) * a.head_dim if a.fused_attention else 0
    attention = 2 * tokens * numbers
    if workload.device == "cpu":
        length = min(tokens, workload.context)
        reach = max(_reaches(a, length, workload.context))
        attention += reach * (4 * a.kv_heads * a.head_dim + 3 * length)
    return max(2 * tokens * _mlp_numbers(a, a.intermediate), 18 * tokens * a.hidden, attention)


def other_engine_parts(a: Architecture, workload: Workload) -> dict[str, int]:
    """Bytes by part of the plan where vLLM or transformers' tensor parallelism runs the model."""
    return {
        "step activations": prefill_moments(a, workload).peak,
        "logits": logits_bytes(a, workload.batch),
    }


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
    one token a sequence keys and values repeated to all heads. One mask for each kind of layer;
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
    return CUBLAS_WORKSPACE_BYTES + (partial_sums_bytes() if ours else 0)


def partial_sums_bytes() -> int:
    """What our products of one stream leave for other multiprocessors."""
    return 4 * MULTIPROCESSORS * PARTIAL_SUMS

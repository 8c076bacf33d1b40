"""What the engine's runners allocate beside the weights, counted as they allocate it. No torch.

One arithmetic used twice: the GPU runner sizes its pool of pages by it before it allocates anything
(engine/runners/gpu_memory.py), the planner predicts with it before anything is loaded (plan.py).
Runners take their sizes of pages and steps from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RunnerKind = Literal["gpu", "cpu", "transformers"]

PAGE_TOKENS: dict[RunnerKind, int] = {"gpu": 64, "cpu": 32, "transformers": 16}
"""Tokens of a page."""
STEP_TOKENS: dict[RunnerKind, int] = {"gpu": 8192, "cpu": 64, "transformers": 2048}
"""Most tokens that go through the layers at once."""
FEW_TOKENS = 8
"""Tokens a sequence of a recorded step that verifies drafts."""
FEW_SEQUENCES = 8
"""Sequences of such a step at most."""
READ_TOKENS = 1024
"""Tokens of a recorded step of prompts at most, in 16-bit pages: the launches of more are no
slower than the GPU."""
LOGIT_ROWS = 2048
"""Rows of logits of a mixed step that are counted: prompts whose own log chances are wanted."""
SMALL_BUCKETS = (1, 2, 4)
BUCKET_STEP = 8
"""Between the larger buckets."""
DECODE_PROGRAMS = {"16bit": 3, "int8": 5}
"""Programs of decode's attention that a multiprocessor of Hopper holds at once."""
MIN_DOT_ROWS = 16
TILE_ROWS = 128
"""Queries times heads of a tile of a prompt."""


@dataclass(frozen=True)
class Sizes:
    """Of a Llama-like model; `number_bytes` of an activation.

    Of several `ranks` they are a rank's own, but for the vocabulary.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    number_bytes: int = 2
    ranks: int = 1

    @property
    def queries(self) -> int:
        """Numbers of a token's queries."""
        return self.heads * self.head_dim

    @property
    def qkv(self) -> int:
        """Of its queries, key and value."""
        return self.queries + 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Limits:
    """What the runner on a GPU has to have room for."""

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
        return -(-self.max_context // PAGE_TOKENS["gpu"])

    @property
    def scratch_pages(self) -> int:
        """Pages of one layer in 16 bits that INT8 pages of prompts are turned to: the longest
        sequence's, or those of a step of many short ones.
        """
        if self.kv_cache != "int8":
            return 0
        return max(self.max_pages, 2 * -(-self.max_step_tokens // PAGE_TOKENS["gpu"]))


def bucket(batch: int) -> int:
    """The size of the recorded step that takes `batch` sequences: 1, 2, 4, 8, 16, 24, ..."""
    for size in SMALL_BUCKETS:
        if batch <= size:
            return size
    return -(-batch // BUCKET_STEP) * BUCKET_STEP


def recorded_rows(max_sequences: int) -> int:
    """Tokens of the largest recorded step."""
    return max(bucket(max_sequences), FEW_SEQUENCES * FEW_TOKENS)


def page_bytes(sizes: Sizes, kv_cache: str) -> int:
    """Bytes of a page of one layer on a GPU, keys and values."""
    size = sizes.number_bytes
    width = sizes.head_dim + size if kv_cache == "int8" else sizes.head_dim * size
    return 2 * PAGE_TOKENS["gpu"] * sizes.kv_heads * width


def gpu_parts(sizes: Sizes, limits: Limits) -> dict[str, int]:
    """Bytes beside weights and pages on a GPU, by part of the plan, for what all slots may hold."""
    slots, context = limits.max_sequences + 1, limits.max_context
    rows = recorded_rows(limits.max_sequences)
    tokens = min(limits.max_step_tokens, limits.max_sequences * context)
    reading = min(READ_TOKENS, tokens) if limits.kv_cache == "16bit" else 0
    logits = sizes.vocabulary * sizes.number_bytes
    recorded = activation_bytes(sizes, max(rows, reading)) + _decode_sums(sizes, limits)
    return {
        "tables": 4 * slots * (context + 1 + limits.max_pages) + 4 * context * sizes.head_dim,
        "scratch pages": limits.scratch_pages * page_bytes(sizes, "16bit"),
        "step activations": activation_bytes(sizes, tokens) + _tile_sums(sizes, limits),
        "recorded steps": recorded + (_tile_sums(sizes, limits) if reading else 0),
        "logits": (rows + limits.max_sequences) * logits + _gathered(sizes, rows),
    }


def _gathered(sizes: Sizes, rows: int) -> int:
    """Logits on their way from all ranks: a rank's own, rank by rank, and side by side."""
    if sizes.ranks == 1:
        return 0
    own = sizes.vocabulary // sizes.ranks
    return rows * (own + 2 * sizes.vocabulary) * sizes.number_bytes


def activation_bytes(sizes: Sizes, num_tokens: int) -> int:
    """The most that the layers' intermediate results take at once for so many tokens."""
    widest = max(sizes.qkv + 2 * sizes.queries, 3 * sizes.intermediate)
    return num_tokens * (3 * sizes.hidden + widest) * sizes.number_bytes


def _tile_sums(sizes: Sizes, limits: Limits) -> int:
    """Float32 sums and two more numbers a row, of tiles of prompts that were cut into parts."""
    return 4 * (sizes.head_dim + 2) * 2 * limits.num_processors * TILE_ROWS


def decode_counters(max_sequences: int, kv_heads: int) -> int:
    """Programs of decode's attention count how many of them are done: int32, of each key head of
    each sequence of the largest recorded step.
    """
    return bucket(max_sequences) * kv_heads


def _decode_sums(sizes: Sizes, limits: Limits) -> int:
    """The same of decoding sequences, and the counters of who has left such sums."""
    programs = DECODE_PROGRAMS[limits.kv_cache] * limits.num_processors
    group = sizes.heads // sizes.kv_heads
    counters = decode_counters(limits.max_sequences, sizes.kv_heads)
    items = counters + programs
    sums = (sizes.head_dim + 2) * items * max(MIN_DOT_ROWS, power_of_two(group))
    return 4 * (sums + counters)


def cpu_parts(sizes: Sizes, max_sequences: int, max_context: int) -> dict[str, int]:
    """Bytes beside weights and pages of the compiled step on a CPU, all in float32."""
    widths = sizes.hidden + sizes.qkv + sizes.queries + sizes.intermediate
    rows = STEP_TOKENS["cpu"]
    table = 4 * (max_sequences + 1) * (max_context + 1)
    return {
        "tables": table + 8 * max_context * sizes.head_dim,
        "step activations": 4 * rows * widths,
        "logits": 4 * max_sequences * sizes.vocabulary,
    }


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()

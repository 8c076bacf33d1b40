"""Which form of w8a16.cu a product takes: by a model of the card, whose facts the device gives.

A form's stage takes as long as the slowest of what it needs: bytes from memory and from L2, tensor
cores, shared memory, conversions. No card is known by its name. The shares below have not been
fitted to any card yet: w8a16.cu as it is has run on none (docs/kernels.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from halfweight.kernels.cuda import schedule
from halfweight.kernels.cuda.card import Card
from halfweight.kernels.cuda.schedule import Plan

MOST_STAGES = 6
BLOCK_RESERVE = 1024
"""Shared memory that the hardware keeps of each block."""
L2_BYTES_PER_CLOCK = 29
"""What a multiprocessor gets from L2, all reading at once."""
BANKS_BYTES = 128
"""What shared memory gives a clock."""
LANES = 128
"""Conversions that a multiprocessor makes a clock."""
OVERHEAD = 1.15
"""What the parts of a stage cost each other."""
WAIT_CLOCKS = 200
"""A stage's barrier and the first loads behind it."""


@dataclass(frozen=True)
class Shape:
    """Compile-time sizes of w8a16.cu: see there. `blocks` run on one multiprocessor."""

    row_tiles: int
    token_tiles: int
    warps_n: int
    warps_m: int
    warps_k: int
    units: int
    blocks: int = 1

    @property
    def tokens(self) -> int:
        """Tokens a tile: MT."""
        return 8 * self.token_tiles * self.warps_m

    @property
    def rows(self) -> int:
        """Rows of W a tile: BN."""
        return 16 * self.row_tiles * self.warps_n

    @property
    def k_bytes(self) -> int:
        """Columns a stage: KB."""
        return 64 * self.warps_k * self.units

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.warps_n * self.warps_m * self.warps_k

    @property
    def partial_floats(self) -> int:
        """Float32 sums that a block may leave for another."""
        return self.rows * self.tokens

    @property
    def stage_bytes(self) -> int:
        """W and x of a stage."""
        return self.k_bytes * (self.rows + 2 * self.tokens)

    @property
    def sums_bytes(self) -> int:
        """Shared memory through which warps of the same rows and tokens add their sums."""
        return (self.warps_k - 1) * self.partial_floats * 4


SHAPES = (
    Shape(2, 1, 1, 1, 8, 1),
    Shape(2, 1, 1, 1, 8, 1, blocks=2),
    Shape(2, 1, 2, 1, 4, 1),
    Shape(2, 2, 1, 1, 8, 1),
    Shape(2, 2, 2, 1, 4, 1),
    Shape(2, 2, 2, 1, 4, 1, blocks=2),
    Shape(1, 4, 2, 1, 4, 1),
    Shape(2, 4, 2, 1, 4, 1),
    Shape(2, 4, 4, 1, 2, 1),
    Shape(1, 8, 4, 1, 2, 1),
    Shape(2, 8, 4, 1, 2, 1),
    Shape(2, 4, 4, 2, 1, 2),
    Shape(2, 8, 2, 2, 2, 1),
    Shape(2, 8, 4, 2, 1, 2),
)
"""The forms that are compiled, fewest tokens first."""


@dataclass(frozen=True)
class Form:
    """A shape and the stages of its ring."""

    shape: Shape
    stages: int

    cluster = split = 1
    shares_tiles = True
    tile_us = 1.0
    collect_us = 0.0

    @property
    def blocks(self) -> int:
        """Blocks of a multiprocessor."""
        return self.shape.blocks

    @property
    def tokens(self) -> int:
        """Tokens a tile."""
        return self.shape.tokens

    @property
    def rows(self) -> int:
        """Rows of W a tile."""
        return self.shape.rows

    @property
    def k_bytes(self) -> int:
        """Columns a stage."""
        return self.shape.k_bytes

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return self.stages * self.shape.stage_bytes + self.shape.sums_bytes

    @property
    def fixup_us(self) -> float:
        """What sharing tiles costs; grows with the sums exchanged."""
        return 1.5 + 0.0007 * self.shape.partial_floats

    @property
    def even_fixup_us(self) -> float:
        """The same where all shares end at once."""
        return 0.75 * self.fixup_us

    def row_counts(self, out_features: int, tiles_m: int, workers: int) -> Sequence[int]:
        """Rows that a tile may have: all."""
        return [self.rows]

    def stage_us(self, card: Card, num_blocks: int, rows: int, in_step: bool = True) -> float:
        """Microseconds a stage takes while so many blocks read."""
        weights = rows * self.k_bytes
        activations = 2 * self.tokens * self.k_bytes
        from_memory = weights if in_step else weights + activations
        clocks = max(
            self.tokens * weights / card.products_per_clock,
            (weights + activations) / L2_BYTES_PER_CLOCK,
            self._banks_bytes(weights, activations) / BANKS_BYTES,
            self.shape.warps_m * weights / LANES,
        )
        inside = (self.shape.blocks * OVERHEAD * clocks + WAIT_CLOCKS) / card.mhz
        return max(inside, num_blocks * from_memory / card.read_bytes_per_us)

    def _banks_bytes(self, weights: int, activations: int) -> int:
        """Written once, read by every warp that needs them."""
        shape = self.shape
        return (1 + shape.warps_m) * weights + (1 + shape.warps_n) * activations

    def defines(self, group: int, scales: int, bf16: bool) -> dict[str, int]:
        """Compile-time names of the source; `group` is 32, 64 or 128."""
        shape = self.shape
        return {
            **{"RT": shape.row_tiles, "NT": shape.token_tiles, "WN": shape.warps_n},
            **{"WM": shape.warps_m, "WK": shape.warps_k, "UNITS": shape.units},
            **{"STAGES": self.stages, "BLOCKS": shape.blocks},
            **{"GROUP": group, "SCALES": scales, "BF16": int(bf16)},
        }


def form_on(card: Card, shape: Shape) -> Form:
    """A shape with as many stages as fit on a card: fewer than 2 if it has too little memory."""
    share = card.shared_bytes // shape.blocks - BLOCK_RESERVE
    room = min(share, card.block_bytes) - shape.sums_bytes
    return Form(shape, min(MOST_STAGES, room // shape.stage_bytes))


def run_of(group_size: int, num_groups: int) -> int:
    """Columns between two scales, as far as the kernel tells: 128, 64 or 32."""
    if num_groups == 1:
        return 128
    return next(run for run in (128, 64, 32) if group_size % run == 0)


def forms(card: Card, num_tokens: int) -> list[Form]:
    """Those worth a thought: the least tile that covers the tokens, and one of half its size."""
    sizes = sorted({shape.tokens for shape in SHAPES})
    covering = next((size for size in sizes if size >= num_tokens), sizes[-1])
    wanted = (covering, covering // 2) if num_tokens > sizes[-2] else (covering,)
    found = [form_on(card, shape) for shape in SHAPES if shape.tokens in wanted]
    return [form for form in found if form.stages >= 2]


@lru_cache(maxsize=4096)
def choose(card: Card, num_tokens: int, out_features: int, in_features: int) -> Plan[Form]:
    """The plan that should take the least time."""
    sizes = (num_tokens, out_features, in_features)
    found = [
        plan for form in forms(card, num_tokens) for plan in schedule.plans(form, *sizes, card)
    ]
    return min(found, key=schedule.preference)

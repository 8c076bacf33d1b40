"""Which form of w8a16.cu a product takes: by a model of the card, whose facts the device gives.

A form's stage takes as long as its copies, or as what its warps do with them; those are too few to
hide all of one instruction behind another, so tensor cores, issue and shared memory add up. The
constants were fitted to the times of all forms and schedules on an H200 (benchmarks/tiles.py); no
card is known by its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from halfweight.kernels.cuda import schedule
from halfweight.kernels.cuda.card import Card
from halfweight.kernels.cuda.schedule import Plan

MOST_STAGES = 6
BLOCK_RESERVE = 1024
"""Shared memory that the hardware keeps of each block."""
LAUNCH_US = 3.6
"""What every product takes beside its stages: its launch, the first bytes, the last results."""
TILE_US = 1.02
"""What beginning and ending a tile takes."""
SHARE_US = 5.1
"""What handing sums to another block takes, if there are few."""
SUM_US = 0.00027
"""The same for each sum."""
EVEN_SHARE = 0.64
"""Of both, where all shares end at once."""
LATENCY_US = 1.48
"""From a copy's start to its end, at the rate that memory has."""
WAIT_US = 0.242
"""A stage's barrier and the first loads behind it."""
PRODUCTS, INSTRUCTIONS, BANKS = 1.671, 0.38, 0.181
"""Of the time that tensor cores, issue and shared memory need for a stage: what shows."""
BANKS_BYTES = 128
"""What shared memory gives a clock."""
SCHEDULERS = 4
"""Warps that a multiprocessor issues for in a clock."""
BOTH = 5.82
"""How sharp the larger of two times is: the exponent of their sum's norm."""


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
    scaled: bool = False
    """Whether a weight is multiplied by its scale, or a group's sum."""
    factor: float = 1.0
    """What its stages take beside what the model says."""

    @property
    def name(self) -> str:
        """All that tells it from other shapes."""
        sizes = (self.row_tiles, self.token_tiles, self.warps_n, self.warps_m, self.warps_k)
        kind = "-scaled" if self.scaled else ""
        return "-".join(map(str, (*sizes, self.units, self.blocks))) + kind

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
    def warps(self) -> int:
        """Of a block."""
        return self.threads // 32

    @property
    def instructions(self) -> float:
        """That a warp issues for a stage."""
        fragments, products = self.row_tiles, self.row_tiles * self.token_tiles
        scales = 8 * fragments if self.scaled else products
        columns_32 = 17 * fragments + self.token_tiles + 2 * products + scales
        copies = self.stage_bytes / 16 / self.threads
        return 2 * self.units * columns_32 + 3 * copies + 40

    @property
    def banks_bytes(self) -> int:
        """Written once, read by every warp that needs them."""
        weights, activations = self.k_bytes * self.rows, 2 * self.k_bytes * self.tokens
        return (1 + self.warps_m) * weights + (1 + self.warps_n) * activations

    @property
    def stage_bytes(self) -> int:
        """W and x of a stage."""
        return self.k_bytes * (self.rows + 2 * self.tokens)

    @property
    def sums_bytes(self) -> int:
        """Shared memory through which warps of the same rows and tokens add their sums."""
        return (self.warps_k - 1) * self.partial_floats * 4


SHAPES = (
    Shape(2, 1, 2, 1, 4, 1, factor=0.769),
    Shape(2, 1, 1, 1, 8, 1, factor=1.21),
    Shape(2, 1, 1, 1, 8, 1, blocks=2, factor=1.3),
    Shape(2, 1, 1, 1, 4, 2, blocks=2, factor=0.77),
    Shape(2, 1, 1, 1, 4, 1, blocks=4, factor=1.27),
    Shape(2, 2, 2, 1, 4, 1, factor=0.862),
    Shape(2, 2, 1, 1, 8, 1, factor=1.13),
    Shape(2, 2, 1, 1, 8, 1, blocks=2, factor=1.3),
    Shape(2, 2, 2, 1, 4, 1, blocks=2, factor=1.21),
    Shape(2, 2, 4, 1, 1, 2, blocks=3, factor=0.769),
    Shape(1, 4, 2, 1, 4, 1, factor=0.85),
    Shape(2, 4, 2, 1, 4, 1, factor=1.01),
    Shape(2, 4, 4, 1, 1, 2, blocks=2, factor=0.903),
    Shape(2, 6, 4, 1, 1, 2, blocks=2, factor=0.907),
    Shape(2, 6, 4, 2, 1, 2, factor=0.853),
    Shape(2, 8, 4, 1, 2, 1, factor=0.891),
    Shape(2, 8, 4, 1, 1, 2, blocks=2, factor=0.905),
    Shape(2, 8, 4, 2, 1, 2, factor=0.872),
    Shape(2, 8, 4, 1, 1, 2, blocks=2, scaled=True, factor=0.889),
    Shape(2, 8, 4, 2, 1, 2, scaled=True, factor=0.802),
)
"""The forms that are compiled, fewest tokens first. Some never win where a block may have 227 KB,
but are the best of those that fit 99 KB.
"""


@dataclass(frozen=True)
class Form:
    """A shape and the stages of its ring."""

    shape: Shape
    stages: int

    cluster = split = 1
    shares_tiles = True
    collect_us = 0.0

    @property
    def tile_us(self) -> float:
        """What beginning and ending a tile takes."""
        return TILE_US

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
        return SHARE_US + SUM_US * self.shape.partial_floats

    @property
    def even_fixup_us(self) -> float:
        """The same where all shares end at once."""
        return EVEN_SHARE * self.fixup_us

    def row_counts(self, out_features: int, tiles_m: int, workers: int) -> Sequence[int]:
        """Rows that a tile may have: all."""
        return [self.rows]

    def stage_us(self, card: Card, num_blocks: int, rows: int, in_step: bool = True) -> float:
        """Microseconds a stage takes while so many blocks read."""
        shape = self.shape
        weights, activations = rows * self.k_bytes, 2 * self.tokens * self.k_bytes
        from_memory = weights if in_step else weights + activations
        clocks = (
            PRODUCTS * self.tokens * weights / card.products_per_clock
            + INSTRUCTIONS * shape.instructions * shape.warps / SCHEDULERS
            + BANKS * shape.banks_bytes / BANKS_BYTES
        )
        together = min(shape.blocks, -(-num_blocks // card.multiprocessors))
        inside = shape.factor * together * clocks / card.mhz + WAIT_US
        inside = max(inside, LATENCY_US / (self.stages - 1))
        copies = num_blocks * from_memory / card.memory_bytes_per_us
        together_us: float = (inside**BOTH + copies**BOTH) ** (1 / BOTH)
        return together_us

    def defines(self, group: int, scales: int, bf16: bool) -> dict[str, int]:
        """Compile-time names of the source; `group` is 32, 64 or 128."""
        shape = self.shape
        return {
            **{"RT": shape.row_tiles, "NT": shape.token_tiles, "WN": shape.warps_n},
            **{"WM": shape.warps_m, "WK": shape.warps_k, "UNITS": shape.units},
            **{"STAGES": self.stages, "BLOCKS": shape.blocks, "SCALED": int(shape.scaled)},
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


def may_scale(run: int, is_grid8: bool) -> bool:
    """Whether forms may be taken that multiply weights by their scales, rounding to 16 bits."""
    return is_grid8 and run >= 64


def forms(card: Card, num_tokens: int, scaled: bool) -> list[Form]:
    """Those worth a thought: the least tile that covers the tokens, and lesser ones that need at
    most twice the fewest tiles. `scaled` ones where they may be taken.
    """
    sizes = sorted({shape.tokens for shape in SHAPES})
    covering = next((size for size in sizes if size >= num_tokens), sizes[-1])
    most_tiles = 2 * -(-num_tokens // sizes[-1])
    found = [
        form_on(card, shape)
        for shape in SHAPES
        if num_tokens <= shape.tokens * most_tiles
        and shape.tokens <= covering
        and (scaled or not shape.scaled)
    ]
    return [form for form in found if form.stages >= 2]


def choose(
    card: Card,
    sizes: tuple[int, int, int],
    scaled: bool,
    ratios: Mapping[Shape, float] = MappingProxyType({}),
) -> Plan[Form]:
    """The plan that should take the least time for a product of (tokens, rows, columns).

    `scaled` forms are taken only where they may be. `ratios` are those of tuned.py.
    """
    found = [
        plan
        for form in forms(card, sizes[0], scaled)
        for plan in schedule.plans(form, *sizes, card)
    ]

    def preference(plan: Plan[Form]) -> tuple[float, int]:
        ratio = ratios.get(plan.config.shape, 1.0)
        return ratio * (LAUNCH_US + plan.microseconds), plan.num_workers

    return min(found, key=preference)

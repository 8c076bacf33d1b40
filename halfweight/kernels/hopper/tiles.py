"""Which tile a product on Hopper takes, and how its tiles are dealt to the multiprocessors.

A configuration is one compiled form of hopper_small.cu, hopper_large.cu or hopper_int8.cu; a
schedule says which tiles are computed whole and which are shared between blocks (stream-K). `plans`
estimates the time of every schedule and `choose` takes the fastest. The constants were fitted to
the times of all configurations and schedules on an H200, those of INT8 on an H100 as well
(benchmarks/tiles.py); the memory's rate and all else of the card is asked of the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from halfweight.kernels.cuda import schedule
from halfweight.kernels.cuda.card import Card
from halfweight.kernels.cuda.schedule import Plan

MHZ = 1980
"""The clock of the card whose times the configurations have."""
L2_BYTES_PER_CLOCK = 24.87
"""What a multiprocessor gets of weights and activations, all reading at once."""
CODE_PITCH = 8
"""Shared memory of a row's codes in a stage of hopper_large.cu."""
STORE_BYTES = 1024
"""Shared memory of a warp through which it stores results."""


@dataclass(frozen=True)
class Small:
    """A compiled form of hopper_small.cu: its compile-time names, `tokens` = 8 NT.

    `block_us` is how long a stage takes at 1,980 MHz where memory is not the limit.
    """

    tokens: int
    row_tiles: int
    warps_n: int
    warps_k: int
    units: int
    stages: int
    block_us: float

    file = "hopper_small.cu"
    entry = b"w8a16_small"
    threads = 384
    cluster = split = blocks = 1
    tile_us = 0.67
    collect_us = 0.0
    shares_tiles = True

    @property
    def fixup_us(self) -> float:
        """What sharing tiles costs; grows with the sums exchanged."""
        return 1.34 + 0.00062 * self.partial_floats

    @property
    def even_fixup_us(self) -> float:
        """The same where all shares end at once."""
        return 0.69 * self.fixup_us

    @property
    def rows(self) -> int:
        """Rows of W a block takes: BN."""
        return 16 * self.row_tiles * self.warps_n

    @property
    def k_bytes(self) -> int:
        """Columns a stage: KB."""
        return 64 * self.warps_k * self.units

    def row_counts(self, out_features: int, tiles_m: int, workers: int) -> list[int]:
        """Rows that a tile may have."""
        return [self.rows]

    def stage_us(self, card: Card, num_blocks: int, rows: int, in_step: bool = True) -> float:
        """Microseconds a stage takes while so many blocks read."""
        in_memory = rows * self.k_bytes * num_blocks / card.read_bytes_per_us
        return max(self.block_us * MHZ / card.mhz, in_memory)

    @property
    def partial_floats(self) -> int:
        """Float32 sums a block may leave for another."""
        return self.rows * self.tokens

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: alignment, ring, sums of the other warps, barriers, codes."""
        stage = self.k_bytes * (self.rows + 2 * self.tokens)
        codes = self.rows * ((self.k_bytes // 64 + 7) // 4 * 4)
        sums = (self.warps_k - 1) * self.partial_floats * 4
        return 1024 + self.stages * (stage + 16 + codes) + sums

    def groups(self, group_size: int) -> int:
        """Groups a box of 128 columns, where that makes another program."""
        return 2 if group_size == 64 else 1

    def defines(self, groups: int) -> dict[str, int]:
        """Compile-time names of the source."""
        return {
            **{"NT": self.tokens // 8, "RT": self.row_tiles, "WN": self.warps_n},
            **{"WK": self.warps_k, "UNITS": self.units, "STAGES": self.stages},
            "GROUPS": groups,
        }


@dataclass(frozen=True)
class Large:
    """A compiled form of hopper_large.cu: tokens a tile, consumer warpgroups, stages of the ring.

    `cluster` blocks take neighbouring rows of W and share x, or `split` blocks take one tile, each
    a part of K. A stage has `columns` of K. `block_us` is how long what the schedule deals out
    together takes at 1,980 MHz where memory is not the limit.
    """

    tokens: int
    warpgroups: int
    stages: int
    block_us: float
    cluster: int = 1
    split: int = 1
    columns: int = 128

    blocks = 1
    file = "hopper_large.cu"
    entry = b"w8a16_large"
    products = 1
    """Instructions that a warpgroup queues at once, of 32 bytes of x each."""
    tile_us = 0.85
    even_fixup_us = 5.2
    collect_us = 3.8

    @property
    def fixup_us(self) -> float:
        """What sharing tiles costs; grows with the sums exchanged."""
        return 4.7 + 0.00018 * self.partial_floats

    @property
    def shares_tiles(self) -> bool:
        """With four warpgroups there are no registers to exchange sums: it takes 15 to 30 us."""
        return self.warpgroups < 4

    def row_counts(self, out_features: int, tiles_m: int, workers: int) -> list[int]:
        """Rows that a tile may have: all that fit, or the fewest that need no more waves."""
        waves = -(-tiles_m * -(-out_features // (self.rows * self.cluster)) // workers)
        tiles_n = max(1, waves * workers // tiles_m)
        fewest = -(-out_features // (tiles_n * self.cluster * 16)) * 16
        return sorted({fewest, self.rows})

    def stage_us(self, card: Card, num_blocks: int, rows: int, in_step: bool = True) -> float:
        """Microseconds a stage takes while so many blocks read; each its own x if out of step."""
        weights = rows * self.k_bytes
        from_l2 = weights + self.x_bytes // self.cluster
        in_memory = num_blocks * (weights if in_step else from_l2) / card.read_bytes_per_us
        l2_bytes_per_us = L2_BYTES_PER_CLOCK * card.multiprocessors * card.mhz
        in_l2 = num_blocks * from_l2 / l2_bytes_per_us
        return max(self.block_us * MHZ / card.mhz, in_memory, in_l2)

    @property
    def k_bytes(self) -> int:
        """Columns that the schedule deals out together."""
        return self.columns

    @property
    def rows(self) -> int:
        """Rows of W that the warpgroups of a block multiply: BN."""
        return 64 * self.warpgroups

    @property
    def threads(self) -> int:
        """Consumers, and a warpgroup of which a thread asks for tiles and a warp for codes."""
        return 128 * (self.warpgroups + 1)

    @property
    def partial_floats(self) -> int:
        """Float32 sums a block may leave for another."""
        return self.rows * self.tokens

    @property
    def x_bytes(self) -> int:
        """Activations of a stage."""
        return 2 * self.k_bytes * self.tokens

    @property
    def stage_bytes(self) -> int:
        """W and x of a stage; codes and barriers, padded to whole kilobytes."""
        beside = self.rows * CODE_PITCH + 16
        return self.k_bytes * self.rows + self.x_bytes + -(-beside // 1024) * 1024

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: alignment, ring, store buffers."""
        return 1024 + self.stages * self.stage_bytes + self.warpgroups * 4 * STORE_BYTES

    def groups(self, group_size: int) -> int:
        """Groups in 128 columns, where that makes another program."""
        return {32: 4, 64: 2}.get(group_size, 1)

    def defines(self, groups: int) -> dict[str, int]:
        """Compile-time names of the source."""
        return {
            **{"TOKENS": self.tokens, "ROWS": self.rows, "WGS": self.warpgroups},
            **{"STAGES": self.stages, "CLUSTER": self.cluster, "SPLIT": self.split},
            **{"KB": self.columns, "GROUPS": groups},
        }


@dataclass(frozen=True)
class Int8(Large):
    """A compiled form of hopper_int8.cu. A token has a step for each `chain` groups of 128 columns,
    which the schedule deals out together; a stage is one group.
    """

    chain: int = 4

    file = "hopper_int8.cu"
    entry = b"w8a8_large"
    products = 4

    @property
    def k_bytes(self) -> int:
        """Columns that share a step."""
        return self.columns * self.chain

    @property
    def x_bytes(self) -> int:
        """Activations of these columns, and each stage a float for each token."""
        return (self.k_bytes + 4 * self.chain) * self.tokens

    @property
    def stage_bytes(self) -> int:
        """W, x and the barriers, in whole kilobytes."""
        filled = self.columns * self.rows + self.x_bytes // self.chain
        return -(-(filled + 16) // 1024) * 1024

    def groups(self, group_size: int) -> int:
        """Groups are no smaller than a stage."""
        return 1

    def defines(self, groups: int) -> dict[str, int]:
        """Compile-time names of the source."""
        return {**super().defines(groups), "CHAIN": self.chain}


Config = Small | Large


SMALL = (
    Small(tokens=8, row_tiles=2, warps_n=1, warps_k=8, units=2, stages=4, block_us=0.6),
    Small(tokens=8, row_tiles=3, warps_n=1, warps_k=8, units=2, stages=3, block_us=1.106),
    Small(tokens=8, row_tiles=2, warps_n=4, warps_k=2, units=2, stages=5, block_us=0.729),
    Small(tokens=16, row_tiles=2, warps_n=1, warps_k=8, units=2, stages=3, block_us=0.7),
    Small(tokens=16, row_tiles=3, warps_n=1, warps_k=8, units=1, stages=4, block_us=0.624),
    Small(tokens=16, row_tiles=2, warps_n=2, warps_k=4, units=2, stages=4, block_us=0.788),
    Small(tokens=16, row_tiles=2, warps_n=4, warps_k=2, units=2, stages=5, block_us=0.748),
    Small(tokens=32, row_tiles=1, warps_n=2, warps_k=4, units=2, stages=4, block_us=0.585),
    Small(tokens=32, row_tiles=2, warps_n=2, warps_k=4, units=2, stages=3, block_us=1.116),
    Small(tokens=32, row_tiles=2, warps_n=4, warps_k=2, units=2, stages=4, block_us=1.006),
    Small(tokens=64, row_tiles=1, warps_n=4, warps_k=2, units=2, stages=4, block_us=1.001),
)
LARGE = (
    Large(tokens=64, warpgroups=2, stages=6, block_us=0.645),
    Large(tokens=64, warpgroups=2, stages=6, block_us=0.438, split=2),
    Large(tokens=64, warpgroups=3, stages=5, block_us=0.964),
    Large(tokens=64, warpgroups=4, stages=4, block_us=1.244),
    Large(tokens=128, warpgroups=2, stages=4, block_us=0.99),
    Large(tokens=128, warpgroups=2, stages=4, block_us=0.685, split=2),
    Large(tokens=128, warpgroups=3, stages=3, block_us=1.481),
    Large(tokens=256, warpgroups=2, stages=5, block_us=0.895, columns=64),
    Large(tokens=256, warpgroups=2, stages=5, block_us=0.907, cluster=2, columns=64),
    Large(tokens=256, warpgroups=2, stages=5, block_us=0.896, split=2, columns=64),
)
INT8 = (
    Int8(tokens=128, warpgroups=2, stages=6, block_us=2.772),
    Int8(tokens=176, warpgroups=2, stages=5, block_us=3.863),
    Int8(tokens=176, warpgroups=2, stages=5, block_us=3.871, cluster=2),
)


def candidates(num_tokens: int, in_features: int, group_size: int) -> list[Config]:
    """The configurations worth a thought for such a product.

    hopper_small.cu has a single tile of tokens, so only its least that covers the batch.
    """
    found: list[Config] = []
    covering = min((c.tokens for c in SMALL if c.tokens >= num_tokens), default=None)
    if covering is not None and group_size % 64 == 0 and in_features % 128 == 0:
        found += [c for c in SMALL if c.tokens == covering]
        if num_tokens <= 32:
            return found
    sizes = sorted({c.tokens for c in LARGE})
    place = next((i for i, size in enumerate(sizes) if size >= num_tokens), len(sizes) - 1)
    return found + [c for c in LARGE if c.tokens in sizes[max(0, place - 1) : place + 1]]


def plans(
    config: Config, num_tokens: int, out_features: int, in_features: int, card: Card
) -> list[Plan[Config]]:
    """Every way to deal the tiles of `config` to the multiprocessors."""
    return schedule.plans(config, num_tokens, out_features, in_features, card)


@lru_cache(maxsize=4096)
def choose(
    num_tokens: int, out_features: int, in_features: int, group_size: int, card: Card
) -> Plan[Config]:
    """The plan that should take the least time."""
    configs = candidates(num_tokens, in_features, group_size)
    return _fastest(configs, num_tokens, out_features, in_features, card)


@lru_cache(maxsize=4096)
def choose_int8(num_tokens: int, out_features: int, in_features: int, card: Card) -> Plan[Config]:
    """The plan that should take the least time for activations in int8."""
    return _fastest(INT8, num_tokens, out_features, in_features, card)


def _fastest(
    configs: Sequence[Config], num_tokens: int, out_features: int, in_features: int, card: Card
) -> Plan[Config]:
    sizes = (num_tokens, out_features, in_features)
    return min((p for c in configs for p in plans(c, *sizes, card)), key=schedule.preference)

"""How the tiles of a product are dealt to the multiprocessors: whole, or shared (stream-K).

A form of a kernel says what its tiles and stages take (`Tiles`); `plans` gives every way to deal
them, with the time it should take. schedule.cuh walks through what is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from halfweight.kernels.cuda.card import Card

L2_SHARE = 0.76
"""Of the L2 cache: activations no larger stay there while weights stream through it."""


class Tiles(Protocol):
    """A compiled form of a kernel, as far as a schedule must know it. Times are microseconds."""

    @property
    def tokens(self) -> int:
        """Tokens a tile."""

    @property
    def rows(self) -> int:
        """The most rows of W a tile."""

    @property
    def k_bytes(self) -> int:
        """Columns of K that are dealt out together."""

    @property
    def cluster(self) -> int:
        """Blocks that take neighbouring rows."""

    @property
    def split(self) -> int:
        """Blocks that take one tile, each a part of K."""

    @property
    def blocks(self) -> int:
        """Blocks that run on one multiprocessor at the same time."""

    @property
    def shares_tiles(self) -> bool:
        """Whether blocks may share a tile."""

    @property
    def tile_us(self) -> float:
        """What beginning and ending a tile takes."""

    @property
    def fixup_us(self) -> float:
        """What sharing tiles takes."""

    @property
    def even_fixup_us(self) -> float:
        """The same where all shares end at once."""

    @property
    def collect_us(self) -> float:
        """The same for `split` blocks."""

    def row_counts(self, out_features: int, tiles_m: int, workers: int) -> Sequence[int]:
        """Rows that a tile may have."""

    def stage_us(self, card: Card, num_blocks: int, rows: int, in_step: bool = True) -> float:
        """What `k_bytes` columns take on a card while so many blocks read."""


Form = TypeVar("Form", bound=Tiles)


@dataclass(frozen=True)
class Plan(Generic[Form]):
    """How a product is computed: tiles of `rows` rows, the first `whole_waves` of them not shared
    with another worker (a block, or a cluster of them).
    """

    config: Form
    rows: int
    tiles_m: int
    tiles_n: int
    k_blocks: int
    whole_waves: int
    num_workers: int
    microseconds: float

    @property
    def shared_blocks(self) -> int:
        """Blocks of K of the tiles that workers share."""
        whole = self.whole_waves * self.num_workers
        return max(0, self.tiles_m * self.tiles_n - whole) * self.k_blocks


def plans(
    config: Form,
    num_tokens: int,
    out_features: int,
    in_features: int,
    card: Card,
) -> list[Plan[Form]]:
    """Every way to deal the tiles of `config` to the blocks that run on a card at the same time.

    Activations [num_tokens, in_features] that fit L2_SHARE of the L2 cache stay there in whatever
    order blocks read them.
    """
    tiles_m = -(-num_tokens // config.tokens)
    k_blocks = -(-in_features // config.k_bytes)
    workers = card.multiprocessors * config.blocks // (config.cluster * config.split)
    in_step = 2 * num_tokens * in_features <= L2_SHARE * card.l2_bytes
    found = []
    for rows in config.row_counts(out_features, tiles_m, workers):
        tiles_n = -(-out_features // (rows * config.cluster))
        sizes = (rows, tiles_m * tiles_n, k_blocks, workers)
        if config.split > 1:
            cases = _split(config, card, *sizes)
        else:
            cases = _schedules(config, card, *sizes, in_step)
        for case in cases:
            found.append(Plan(config, rows, tiles_m, tiles_n, k_blocks, *case))
    return found


def preference(plan: Plan[Any]) -> tuple[float, int]:
    """Least time first; of equals the fewest workers, which read x least often."""
    return plan.microseconds, plan.num_workers


Schedule = tuple[int, int, float]
"""whole_waves, num_workers and microseconds of a Plan."""


def _split(
    config: Tiles, card: Card, rows: int, tiles: int, k_blocks: int, workers: int
) -> Iterator[Schedule]:
    """A cluster for each tile, if there are as many."""
    if tiles <= workers and k_blocks >= config.split:
        stage_us = config.stage_us(card, tiles * config.split, rows)
        blocks = -(-k_blocks // config.split)
        yield 1, tiles, blocks * stage_us + config.tile_us + config.collect_us


def _schedules(
    config: Tiles,
    card: Card,
    rows: int,
    tiles: int,
    k_blocks: int,
    most_workers: int,
    in_step: bool,
) -> Iterator[Schedule]:
    """Whole tiles only; what is left after whole waves shared; each tile cut evenly.

    Of what is shared every worker has a part: who starts a tile waits for all others between.
    """
    workers = min(most_workers, tiles * k_blocks)
    waves, parts = -(-tiles // workers), min(workers // tiles, k_blocks)

    def us(num_workers: int, num_tiles: float, blocks: float, in_step: bool = True) -> float:
        stage_us = config.stage_us(card, num_workers * config.cluster, rows, in_step)
        return blocks * stage_us + num_tiles * config.tile_us

    full, left = divmod(tiles, workers)
    whole_us = us(workers, full, full * k_blocks)
    yield waves, workers, whole_us + (us(left, 1, k_blocks) if left else 0.0)
    if config.shares_tiles and left and left * k_blocks >= workers:
        share = left / workers
        shared_us = us(workers, share, share * k_blocks, in_step) + config.fixup_us
        yield full, workers, whole_us + shared_us
    if config.shares_tiles and parts > 1:
        even_us = us(tiles * parts, 1, -(-k_blocks // parts))
        yield 0, tiles * parts, even_us + config.even_fixup_us

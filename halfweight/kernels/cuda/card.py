"""What the models of tiles know of a GPU: facts of the device. No card is known by its name."""

from __future__ import annotations

from dataclasses import dataclass

READ_SHARE = 0.874
"""Of the memory's rate: what reads of weights reach."""


@dataclass(frozen=True)
class Card:
    """What a model must know of a device."""

    multiprocessors: int
    block_bytes: int
    """The most shared memory of one block."""
    shared_bytes: int
    """Shared memory of a multiprocessor."""
    l2_bytes: int
    memory_bytes_per_us: float
    """By bus width and clock."""
    mhz: float
    products_per_clock: int
    """Multiply-adds by mma.sync, 16-bit numbers into float32, of a multiprocessor."""

    @property
    def read_bytes_per_us(self) -> float:
        """What all multiprocessors together read of the weights."""
        return READ_SHARE * self.memory_bytes_per_us


def products_per_clock(capability: tuple[int, int]) -> int:
    """By compute capability: data centre and consumer designs. Source: NVIDIA's tuning guides, and
    for 9.0 what mma.sync reaches of wgmma's rate.
    """
    if capability == (9, 0):
        return 1300
    return 1024 if capability in ((8, 0), (10, 0), (10, 3)) else 512

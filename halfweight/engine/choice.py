"""Choose one token a row of scores: the likeliest, or one drawn among those that a request keeps.

What is kept follows transformers' warpers in their order: scores over the temperature, the `top_k`
largest, of those the fewest that hold `top_p` of their probability, of those what has at least
`min_p` of the largest one's. Each of the three is a floor under the scores, so tokens that tie with
the last one kept are kept too, and no row is sorted whole: on CUDA a kernel searches the floors
(sampling.py); on the CPU what cannot be kept is left out of the sort.

A token is drawn by one uniform number u a row: the first token, in order of ids, at which the sum
of probabilities exceeds u of the whole. u is a hash of the sequence's seed and the token's position
(splitmix64), made on the host for a whole step at once. So a draw depends on the row's own scores,
its seed and its position and on nothing else: not on the batch, on preemption or on drafts. Noise
for every entry of the vocabulary (Gumbel) has the same property, and costs a hash and two
logarithms for each of 128,000 entries.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfweight.engine.transfer import Lane, Returning

NAN = -1
"""The token that stands for a row with a NaN, or without a finite largest score."""

NUM_COLUMNS = 7
SLOT, POSITION, TOP_K, TEMPERATURE, TOP_P, MIN_P, UNIFORM = range(NUM_COLUMNS)
"""Columns of `rows` int32 [R, NUM_COLUMNS]; the last four hold the bits of a float32."""

Rows = NDArray[np.int32]

_BLOCK = 256
_NUM_LANES = 4


class Chosen(NamedTuple):
    """int32 [R, 2]: each row's token and whether it equals its draft."""

    on_device: Tensor
    """Until the lane it lies in is used again, some steps later."""
    on_host: Returning


Choose = Callable[[Tensor, Rows, Tensor], Chosen]
"""Of scores [R, V], rows, and the token table.

Row r of the scores is what follows table[slot, position] of `rows[r]`. The draft is what
table[slot, position + 1] holds before; the token takes its place there (0 for NAN, which is no id
that a model could read). Nothing waits for the device on CUDA.
"""


def chooser(device: torch.device) -> Choose:
    """How tokens are chosen on a device."""
    return _GpuChooser(device) if device.type == "cuda" else choose


class _GpuChooser:
    """`choose` by a kernel, through a ring of lanes: steps under way, and one to spare."""

    def __init__(self, device: torch.device) -> None:
        from halfweight.kernels.triton.sampling import Chooser

        self._kernel, self._device = Chooser(device), device
        self._lanes: deque[Lane] = deque()

    def __call__(self, scores: Tensor, rows: Rows, table: Tensor) -> Chosen:
        if not self._lanes or self._lanes[0].num_rows < len(rows):
            most = max(2 * len(rows), 64)
            widths = NUM_COLUMNS, 2
            self._lanes = deque(Lane(self._device, most, widths) for _ in range(_NUM_LANES))
        lane = self._lanes[0]
        self._lanes.rotate(-1)
        sent, result = lane.send(rows)
        self._kernel(scores, sent, table, result)
        return Chosen(result, lane.fetch(len(rows)))


def choose(scores: Tensor, rows: Rows, table: Tensor) -> Chosen:
    """`Choose` on the CPU, which defines it."""
    numbers = scores.float().numpy()
    tokens = np.array([choose_one(*pair) for pair in zip(numbers, rows, strict=True)], np.int32)
    places = rows[:, SLOT], rows[:, POSITION] + 1
    agrees = table.numpy()[places] == tokens
    table.numpy()[places] = tokens.clip(min=0)
    result = np.stack([tokens, agrees.astype(np.int32)], axis=1)
    return Chosen(torch.from_numpy(result), Returning(result))


def choose_one(scores: NDArray[np.float32], row: Rows) -> int:
    """The token of one row of scores [V]."""
    best = int(scores.argmax())  # of the first NaN, if there is one
    if not np.isfinite(scores[best]):
        return NAN
    floats = row.view(np.float32)
    if floats[TEMPERATURE] <= 0:
        return best
    return _draw(kept_weights(scores, row), floats[UNIFORM])


def _draw(weights: NDArray[np.float32], uniform: np.float32) -> int:
    """The first id at which the sum of weights exceeds `uniform` of the whole.

    Found by the sums of blocks first: a running sum of all is ten times slower than a sum.
    """
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64).cumsum()
    target = uniform * sums[-1]
    block = int(sums.searchsorted(target, side="right"))
    begin = block * _BLOCK
    inner = weights[begin : begin + _BLOCK].cumsum(dtype=np.float64)
    inner += sums[block - 1] if block else 0.0
    target = min(target, np.nextafter(inner[-1], 0))  # the two sums may differ in the last bit
    return begin + int(inner.searchsorted(target, side="right"))


def kept_weights(scores: NDArray[np.float32], row: Rows) -> NDArray[np.float32]:
    """Probabilities [V] over the largest one; 0 for what top_k, top_p and min_p drop."""
    temperature, top_p, min_p, _ = row.view(np.float32)[TEMPERATURE:]
    top_k, vocab_size = int(row[TOP_K]), len(scores)
    weights: NDArray[np.float32] = np.exp((scores - scores.max()) / temperature)
    if 0 < top_k < vocab_size:
        weights[scores < np.partition(scores, -top_k)[-top_k]] = 0
    if top_p < 1:
        weights[weights < _nucleus_floor(weights, top_p)] = 0
    weights[weights < min_p] = 0
    return weights


def _nucleus_floor(weights: NDArray[np.float32], top_p: np.float32) -> np.float32:
    """The least of the fewest largest weights that hold `top_p` of their sum.

    All weights below (1 - top_p) / V together are less than 1 - top_p of the largest, which is 1:
    none of them is in the nucleus, and few are left to be sorted.
    """
    largest = np.sort(weights[weights >= (1 - top_p) / len(weights)])[::-1]
    place = largest.cumsum(dtype=np.float64).searchsorted(weights.sum(dtype=np.float64) * top_p)
    return np.float32(largest[min(int(place), len(largest) - 1)])


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
    """A number in [0, 1), in steps of 2^-24, for each seed and position."""
    with np.errstate(over="ignore"):
        mixed = _splitmix(_splitmix(seeds) + positions.astype(np.uint64))
    return (mixed >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def _splitmix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One step of Steele, Lea and Flood's generator: all 64 bits depend on all of `state`."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))

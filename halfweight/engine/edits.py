"""Changes to a row's scores before a token is chosen from them, in the order of their application.

Penalties come first, then logit_bias, then masks (end tokens before `min_new_tokens`, grammars): as
in transformers, where temperature, top_k, top_p and min_p follow. All is arithmetic with the score,
so a NaN stays one. History is read from the token table, so drafts, a preemption or a shared prefix
leave no counts to mend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfweight.engine.transfer import to_device


@dataclass(frozen=True)
class Penalties:
    """`repetition` as transformers defines it, over prompt and text; the others over the text."""

    repetition: float
    presence: float
    frequency: float

    @property
    def change_scores(self) -> bool:
        """Whether they do anything."""
        return self != Penalties(1.0, 0.0, 0.0)


@dataclass(frozen=True)
class Penalized:
    """A row to penalize for table[slot, :length]; the text begins at `num_prompt_tokens`."""

    row: int
    slot: int
    length: int
    num_prompt_tokens: int
    penalties: Penalties


def penalize(scores: Tensor, rows: list[Penalized], table: Tensor) -> None:
    """Change scores [R, V] in place.

    A token seen anywhere has its score divided by `repetition` if it is positive and multiplied
    if it is not; a token of the text then loses `presence`, and `frequency` for each time.
    """
    device = scores.device
    places = np.array([(r.row, r.slot, r.length, r.num_prompt_tokens) for r in rows]).T
    amounts = [(r.penalties.repetition, r.penalties.presence, r.penalties.frequency) for r in rows]
    row, slot, length, begin = to_device(places, device).unsqueeze(2)
    repetition, presence, frequency = to_device(np.array(amounts, np.float32).T, device).unsqueeze(
        2
    )
    history = table[slot.squeeze(1), : places[2].max()].long()
    at = torch.arange(history.shape[1], device=device)
    ids = torch.where(at < length, history, history[:, :1])  # behind a row's end is anything
    counts = _counts(ids, (at < length) & (at >= begin), scores.shape[1])
    found = scores[row, ids]
    found = torch.where(found > 0, found / repetition, found * repetition)
    scores[row, ids] = found - frequency * counts - presence * (counts > 0)


def _counts(ids: Tensor, counted: Tensor, vocab_size: int) -> Tensor:
    """How often each of ids [P, L] is among the counted of its row: float [P, L]."""
    counts = torch.zeros(len(ids), vocab_size, device=ids.device)
    return counts.scatter_add_(1, ids, counted.float()).gather(1, ids)


@dataclass(frozen=True)
class Additions:
    """What is added to the scores of some ids: a bias, or -inf. int64 and float32 arrays."""

    ids: NDArray[np.int64]
    values: NDArray[np.float32]


def additions_of(values: Mapping[int, float]) -> Additions | None:
    """None for no ids."""
    if not values:
        return None
    ids, added = np.array(list(values), np.int64), np.array(list(values.values()), np.float32)
    return Additions(ids, added)


def add(scores: Tensor, rows: list[tuple[int, Additions]]) -> None:
    """Add to scores [R, V] in place."""
    width = scores.shape[1]
    flat = np.concatenate([row * width + additions.ids for row, additions in rows])
    values = np.concatenate([additions.values for _, additions in rows])
    device = scores.device
    scores.view(-1).scatter_add_(0, to_device(flat, device), to_device(values, device))


def mask(scores: Tensor, rows: list[int], bits: NDArray[np.int32]) -> None:
    """Add -inf in place where a row's bit is 0: id i is bit i % 32 of bits[:, i // 32]."""
    device = scores.device
    where = to_device(np.array(rows, np.int64), device)
    words = to_device(bits, device).unsqueeze(2)
    allowed = (words >> torch.arange(32, dtype=torch.int32, device=device)) & 1
    allowed = allowed.flatten(1)[:, : scores.shape[1]]
    barred = torch.zeros_like(allowed, dtype=torch.float32).masked_fill_(allowed == 0, -torch.inf)
    scores[where] += barred

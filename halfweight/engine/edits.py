"""Changes to a row's scores before a token is chosen from them, in the order of their application.

Penalties come first, then logit_bias, then masks (end tokens before `min_new_tokens`, grammars): as
in transformers, where temperature, top_k, top_p and min_p follow. All is arithmetic with the score,
so a NaN stays one. History is read from the token table, so drafts, a preemption or a shared prefix
leave no counts to mend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfweight.engine.transfer import to_device

NO_PENALTIES = np.array([1, 0, 0], np.float32)
"""`repetition` as transformers defines it, over prompt and text; `presence` and `frequency` as
OpenAI does, over the text."""


Penalize = Callable[[Tensor, NDArray[np.int64], NDArray[np.float32], Tensor], None]


def penalizer(device: torch.device) -> Penalize:
    """`penalize`, or what does the same on a GPU in one launch."""
    if device.type != "cuda":
        return penalize
    from halfweight.kernels.triton.penalties import Penalizer

    kernel = Penalizer(device)

    def on_gpu(
        scores: Tensor,
        places: NDArray[np.int64],
        penalties: NDArray[np.float32],
        table: Tensor,
    ) -> None:
        packed = np.concatenate([places.T.astype(np.int32), penalties.view(np.int32)], axis=1)
        kernel(scores, to_device(packed, device), table)

    return on_gpu


def penalize(
    scores: Tensor, places: NDArray[np.int64], penalties: NDArray[np.float32], table: Tensor
) -> None:
    """Change some rows of scores [R, V] in place, by the tokens that stand before them.

    places [4, P]: row, slot, tokens before it and where the text begins among them; penalties
    [P, 3]. A token seen anywhere has its score divided by `repetition` if it is positive and
    multiplied if it is not; one of the text then loses `presence`, and `frequency` for each time.
    """
    device = scores.device
    row, slot, length, begin = to_device(places, device).unsqueeze(2)
    repetition, presence, frequency = to_device(penalties.T, device).unsqueeze(2)
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
    """What is added to the scores of some ids: a bias, or -inf."""

    ids: NDArray[np.int64]
    values: NDArray[np.float32]

    @classmethod
    def of(cls, values: Mapping[int, float]) -> Additions:
        """From a dictionary by id."""
        return cls(np.array(list(values), np.int64), np.array(list(values.values()), np.float32))


def add(scores: Tensor, rows: Sequence[int], additions: Sequence[Additions]) -> None:
    """Add to some rows of scores [R, V] in place; a row may come twice."""
    starts = np.array(rows, np.int64) * scores.shape[1]
    flat = np.concatenate([each.ids for each in additions])
    flat += np.repeat(starts, [len(each.ids) for each in additions])
    values = np.concatenate([each.values for each in additions])
    device = scores.device
    scores.view(-1).scatter_add_(0, to_device(flat, device), to_device(values, device))


def mask(scores: Tensor, rows: Sequence[int], bits: NDArray[np.int32]) -> None:
    """Add -inf in place where a row's bit is 0: id i is bit i % 32 of bits[:, i // 32]."""
    device = scores.device
    where = to_device(np.array(rows, np.int64), device)
    words = to_device(bits, device).unsqueeze(2)
    allowed = (words >> torch.arange(32, dtype=torch.int32, device=device)) & 1
    allowed = allowed.flatten(1)[:, : scores.shape[1]]
    barred = torch.zeros_like(allowed, dtype=torch.float32).masked_fill_(allowed == 0, -torch.inf)
    scores[where] += barred

"""Log probabilities of tokens and of the likeliest in their place.

They are the model's own: of the logits before penalties, bias, masks and temperature, as vLLM
gives them by default.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfweight.engine.request import TokenLogprob
from halfweight.engine.transfer import HostCopy, to_device


class Logprobs:
    """Those of one token for some rows of logits, on their way to the host."""

    @torch.inference_mode()
    def __init__(self, logits: Tensor, tokens: Tensor, num_top: NDArray[np.int64]) -> None:
        """Of tokens [R] (a NAN counts as id 0) and the likeliest of logits [R, V].

        `num_top` says for each row how many of the likeliest, or -1 if it wants nothing.
        """
        (wanted,) = (num_top >= 0).nonzero()
        if len(wanted) < len(logits):
            rows = to_device(wanted, logits.device)
            logits, tokens = logits[rows], tokens[rows]
        scores = logits.float()
        top = scores.topk(int(num_top.max()))
        chosen = scores.gather(1, tokens.clamp(min=0).long().unsqueeze(1))
        values = torch.cat([chosen, top.values], dim=1) - scores.logsumexp(dim=1, keepdim=True)
        self._wanted = list(zip(wanted.tolist(), num_top[wanted].tolist(), strict=True))
        self._copy = HostCopy(tokens, top.indices, values)

    def ready(self) -> bool:
        """Whether `wait` returns at once."""
        return self._copy.ready()

    def wait(self) -> dict[int, TokenLogprob]:
        """By row; the likeliest come first in `top`."""
        return self._found

    @cached_property
    def _found(self) -> dict[int, TokenLogprob]:
        tokens, ids, values = (array.tolist() for array in self._copy.wait())
        return {
            row: TokenLogprob(token, chosen, tuple(zip(top_ids, top, strict=True))[:count])
            for (row, count), token, top_ids, (chosen, *top) in zip(
                self._wanted, tokens, ids, values, strict=True
            )
        }

"""Log probabilities of tokens and of the likeliest in their place.

They are the model's own: of the logits before penalties, bias, masks and temperature, as vLLM
gives them by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from halfweight.engine.request import TokenLogprob
from halfweight.engine.transfer import HostCopy, to_device


class Logprobs:
    """Those of one token for some rows of logits, on their way to the host."""

    @torch.inference_mode()
    def __init__(self, logits: Tensor, tokens: Tensor, num_top: Mapping[int, int]) -> None:
        """Of tokens [R] (a NAN counts as id 0) and the likeliest of logits [R, V].

        `num_top` says, for each row that wants them, how many of the likeliest.
        """
        if len(num_top) < len(logits):
            rows = to_device(np.array(list(num_top)), logits.device)
            logits, tokens = logits[rows], tokens[rows]
        scores = logits.float()
        top = scores.topk(max(num_top.values()))
        chosen = scores.gather(1, tokens.clamp(min=0).long().unsqueeze(1))
        values = torch.cat([chosen, top.values], dim=1) - scores.logsumexp(dim=1, keepdim=True)
        self._num_top = num_top
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
                self._num_top.items(), tokens, ids, values, strict=True
            )
        }

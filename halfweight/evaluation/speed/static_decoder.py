"""The harness of the baselines: a batch of plain transformers, as quick as transformers allows.

Prompts are padded on the left to one length, the cache is transformers' StaticCache of exactly the
length needed, every decode step has the same shapes and nothing waits for the device between
tokens. A step is transformers' forward as it stands ("eager"), recorded once as a CUDA graph
("graph"), or compiled whole by torch first ("compiled"; the quickest, and slow to start). No kernel
of ours is in it: halfweight itself runs by its engine.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

Step = Literal["eager", "graph", "compiled"]

CHUNK_TOKENS = 2048
"""Tokens, of all prompts together, that go through the model at a time: bounds prefill's memory."""


class StaticDecoder:
    """One batch of sequences of at most `max_length` tokens, all in step.

    `prefill` reads the prompts, `advance` one token a sequence; both return logits [B, V] of the
    last token. A CUDA graph is recorded at the first `advance` and reused after `prefill` again.
    """

    def __init__(
        self, model: PreTrainedModel, batch_size: int, max_length: int, *, step: Step = "eager"
    ) -> None:
        """Allocates nothing yet; the cache comes with the first prompt."""
        self._model = model
        self._cache = StaticCache(model.config, max_cache_len=max_length)
        self._cache_name = cache_argument(model)
        where: dict[str, Any] = {"dtype": torch.long, "device": model.device}
        self._ids = torch.zeros(batch_size, 1, **where)
        self._positions = torch.zeros(batch_size, 1, **where)
        self._mask = torch.ones(batch_size, max_length, **where)
        self._step = _make_step(self._one_token, step)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Forget all, read prompts of any lengths; logits [B, V]."""
        self._cache.reset()
        ids, mask = _pad_left(prompts, self._ids.device)
        self._mask.fill_(1)
        self._mask[:, : ids.shape[1]] = mask
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        size = max(1, CHUNK_TOKENS // len(prompts))
        for begin in range(0, ids.shape[1], size):
            part = slice(begin, begin + size)
            logits = self._forward(ids[:, part], positions[:, part])
        self._positions.copy_(positions[:, -1:])
        return logits

    @torch.inference_mode()
    def advance(self, tokens: Tensor) -> Tensor:
        """Read the next token [B] of every sequence; logits [B, V], valid until the next call."""
        self._ids.copy_(tokens.unsqueeze(1))
        self._positions += 1
        logits: Tensor = self._step()
        return logits

    def _one_token(self) -> Tensor:
        return self._forward(self._ids, self._positions)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        out = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            **{self._cache_name: self._cache},
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = out.logits[:, -1].float()
        return logits


def cache_argument(model: PreTrainedModel) -> str:
    """What the model's forward calls its cache: transformers 5.24 renamed `past_key_values`."""
    names = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def _pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids and mask [B, T]: 1 where a prompt's token is, 0 for the padding before it."""
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _make_step(call: Any, step: Step) -> Any:
    if step == "compiled":
        return torch.compile(call, mode="reduce-overhead", fullgraph=True)
    return _Graph(call) if step == "graph" else call


class _Graph:
    """A call without arguments recorded as one CUDA graph; replays write into the same tensor.

    The first call runs eagerly (it allocates, compiles kernels and counts), the second is recorded
    and replayed, all later ones are replayed.
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self._graph: Any = None
        self._warm = False
        self._result: Tensor | None = None

    def __call__(self) -> Tensor:
        if not self._warm:
            self._warm = True
            found: Tensor = self._call()
            return found
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._result = self._call()
        self._graph.replay()
        assert self._result is not None
        return self._result

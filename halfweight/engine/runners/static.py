"""Models that do not page: each sequence with a state of the model's own, one after the other.

Mamba, RWKV, linear attention and their mixtures hold a state that no page can share or roll back;
BLOOM, MPT and older models attend by code of their own. For all of these a sequence is what
transformers makes of it: the prompt read in one forward, then token by token with the cache object
that the forward returned. Nothing of one sequence is in the same tensor as another's, so its logits
are those of the sequence alone.

Only two things are ever done, because they are right for every model: reading a text from its first
token, and one token more. So a prompt's inner chunks are put off until the chunk whose logits are
wanted, which reads all of it; and a chunk of several tokens onto a state reads the text anew. Where
even one token more goes wrong (the probe tells), each token reads the whole text.

A *page* here is a whole sequence of `max_context` tokens; its memory is the state's own, let go
when the page begins another sequence or is released.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfweight.engine.runners.attention_interface import EAGER, configs_of, using
from halfweight.engine.runners.probe import deviation, limit
from halfweight.engine.runners.rotary import boundaries
from halfweight.engine.step import Chunk, KvCache, Step
from halfweight.errors import UsageError

_CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state", "mems")
"""What forwards and their outputs call a cache, in various models and versions."""


@dataclass(frozen=True)
class Reading:
    """How a model's forward is called."""

    eager: bool = False
    """With transformers' eager attention instead of the model's own choice."""
    positions: bool = True
    """With position ids; else the model counts by its cache, as RoBERTa from its padding id."""
    from_start: bool = False
    """Without a cache: each token reads the whole text."""

    def __str__(self) -> str:
        cost = "each token from the start" if self.from_start else "with the model's own cache"
        return f"{cost}, eager attention" if self.eager else cost


READINGS = (
    Reading(),
    Reading(positions=False),
    Reading(eager=True),
    Reading(eager=True, positions=False),
    Reading(eager=True, positions=False, from_start=True),
)
"""Quickest first."""


@dataclass
class _Sequence:
    """What was read of one sequence, and the model's own memory of it."""

    num_tokens: int
    cache: Any


class StaticRunner:
    """A Runner (`engine/step.py`) for models that need a state of their own for each sequence."""

    cache_bytes = 0
    shares_prefixes = False
    most_drafts = 0  # a state cannot go back to before a draft
    """A state cannot go back; a chunk of several tokens is right but reads the whole text."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_sequences: int,
        max_context: int,
        cache_tokens: int | None = None,
        kv_cache: KvCache = "16bit",
    ) -> None:
        """As many sequences as fit into `cache_tokens`.

        Raises UsageError where no reading is right, and for an INT8 cache.
        """
        if kv_cache != "16bit":
            raise UsageError(
                f"{type(model).__name__} keeps a state of its own, which cannot be in {kv_cache}",
                hint="use --kv-cache 16bit",
            )
        if cache_tokens is not None:
            max_sequences = max(1, min(max_sequences, cache_tokens // max_context))
        self.device = model.device
        self.max_sequences, self.max_context = max_sequences, max_context
        self.page_tokens, self.num_pages = max_context, max_sequences + 1
        self.max_step_tokens = max_context + max_sequences
        rows = max_sequences + 1
        self.table = torch.zeros(rows, max_context + 1, dtype=torch.int32, device=self.device)
        self._model, self._configs = model, configs_of(model)
        self._arguments = inspect.signature(type(model).forward).parameters
        names = [name for name in _CACHE_NAMES if name in self._arguments]
        self._cache_name = names[0] if names else None
        self._boundaries = boundaries(model, max_context)
        self._sequences: dict[int, _Sequence] = {}
        self.vocab_size = 0
        self.reading = self._choose_reading()

    def run(self, step: Step) -> Tensor:
        """Logits [sum of num_logits, V] of the chunks, in their order."""
        with torch.inference_mode():
            found = [self._read(chunk) for chunk in step]
        wanted = [logits for logits in found if logits is not None]
        if not wanted:
            return torch.zeros(0, self.vocab_size, device=self.device)
        return wanted[0] if len(wanted) == 1 else torch.cat(wanted)

    @property
    def description(self) -> str:
        """How it reads, for the log."""
        return f"one sequence after the other, {self.reading}"

    def release(self, pages: Iterable[int]) -> None:
        """Let go of the states of these pages now, not when they begin another sequence."""
        for page in pages:
            self._sequences.pop(page, None)

    def close(self) -> None:
        """Let go of all states."""
        self._sequences.clear()

    def _read(self, chunk: Chunk) -> Tensor | None:
        page, end = chunk.pages[0], chunk.start + chunk.num_tokens
        known = self._sequences.get(page)
        if known is None or not self._continues(known, chunk):
            self._sequences.pop(page, None)
            if chunk.num_logits == 0:
                return None
            known = _Sequence(0, None)
        logits, cache = self._forward(chunk, known)
        if not self.reading.from_start:
            self._sequences[page] = _Sequence(end, cache)
        return logits if chunk.num_logits else None

    def _continues(self, known: _Sequence, chunk: Chunk) -> bool:
        """Whether the chunk is the one token that comes next, under the same rotary factors."""
        end = chunk.start + 1
        same = bisect_left(self._boundaries, end) == bisect_left(self._boundaries, chunk.start)
        return chunk.num_tokens == 1 and known.num_tokens == chunk.start > 0 and same

    def _forward(self, chunk: Chunk, known: _Sequence) -> tuple[Tensor, Any]:
        end, num = chunk.start + chunk.num_tokens, max(1, chunk.num_logits)
        ids = self.table[chunk.slot, known.num_tokens : end].long()[None]
        caches = self._cache_name is not None and not self.reading.from_start
        asked: dict[str, Any] = {"input_ids": ids, "use_cache": caches}
        if self.reading.positions and "position_ids" in self._arguments:
            asked["position_ids"] = torch.arange(known.num_tokens, end, device=self.device)[None]
        if "logits_to_keep" in self._arguments:
            asked["logits_to_keep"] = num
        if known.cache is not None:
            asked[str(self._cache_name)] = known.cache
        with using(self._configs if self.reading.eager else [], EAGER):
            out = self._model(**asked)
        cache = getattr(out, str(self._cache_name), None)
        logits: Tensor = out.logits
        self.vocab_size = logits.shape[-1]
        return logits[0, -num:], cache

    def _choose_reading(self) -> Reading:
        """The quickest reading that gives the model's logits."""
        problem, bound = "", limit(self._model.dtype, "16bit")
        for reading in READINGS:
            self.reading = reading
            try:
                found = deviation(self, self._model, bound)
            except Exception as error:  # whatever a forward raises that we do not know
                problem = f"{type(error).__name__}: {error}".partition("\n")[0]
                continue
            finally:
                self._sequences.clear()
            if found <= bound:
                return reading
            problem = f"logits are off by {found:.2g} of their spread"
        raise UsageError(
            f"{type(self._model).__name__} does not generate token by token here: {problem}",
            hint="another version of transformers may run this architecture",
        )

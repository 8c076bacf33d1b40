"""Logits to tokens on the device, each sequence by its own `Sampling`, without waiting for it.

`Sampler.sample` takes the logits of a step and the chunks they belong to. Rows that want their
scores changed (penalties, bias, masks) are changed in a copy (edits.py), then one pass chooses
every row's token and writes it to the token table (choice.py): a step of greedy or plainly drawn
rows is one upload, one launch and one copy back. What a slot asks for stays on the host; each row
carries seven numbers of it to the device.

A chunk with drafts has a row for each and one more. Every row is sampled as if its drafts were the
text, by its own position's noise, so the longest run of drafts that equal what was sampled is what
would have been sampled without them: the same tokens, greedy or drawn.

A grammar is the one thing that needs tokens on the host: the sampling of step n + 1 waits for the
tokens of step n, while the device computes the logits of n + 1.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfweight.engine import choice, edits
from halfweight.engine.grammar import GrammarCompiler, GrammarState
from halfweight.engine.logprobs import Logprobs
from halfweight.engine.request import Sampling, TokenLogprob
from halfweight.engine.step import Chunk
from halfweight.errors import UsageError

_SEED_MASK = (1 << 64) - 1


class Gained(NamedTuple):
    """What a chunk gained: its accepted drafts and the token after them."""

    tokens: list[int]
    """The last is `choice.NAN` if its row holds a NaN."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One a token, if they were asked for."""


class Sampled:
    """The tokens of a step on their way to the host."""

    def __init__(
        self, chosen: choice.Chosen, ends: NDArray[np.int64], logprobs: Logprobs | None
    ) -> None:
        """The rows of chunk i end at `ends[i]`."""
        self._chosen, self._ends, self._logprobs = chosen, ends, logprobs

    def ready(self) -> bool:
        """Whether `wait` returns at once."""
        on_host = self._chosen.on_host
        return on_host.ready() and (self._logprobs is None or self._logprobs.ready())

    def wait(self) -> list[Gained]:
        """What each chunk gained, in their order, once it is there."""
        return self._gained

    @cached_property
    def _gained(self) -> list[Gained]:
        tokens, agrees = self._chosen.on_host.wait().T.tolist()
        if self._logprobs is None and len(tokens) == len(self._ends):
            return [Gained([token]) for token in tokens]
        logprobs = {} if self._logprobs is None else self._logprobs.wait()
        ends = [0, *self._ends.tolist()]
        return [_gained(begin, end, tokens, agrees, logprobs) for begin, end in pairwise(ends)]


def _gained(
    begin: int,
    end: int,
    tokens: list[int],
    agrees: list[int],
    logprobs: Mapping[int, TokenLogprob],
) -> Gained:
    """Of rows begin to end: up to the first that is not its draft; the last has none."""
    stop = begin + 1
    while stop < end and agrees[stop - 1]:
        stop += 1
    found = tuple(logprobs[row] for row in range(begin, stop)) if begin in logprobs else ()
    return Gained(tokens[begin:stop], found)


@dataclass
class _Constraint:
    """A slot's grammar, and what it has not seen: what this chunk of these gained."""

    state: GrammarState
    unread: tuple[Sampled, int] | None = None

    def allowed(self, num_rows: int, num_words: int, drafts: Sequence[int]) -> NDArray[np.int32]:
        """Bits of the ids that may come next; waits for the tokens of the last step."""
        if self.unread is not None:
            sampled, i = self.unread
            self.state.advance(sampled.wait()[i].tokens)
        bits = np.empty((num_rows, num_words), np.int32)
        self.state.fill(bits, drafts)
        return bits


@dataclass(frozen=True)
class _Step:
    """The rows of a step: chunk i has those that end at ends[i]; slots and lengths are a row's."""

    chunks: Sequence[Chunk]
    ends: NDArray[np.int64]
    slots: NDArray[np.int64]
    lengths: NDArray[np.int64]
    """Tokens of the sequence before the one that the row predicts."""

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> _Step:
        places = [
            (chunk.slot, chunk.start + chunk.num_tokens, chunk.num_logits) for chunk in chunks
        ]
        slots, stops, counts = np.array(places, np.int64).T
        ends = counts.cumsum()
        lengths = np.repeat(stops - ends, counts) + np.arange(1, ends[-1] + 1)
        return cls(chunks, ends, np.repeat(slots, counts), lengths)

    def rows_of(self, i: int) -> range:
        """Those of chunk i."""
        end = int(self.ends[i])
        return range(end - self.chunks[i].num_logits, end)


class Sampler:
    """Chooses tokens for the slots of a token table. Belongs to one thread, but for `check`."""

    def __init__(
        self, table: Tensor, vocab_size: int, *, grammars: GrammarCompiler | None = None
    ) -> None:
        """`table` is the runner's; `grammars` compiles for its model's tokenizer."""
        self._table, self._vocab_size, self._grammars = table, vocab_size, grammars
        self._choose = choice.chooser(table.device)
        self._penalize = edits.penalizer(table.device)
        num_slots = len(table)
        self._numbers = np.zeros((num_slots, choice.NUM_COLUMNS), np.int32)
        self._seeds = np.zeros(num_slots, np.uint64)
        self._is_plain = np.ones(num_slots, np.bool_)
        self._text_starts = np.zeros(num_slots, np.int64)
        self._penalties = np.tile(edits.NO_PENALTIES, (num_slots, 1))
        self._num_logprobs = np.full(num_slots, -1, np.int64)
        self._biases: dict[int, edits.Additions] = {}
        self._held: dict[int, tuple[int, edits.Additions]] = {}
        self._constraints: dict[int, _Constraint] = {}

    def check(self, sampling: Sampling) -> None:
        """Raise UsageError for what `set` would refuse; compiles the grammar, on any thread."""
        for token in sampling.logit_bias:
            if not 0 <= token < self._vocab_size:
                raise UsageError(
                    f"logit_bias has token id {token}, expected 0 to {self._vocab_size - 1}",
                    hint="use ids of this model's tokenizer",
                )
        if (sampling.num_logprobs or 0) > self._vocab_size:
            raise UsageError(
                f"{sampling.num_logprobs} logprobs of {self._vocab_size} tokens",
                hint="ask for less",
            )
        if sampling.grammar is not None:
            self._compiler().start(sampling.grammar)

    def set(
        self,
        slot: int,
        sampling: Sampling,
        prompt: Sequence[int],
        *,
        generated: Sequence[int] = (),
        stop_tokens: Collection[int] = (),
    ) -> None:
        """Give a slot to a sequence: its prompt, and its text so far if it was preempted.

        Penalties read the tokens themselves from the table. `stop_tokens` are masked until the text
        has `min_new_tokens`. `sampling` is one that `check` takes.
        """
        self._set_numbers(slot, sampling)
        self._text_starts[slot] = len(prompt)
        self._penalties[slot] = (
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
        )
        wanted = sampling.num_logprobs
        self._num_logprobs[slot] = -1 if wanted is None else wanted
        for by_slot in (self._biases, self._held, self._constraints):
            by_slot.pop(slot, None)
        if sampling.logit_bias:
            self._biases[slot] = edits.Additions.of(sampling.logit_bias)
        if sampling.min_new_tokens > 0 and stop_tokens:
            held = edits.Additions.of(dict.fromkeys(stop_tokens, -np.inf))
            self._held[slot] = len(prompt) + sampling.min_new_tokens, held
        if sampling.grammar is not None:
            state = self._compiler().start(sampling.grammar)
            state.advance(generated)
            self._constraints[slot] = _Constraint(state)
        self._is_plain[slot] = wanted is None and not self._is_edited(slot)

    def _set_numbers(self, slot: int, sampling: Sampling) -> None:
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        self._seeds[slot] = int(seed) & _SEED_MASK
        numbers, floats = self._numbers[slot], self._numbers.view(np.float32)[slot]
        numbers[choice.SLOT] = slot
        numbers[choice.TOP_K] = min(sampling.top_k, self._vocab_size)
        floats[choice.TEMPERATURE] = sampling.temperature
        floats[choice.TOP_P] = sampling.top_p
        floats[choice.MIN_P] = sampling.min_p

    def _is_edited(self, slot: int) -> bool:
        by_slot = (self._biases, self._held, self._constraints)
        has_penalties = bool((self._penalties[slot] != edits.NO_PENALTIES).any())
        return has_penalties or any(slot in found for found in by_slot)

    def sample(
        self,
        logits: Tensor,
        chunks: Sequence[Chunk],
        drafts: Mapping[int, Sequence[int]] | None = None,
    ) -> Sampled:
        """Choose a token for every row of logits [R, V] and write it to the table.

        `chunks` are those with logits, in the order of the rows. `drafts` are the drafted tokens by
        slot: only slots with a grammar need them here, all have them in the table. Returns at once,
        unless a grammar awaits the last tokens of its slot.
        """
        step = _Step.of(chunks)
        is_plain = bool(self._is_plain[step.slots].all())
        scores = logits if is_plain else self._edited(logits, step, drafts or {})
        chosen = self._choose(scores, self._rows(step), self._table)
        logprobs = None if is_plain else self._logprobs(logits, chosen.on_device[:, 0], step)
        sampled = Sampled(chosen, step.ends, logprobs)
        for i in self._constrained(step):
            self._constraints[chunks[i].slot].unread = (sampled, i)
        return sampled

    def _rows(self, step: _Step) -> choice.Rows:
        """What a `choice.Choose` wants of each row."""
        rows: choice.Rows = self._numbers[step.slots]
        rows[:, choice.POSITION] = step.lengths - 1
        floats = rows.view(np.float32)
        if floats[:, choice.TEMPERATURE].any():
            floats[:, choice.UNIFORM] = choice.uniforms(self._seeds[step.slots], step.lengths)
        return rows

    @torch.inference_mode()
    def _edited(self, logits: Tensor, step: _Step, drafts: Mapping[int, Sequence[int]]) -> Tensor:
        """The scores as float32, changed as their rows ask."""
        scores = logits.to(torch.float32, copy=True)
        penalties = self._penalties[step.slots]
        (rows,) = (penalties != edits.NO_PENALTIES).any(axis=1).nonzero()
        if len(rows):
            slots = step.slots[rows]
            places = np.stack([rows, slots, step.lengths[rows], self._text_starts[slots]])
            self._penalize(scores, places, penalties[rows], self._table)
        additions = self._additions(step)
        if additions:
            edits.add(scores, *zip(*additions, strict=True))
        constrained = self._constrained(step)
        if constrained:
            edits.mask(scores, *self._masks(step, constrained, drafts))
        return scores

    def _additions(self, step: _Step) -> list[tuple[int, edits.Additions]]:
        """(row, what is added to it); a row may come twice."""
        if not (self._biases or self._held):
            return []
        found = []
        for row, (slot, length) in enumerate(zip(step.slots, step.lengths, strict=True)):
            if slot in self._biases:
                found.append((row, self._biases[slot]))
            until, held = self._held.get(slot, (0, None))
            if held is not None and length < until:
                found.append((row, held))
        return found

    def _constrained(self, step: _Step) -> list[int]:
        """Chunks whose slots have a grammar."""
        if not self._constraints:
            return []
        return [i for i, chunk in enumerate(step.chunks) if chunk.slot in self._constraints]

    def _masks(
        self, step: _Step, constrained: Sequence[int], drafts: Mapping[int, Sequence[int]]
    ) -> tuple[list[int], NDArray[np.int32]]:
        """Rows, and the bits of the ids that they may take."""
        num_words = -(-self._vocab_size // 32)
        rows: list[int] = []
        bits = []
        for i in constrained:
            slot = step.chunks[i].slot
            span = step.rows_of(i)
            rows += span
            bits.append(self._constraints[slot].allowed(len(span), num_words, drafts.get(slot, ())))
        return rows, np.concatenate(bits)

    def _logprobs(self, logits: Tensor, tokens: Tensor, step: _Step) -> Logprobs | None:
        num_top = self._num_logprobs[step.slots]
        return Logprobs(logits, tokens, num_top) if num_top.max() >= 0 else None

    def _compiler(self) -> GrammarCompiler:
        if self._grammars is None:
            raise UsageError(
                "structured output needs the model's tokenizer, and this model has none",
                hint="add the tokenizer's files to the model's folder",
            )
        return self._grammars

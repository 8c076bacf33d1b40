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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfweight.engine import choice, edits
from halfweight.engine.grammar import GrammarCompiler, GrammarState
from halfweight.engine.logprobs import Logprobs
from halfweight.engine.request import Sampling, TokenLogprob
from halfweight.engine.step import Chunk
from halfweight.engine.transfer import HostCopy
from halfweight.errors import UsageError

_SEED_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Choices:
    """The tokens of a step, on the host."""

    tokens: NDArray[np.int32]
    """One a row of the logits; `choice.NAN` for a row with a NaN."""
    gained: list[NDArray[np.int32]]
    """Of each chunk, its accepted drafts and the token after them."""
    logprobs: dict[int, TokenLogprob]
    """By row, where they were asked for."""


class Sampled:
    """The tokens of a step on their way to the host."""

    def __init__(self, result: Tensor, ends: NDArray[np.int64], logprobs: Logprobs | None) -> None:
        """`result` is `choice.choose`'s; the rows of chunk i end at `ends[i]`."""
        self.tokens = result[:, 0]
        """int32 [R] on the device."""
        self._ends, self._logprobs = ends, logprobs
        self._copy = HostCopy(result)

    def ready(self) -> bool:
        """Whether `wait` returns at once."""
        return self._copy.ready() and (self._logprobs is None or self._logprobs.ready())

    def wait(self) -> Choices:
        """The tokens, once they are there."""
        return self._choices

    @cached_property
    def _choices(self) -> Choices:
        (result,) = self._copy.wait()
        tokens, agrees = result.T
        gained = [
            tokens[begin : begin + 1 + _num_leading(agrees[begin : end - 1])]
            for begin, end in zip([0, *self._ends[:-1]], self._ends, strict=True)
        ]
        return Choices(tokens, gained, {} if self._logprobs is None else self._logprobs.wait())


def _num_leading(flags: NDArray[np.int32]) -> int:
    """How many are set before the first that is not."""
    return int(np.append(flags, 0).argmin()) if len(flags) else 0


@dataclass
class _Wishes:
    """What a slot asks for beyond temperature, top_k, top_p and min_p."""

    num_prompt_tokens: int
    penalties: edits.Penalties
    bias: edits.Additions | None
    held: edits.Additions | None
    """-inf for the stop tokens, while there are fewer than `min_new_tokens`."""
    min_new_tokens: int
    num_logprobs: int | None
    grammar: GrammarState | None
    unread: tuple[Sampled, int] | None = None
    """What the grammar has not seen: what this chunk of these gained."""

    @property
    def are_none(self) -> bool:
        rest = (self.bias, self.held, self.num_logprobs, self.grammar)
        return not self.penalties.change_scores and all(value is None for value in rest)


@dataclass(frozen=True)
class _Asking:
    """A chunk of a slot with wishes, and the rows that it has."""

    index: int
    chunk: Chunk
    rows: range
    wishes: _Wishes

    @property
    def lengths(self) -> range:
        """Tokens of the sequence before what each row predicts."""
        stop = self.chunk.start + self.chunk.num_tokens + 1
        return range(stop - len(self.rows), stop)


@dataclass
class _Edits:
    """All that is to be changed in the scores of a step."""

    penalized: list[edits.Penalized] = field(default_factory=list)
    additions: list[tuple[int, edits.Additions]] = field(default_factory=list)
    masked: list[int] = field(default_factory=list)
    bits: list[NDArray[np.int32]] = field(default_factory=list)

    def collect(self, asking: _Asking) -> None:
        """Add what a chunk asks for, but its grammar's mask."""
        slot, wishes, num_prompt = asking.chunk.slot, asking.wishes, asking.wishes.num_prompt_tokens
        for row, length in zip(asking.rows, asking.lengths, strict=True):
            if wishes.penalties.change_scores:
                penalized = edits.Penalized(row, slot, length, num_prompt, wishes.penalties)
                self.penalized.append(penalized)
            if wishes.bias is not None:
                self.additions.append((row, wishes.bias))
            if wishes.held is not None and length - num_prompt < wishes.min_new_tokens:
                self.additions.append((row, wishes.held))

    def apply(self, logits: Tensor, table: Tensor) -> Tensor:
        """The changed scores as float32, or the logits themselves."""
        if not (self.penalized or self.additions or self.masked):
            return logits
        scores = logits.to(torch.float32, copy=True)
        if self.penalized:
            edits.penalize(scores, self.penalized, table)
        if self.additions:
            edits.add(scores, self.additions)
        if self.masked:
            edits.mask(scores, self.masked, np.concatenate(self.bits))
        return scores


class Sampler:
    """Chooses tokens for the slots of a token table. Belongs to one thread, but for `check`."""

    def __init__(
        self, table: Tensor, vocab_size: int, *, grammars: GrammarCompiler | None = None
    ) -> None:
        """`table` is the runner's; `grammars` compiles for its model's tokenizer."""
        self._table, self._vocab_size, self._grammars = table, vocab_size, grammars
        self._numbers = np.zeros((len(table), choice.NUM_COLUMNS), np.int32)
        self._seeds = np.zeros(len(table), np.uint64)
        self._wishes: dict[int, _Wishes] = {}

    def check(self, sampling: Sampling) -> None:
        """Raise UsageError for what `set` would refuse; compiles the grammar, on any thread."""
        for token in sampling.logit_bias:
            if not 0 <= token < self._vocab_size:
                raise UsageError(
                    f"logit_bias has token id {token}, expected 0 to {self._vocab_size - 1}",
                    hint="use ids of this model's tokenizer",
                )
        if sampling.num_logprobs is not None and sampling.num_logprobs > self._vocab_size:
            raise UsageError(
                f"{sampling.num_logprobs} logprobs of {self._vocab_size} tokens",
                hint="ask for less",
            )
        self._start(sampling)

    def set(
        self,
        slot: int,
        sampling: Sampling,
        prompt: Sequence[int],
        *,
        generated: Sequence[int] = (),
        stop_tokens: Sequence[int] = (),
    ) -> None:
        """Give a slot to a sequence: its prompt, and its text so far if it was preempted.

        Penalties read the tokens themselves from the table. `stop_tokens` are masked until the text
        has `min_new_tokens`. Raises UsageError as `check` does.
        """
        self.check(sampling)
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        self._seeds[slot] = seed & _SEED_MASK
        numbers, floats = self._numbers[slot], self._numbers.view(np.float32)[slot]
        numbers[choice.SLOT] = slot
        numbers[choice.TOP_K] = min(sampling.top_k, self._vocab_size)
        floats[choice.TEMPERATURE] = sampling.temperature
        floats[choice.TOP_P] = sampling.top_p
        floats[choice.MIN_P] = sampling.min_p
        self._wishes.pop(slot, None)
        wishes = self._wishes_of(sampling, len(prompt), stop_tokens)
        if wishes.grammar is not None:
            wishes.grammar.advance(generated)
        if not wishes.are_none:
            self._wishes[slot] = wishes

    @torch.inference_mode()
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
        ends = np.cumsum([chunk.num_logits for chunk in chunks])
        asking = self._asking(chunks, ends) if self._wishes else []
        changes = _Edits()
        for each in asking:
            changes.collect(each)
            if each.wishes.grammar is not None:
                changes.masked += each.rows
                changes.bits.append(self._allowed(each, (drafts or {}).get(each.chunk.slot, ())))
        rows = self._rows(chunks, ends)
        result = choice.choose(changes.apply(logits, self._table), rows, self._table)
        sampled = Sampled(result, ends, _logprobs(logits, result, asking))
        for each in asking:
            each.wishes.unread = (sampled, each.index)
        return sampled

    def _asking(self, chunks: Sequence[Chunk], ends: NDArray[np.int64]) -> list[_Asking]:
        return [
            _Asking(i, chunk, range(int(end) - chunk.num_logits, int(end)), wishes)
            for i, (chunk, end) in enumerate(zip(chunks, ends, strict=True))
            if (wishes := self._wishes.get(chunk.slot)) is not None
        ]

    def _rows(self, chunks: Sequence[Chunk], ends: NDArray[np.int64]) -> choice.Rows:
        """What `choice.choose` wants of each row."""
        places = [
            (chunk.slot, chunk.start + chunk.num_tokens, chunk.num_logits) for chunk in chunks
        ]
        slots, stops, counts = np.array(places, np.int64).T
        slots = np.repeat(slots, counts)
        rows: choice.Rows = self._numbers[slots]
        positions = np.repeat(stops - ends, counts) + np.arange(len(rows))
        rows[:, choice.POSITION] = positions
        floats = rows.view(np.float32)
        if floats[:, choice.TEMPERATURE].any():
            floats[:, choice.UNIFORM] = choice.uniforms(self._seeds[slots], positions + 1)
        return rows

    def _allowed(self, asking: _Asking, drafts: Sequence[int]) -> NDArray[np.int32]:
        """Bits of the ids that a grammar allows, once it has seen the tokens of the last step."""
        grammar = asking.wishes.grammar
        assert grammar is not None
        if asking.wishes.unread is not None:
            sampled, i = asking.wishes.unread
            grammar.advance(sampled.wait().gained[i].tolist())
        bits = np.empty((len(asking.rows), -(-self._vocab_size // 32)), np.int32)
        grammar.fill(bits, drafts)
        return bits

    def _start(self, sampling: Sampling) -> GrammarState | None:
        if sampling.grammar is None:
            return None
        if self._grammars is None:
            raise UsageError(
                "structured output needs the model's tokenizer, and this model has none",
                hint="add the tokenizer's files to the model's folder",
            )
        return self._grammars.start(sampling.grammar)

    def _wishes_of(
        self, sampling: Sampling, num_prompt_tokens: int, stop_tokens: Sequence[int]
    ) -> _Wishes:
        held = dict.fromkeys(stop_tokens, -np.inf) if sampling.min_new_tokens > 0 else {}
        return _Wishes(
            num_prompt_tokens,
            edits.Penalties(
                sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
            ),
            edits.additions_of(sampling.logit_bias),
            edits.additions_of(held),
            sampling.min_new_tokens,
            sampling.num_logprobs,
            self._start(sampling),
        )


def _logprobs(logits: Tensor, result: Tensor, asking: Sequence[_Asking]) -> Logprobs | None:
    num_top = {
        row: each.wishes.num_logprobs
        for each in asking
        if each.wishes.num_logprobs is not None
        for row in each.rows
    }
    return Logprobs(logits, result[:, 0], num_top) if num_top else None

"""A model and a sampler on the host, for tests of what is between: wrong pages give wrong tokens.

The next token is a hash of all tokens before it, which the runner reads through the pages it is
given. `alone` says what any request must get, whatever runs beside it.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from zlib import crc32

import numpy as np
import torch

from halfweight.engine.request import TokenLogprob

VOCAB = 40
STOP = 0
POISON = 39
"""A token after which all logits are NaN."""


def next_token(tokens):
    """What the model says after `tokens`; None is NaN."""
    if POISON in tokens:
        return None
    return crc32(np.array(tokens, dtype=np.int32).tobytes()) % (VOCAB - 1)


def drawn(token, seed, place):
    """What a sampler with this seed makes of the likeliest token."""
    return (token + crc32(f"{seed},{place}".encode())) % (VOCAB - 1)


def alone(request, stops=frozenset({STOP})):
    """Tokens and finish reason of a request by itself."""
    stops = stops if request.stop_tokens is None else request.stop_tokens
    tokens = list(request.prompt)
    while len(tokens) < len(request.prompt) + request.max_new_tokens:
        token = next_token(tokens)
        if token is None:
            return tokens[len(request.prompt) :], "nan"
        if request.sampling.temperature:
            token = drawn(token, request.sampling.seed, len(tokens))
        if token in stops:
            return tokens[len(request.prompt) :], "stop"
        tokens.append(token)
    return tokens[len(request.prompt) :], "length"


class FakeRunner:
    """Pages of token ids; a chunk sees pages as they were before the step, and its own tokens."""

    def __init__(
        self,
        *,
        page_tokens=4,
        num_pages=32,
        max_sequences=4,
        max_context=64,
        max_step_tokens=16,
        shares_prefixes=True,
    ):
        self.page_tokens, self.num_pages = page_tokens, num_pages
        self.max_sequences, self.max_context = max_sequences, max_context
        self.max_step_tokens, self.shares_prefixes = max_step_tokens, shares_prefixes
        self.most_drafts = 16
        self.vocab_size = VOCAB
        self.device = torch.device("cpu")
        self.table = torch.zeros(max_sequences + 1, max_context + 1, dtype=torch.int32)
        self.held = np.full((num_pages, page_tokens), -7)
        self.steps = []
        self.before_step = lambda count: None

    def run(self, step):
        self.before_step(len(self.steps))
        self.steps.append([(c.start, c.num_tokens, c.num_logits) for c in step])
        self._check(step)
        before, written = self.held.copy(), set()
        rows = []
        for chunk in step:
            end = chunk.start + chunk.num_tokens
            view = before.copy()
            for place in range(chunk.start, end):
                at = chunk.pages[place // self.page_tokens], place % self.page_tokens
                assert at not in written, "two sequences write one place"
                written.add(at)
                view[at] = self.held[at] = int(self.table[chunk.slot, place])
            read = [
                view[chunk.pages[p // self.page_tokens], p % self.page_tokens] for p in range(end)
            ]
            rows += [
                _logits(read[: end - chunk.num_logits + 1 + i]) for i in range(chunk.num_logits)
            ]
        return torch.stack(rows) if rows else torch.zeros(0, VOCAB)

    def _check(self, step):
        assert step
        assert len({chunk.slot for chunk in step}) == len(step)
        assert sum(chunk.num_tokens for chunk in step) <= self.max_step_tokens
        kinds = [chunk.num_tokens > 1 for chunk in step]
        assert kinds == sorted(kinds)
        for chunk in step:
            assert chunk.num_tokens >= 1
            assert chunk.num_tokens > 1 or chunk.num_logits == 1
            assert 0 <= chunk.num_logits <= chunk.num_tokens
            assert 0 <= chunk.slot < self.max_sequences
            used = chunk.pages[: -(-(chunk.start + chunk.num_tokens) // self.page_tokens)]
            assert len(used) * self.page_tokens >= chunk.start + chunk.num_tokens
            assert all(0 < page < self.num_pages for page in used)

    def close(self):
        pass


def _logits(tokens):
    token = next_token(tokens)
    row = torch.full((VOCAB,), torch.nan if token is None else 0.0)
    if token is not None:
        row[token] = 5.0
    return row


@dataclass
class _Sampled:
    gained: list

    def wait(self):
        return self.gained


class FakeSampler:
    """The likeliest token, moved by seed and place where there is a temperature."""

    def __init__(self, table):
        self._table = table
        self._set = {}
        self.num_checked = 0

    def check(self, sampling):
        self.num_checked += 1

    def set(self, slot, sampling, prompt, *, generated=(), stop_tokens=()):
        assert self._table[slot, : len(prompt) + len(generated)].tolist() == [*prompt, *generated]
        self._set[slot] = sampling

    def sample(self, logits, chunks, drafts):
        assert len(logits) == sum(chunk.num_logits for chunk in chunks)
        rows = iter(logits)
        return _Sampled([self._gained(chunk, rows, drafts) for chunk in chunks])

    def _gained(self, chunk, rows, drafts):
        sampling, tokens, logprobs = self._set[chunk.slot], [], []
        places = range(
            chunk.start + chunk.num_tokens - chunk.num_logits + 1,
            chunk.start + chunk.num_tokens + 1,
        )
        agrees = True
        for place, row in zip(places, rows, strict=False):
            token = -1 if row.isnan().any() else int(row.argmax())
            if token >= 0 and sampling.temperature:
                token = drawn(token, sampling.seed, place)
            draft = int(self._table[chunk.slot, place])
            if place < places[-1]:
                assert draft == drafts[chunk.slot][place - places[0]]
            self._table[chunk.slot, place] = max(token, 0)
            if agrees:
                tokens.append(token)
                logprobs.append(TokenLogprob(token, float(-place)))
            agrees = agrees and token == draft
        wanted = sampling.num_logprobs is not None
        return SimpleNamespace(tokens=tokens, logprobs=tuple(logprobs) if wanted else ())

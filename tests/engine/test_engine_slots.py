"""A slot that goes from one request to the next leaves nothing of the first to the second.

A step's sampler settings are given to slots after the step was launched, and prompts are written
over what stood in a row of the token table: both are the next request's before its first token.
"""

import threading
from zlib import crc32

import fake_model
import numpy as np
import pytest
import torch
from byte_tokenizer import EOS, make_tokenizer
from fake_model import FakeRunner

from halfweight.engine.grammar import Grammar, GrammarCompiler
from halfweight.engine.loop import Loop
from halfweight.engine.request import Request, Sampling
from halfweight.engine.sampler import Sampler

VOCAB = 320
SECONDS = 30
STOP = 7
A, B = make_tokenizer()("ab")["input_ids"]
LONG, SHORT = tuple(range(1, 45)), (9, 8)
SETTINGS = [
    Sampling(temperature=1.5, seed=5),
    Sampling(),
    Sampling(repetition_penalty=1.9, presence_penalty=1.5, frequency_penalty=1.0),
    Sampling(temperature=0.9, seed=6, top_k=3, top_p=0.7),
    Sampling(logit_bias={11: 100.0}, num_logprobs=2),
    Sampling(temperature=1.5, seed=5),
    Sampling(grammar=Grammar.regex("[ab]{5,20}")),
    Sampling(temperature=2.0, seed=6),
    Sampling(logit_bias={STOP: 100.0}, min_new_tokens=4),
    Sampling(),
]
"""Neighbours that differ in all that a slot holds."""
REQUESTS = [
    Request(
        (LONG if i % 2 == 0 else SHORT) + (i,),
        6 + i % 3,
        sampling,
        stop_tokens=frozenset({STOP}) if sampling.min_new_tokens else frozenset(),
    )
    for i, sampling in enumerate(SETTINGS)
]


def logits_after(tokens):
    """Scores without a pattern, that hang on every token before them."""
    rng = np.random.default_rng(crc32(np.array(tokens, np.int32).tobytes()))
    return torch.from_numpy(rng.standard_normal(VOCAB, np.float32))


@pytest.fixture
def answers(monkeypatch):
    """What requests get that are submitted together, each with the ids in its logprobs."""
    monkeypatch.setattr(fake_model, "_logits", logits_after)
    grammars = GrammarCompiler(make_tokenizer(), VOCAB, [EOS])

    def run(requests, *, overlaps, **limits):
        runner = FakeRunner(**limits)
        runner.vocab_size = VOCAB
        sampler = Sampler(runner.table, VOCAB, grammars=grammars)
        loop = Loop(runner, sampler, overlaps=overlaps)
        clients = [Client() for _ in requests]
        for request, client in zip(requests, clients, strict=True):
            loop.submit(request, client)
        loop.start()
        try:
            return [client.answer() for client in clients]
        finally:
            loop.stop()

    return run


class Client:
    """Collects what one request is told."""

    def __init__(self):
        self.outputs, self.ended = [], threading.Event()

    def __call__(self, output):
        self.outputs.append(output)
        if output.finish_reason is not None or output.error is not None:
            self.ended.set()

    def answer(self):
        assert self.ended.wait(SECONDS)
        assert self.outputs[-1].error is None
        tokens = [token for output in self.outputs for token in output.tokens]
        logprobs = [entry.token for output in self.outputs for entry in output.logprobs]
        return tokens, logprobs, self.outputs[-1].finish_reason


@pytest.mark.parametrize("overlaps", [False, True], ids=["in_turn", "ahead"])
@pytest.mark.parametrize(("slots", "pages"), [(1, 32), (2, 64), (3, 17)])
def test_a_slot_is_its_next_owners_alone(answers, slots, pages, overlaps):
    """With 17 pages some give theirs up, and come again in a slot that others had meanwhile."""
    expected = [answers([request], overlaps=False)[0] for request in REQUESTS]
    assert len({tuple(tokens) for tokens, _, _ in expected}) == len(REQUESTS)
    assert set(expected[6][0]) == {A, B}
    limits = {"max_sequences": slots, "num_pages": pages, "max_step_tokens": 16}
    assert answers(REQUESTS, overlaps=overlaps, **limits) == expected

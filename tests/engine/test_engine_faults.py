"""Faults: none of one request's may reach another, and none may leave anybody waiting."""

import asyncio
import gc
import logging
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from byte_tokenizer import EOS, make_tokenizer
from fake_model import VOCAB, FakeRunner, FakeSampler
from tiny import small_llama

from halfweight.engine import loop, streams
from halfweight.engine.engine import Engine
from halfweight.engine.grammar import Grammar
from halfweight.engine.loop import EngineStoppedError, NanLogitsError
from halfweight.engine.parallel.faults import RankError
from halfweight.engine.request import Request, Sampling
from halfweight.errors import UsageError

SECONDS = 20
NAN, INF = float("nan"), float("inf")


def make_model():
    special = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS}
    return small_llama(max_position_embeddings=256, **special)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def engine(model):
    with Engine(model, tokenizer=make_tokenizer(), cache_tokens=1024, max_sequences=4) as engine:
        yield engine


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": NAN}, "temperature is nan, expected a number of at least 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": 1e300, "logit_bias": {0: -INF}}, "temperature is 1e+300"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"temperature": None}, "temperature is None"),
        ({"top_k": -3}, "top_k is -3"),
        ({"top_k": 2.5}, "top_k is 2.5, expected a whole number"),
        ({"top_p": 1.5}, "top_p is 1.5, expected a number from 0 to 1"),
        ({"min_p": 2.0, "temperature": 1.0}, "min_p is 2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, expected a number above 0"),
        ({"presence_penalty": INF}, "presence_penalty is inf"),
        ({"frequency_penalty": NAN}, "frequency_penalty is nan"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": "abc"}, "seed is 'abc'"),
        ({"num_logprobs": -1}, "num_logprobs is -1"),
        ({"num_logprobs": 321}, "321 logprobs of 320 tokens"),
        ({"prompt_logprobs": 321}, "prompt_logprobs is 321, expected 0 to 320"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1"),
        ({"logit_bias": {5: INF}}, "logit_bias of token 5 is inf"),
        ({"logit_bias": {5: NAN}}, "logit_bias of token 5 is nan"),
        ({"logit_bias": {400: 1.0}}, "logit_bias has token id 400, expected 0 to 319"),
        ({"stop_tokens": [400], "min_new_tokens": 3}, "stop_tokens have token id 400"),
        ({"stop_tokens": [-1], "min_new_tokens": 3}, "stop_tokens have token id -1"),
        ({"stop_tokens": [10**30], "min_new_tokens": 3}, "stop_tokens have token id 10000"),
        ({"grammar": Grammar.regex(r"[^\x00-\u{10FFFF}]")}, "regex: no text matches it"),
        ({"grammar": Grammar.ebnf("root ::= root")}, "ebnf: no text matches it"),
    ],
)
def test_what_could_fail_a_step_is_refused_before_one(engine, options, message):
    """Each of these reached the engine's thread once, and ended it for everybody."""
    with pytest.raises(UsageError) as error:
        engine.generate("hello", max_new_tokens=4, **options)
    assert error.value.message.startswith(message)
    assert engine.fault is None


@pytest.mark.parametrize(
    "options",
    [
        {"seed": np.int64(-3), "temperature": 1.0},
        {"seed": 2**80, "temperature": np.float32(0.7)},
        {"top_k": np.int32(2**30), "temperature": 1.0},
        {"top_p": 0, "temperature": 1.0},
        {"min_p": 1, "temperature": 1.0},
        {"temperature": 1e-45},
        {"temperature": 1e38, "logit_bias": {0: -INF, 1: -1e30}},
        {"repetition_penalty": 1e-30, "temperature": 1.0},
        {"min_new_tokens": 10**30},
        {"stop_tokens": [319], "min_new_tokens": 3},
        {"num_logprobs": 320, "prompt_logprobs": 320},
    ],
)
def test_odd_values_that_are_right_run(engine, options):
    answer = engine.generate("hello", max_new_tokens=4, **options)
    assert (answer.finish_reason, len(answer.tokens)) == ("length", 4)


@pytest.mark.parametrize(
    ("options", "num_tokens"),
    [
        ({"logit_bias": dict.fromkeys(range(320), -INF)}, 0),
        ({"grammar": Grammar.regex("ab"), "min_new_tokens": 5}, 2),
        ({"grammar": Grammar.regex("ab"), "logit_bias": {66: -INF}}, 1),
    ],
)
def test_where_no_token_is_left_that_request_says_so(engine, options, num_tokens):
    assert make_tokenizer()("b")["input_ids"] == [66]
    beside = engine.open(engine.request("beside", max_new_tokens=40, stop_tokens=()))
    answer = engine.generate("hello", max_new_tokens=9, **options)
    assert answer.finish_reason == "nan"
    assert answer.error.message.startswith(f"no token is left to choose after {5 + num_tokens} ")
    assert len(answer.tokens) == num_tokens
    assert sum(len(piece.tokens) for piece in beside) == 40


def test_a_text_that_its_grammar_ends_is_ended_whatever_the_stop_tokens(engine):
    answer = engine.generate("x", max_new_tokens=9, grammar=Grammar.regex("ab"), stop_tokens=())
    assert (answer.text, answer.finish_reason) == ("ab", "stop")


def test_a_nan_after_a_grammars_text_does_not_end_the_engine():
    """The step launched ahead shows the grammar a token that is none."""
    model = make_model()
    model.lm_head.weight.data[:] = NAN
    engine = Engine(model, tokenizer=make_tokenizer(), cache_tokens=512)
    engine._loop._overlaps = True
    with engine:
        answer = engine.generate("x", max_new_tokens=9, grammar=Grammar.regex("ab+"))
        assert isinstance(answer.error, NanLogitsError)
        assert engine.fault is None


def fake_engine(**limits):
    runner = FakeRunner(**{"num_pages": 200, "max_context": 500} | limits)
    return Engine.over(runner, FakeSampler(runner.table), None), runner


ENDLESS = {"max_new_tokens": 400, "stop_tokens": ()}


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), "CUDA out of memory.", "--cache"),
        (MemoryError("no room"), "MemoryError: no room", "--cache-tokens"),
        (torch.AcceleratorError("CUDA error: lost", 1), "CUDA error: lost", "see the log"),
        (SystemExit(3), "SystemExit: 3", "see the log"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_step_that_fails_ends_the_engine_and_says_what_to_do(error, message, hint, caplog):
    engine, runner = fake_engine()

    def fail(count):
        if count == 3:
            raise error

    runner.before_step = fail
    runner.close = lambda: 1 / 0  # a device that is lost refuses this too
    with pytest.raises(EngineStoppedError) as raised:
        engine.generate([[1], [2]], **ENDLESS)
    assert message in raised.value.message
    assert "\n" not in raised.value.message
    assert hint in raised.value.hint
    with pytest.raises(EngineStoppedError):
        engine.generate([1])
    engine.close()
    assert not engine._loop._thread.is_alive()
    assert "the runner was not closed" in caplog.text


@pytest.mark.parametrize("overlaps", [True, False])
def test_tokens_of_a_device_that_was_let_go_are_told_to_nobody(overlaps):
    """Kernels that waited for a lost rank end, with sums that lack its numbers."""
    engine, _ = fake_engine()
    engine._loop._overlaps = overlaps
    read, steps = engine._loop._launcher.read, []

    def wait(launched):
        steps.append(launched)
        found = list(read(launched))
        if len(steps) == 4:
            engine._loop.fail(RankError("rank 1 was killed by SIGKILL"))
        return found

    engine._loop._launcher.read = wait
    with engine, pytest.raises(EngineStoppedError, match="rank 1 was killed"):
        engine.generate([1], max_new_tokens=4, stop_tokens=())


def test_a_device_that_never_answers_keeps_nobody_waiting(monkeypatch, caplog):
    """A GPU may wait for another's numbers for ever; the fault is told from outside."""
    monkeypatch.setattr(loop, "DEVICE_SECONDS", 0.05)
    engine, runner = fake_engine()
    hangs, end = threading.Event(), threading.Event()

    def hang(count):
        if count == 3:
            hangs.set()
            end.wait(SECONDS)

    runner.before_step = hang
    opened = [engine.open(engine.request(prompt, **ENDLESS)) for prompt in ([1], [2])]
    assert hangs.wait(SECONDS)
    engine._loop.fail(RankError("rank 1 has said nothing for 20 s"))
    for stream in opened:
        with pytest.raises(EngineStoppedError, match="rank 1 has said nothing"):
            list(stream)
    engine.close()
    assert "cpu does not come back" in caplog.text
    end.set()
    engine._loop._thread.join(SECONDS)
    assert not engine._loop._thread.is_alive()
    assert [record.levelname for record in caplog.records if record.exc_info] == []


def test_a_tokenizer_that_fails_loses_that_request_only(model, monkeypatch):
    with Engine(model, tokenizer=make_tokenizer(), cache_tokens=512) as engine:
        with pytest.raises(UsageError, match="the tokenizer cannot read the prompt"):
            engine.generate("half of a pair: \ud800")
        monkeypatch.setattr(streams.TextStream, "add", lambda self, token: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.generate("hello", **ENDLESS | {"max_new_tokens": 200})
        with pytest.raises(ZeroDivisionError):
            list(engine.stream("hello", **ENDLESS | {"max_new_tokens": 200}))
        monkeypatch.undo()
        wait_until(lambda: engine.num_requests == 0)
        assert engine._loop.num_used_pages == 0
        assert len(engine.generate("hello", max_new_tokens=3, stop_tokens=()).tokens) == 3


def wait_until(holds):
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_stream_of_an_engine_that_nobody_holds_goes_to_its_end():
    engine, _ = fake_engine()
    stream = engine.open(Request((1, 2), 300, stop_tokens=frozenset()))
    thread = engine._loop._thread
    del engine
    gc.collect()
    assert sum(len(piece.tokens) for piece in stream) == 300
    del stream
    gc.collect()
    assert not thread.is_alive()


def test_a_text_that_close_cuts_short_does_not_look_whole(model):
    engine = Engine(model, tokenizer=make_tokenizer(), cache_tokens=512)
    texts = engine.stream("hello", **ENDLESS | {"max_new_tokens": 200})
    next(texts)
    engine.close()
    with pytest.raises(EngineStoppedError, match="closed"):
        list(texts)


def test_a_fork_is_told_that_the_engine_is_not_there():
    engine, _ = fake_engine()
    assert len(engine.generate([1], max_new_tokens=3, stop_tokens=()).tokens) == 3
    child = os.fork()
    if not child:
        signal.alarm(SECONDS)  # ends it if anything waits
        try:
            engine.generate([1], max_new_tokens=3)
        except EngineStoppedError as error:
            engine.close()
            os._exit(7 if "fork" in error.message else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert len(engine.generate([1], max_new_tokens=3, stop_tokens=()).tokens) == 3
    engine.close()


def test_two_engines_over_one_model_do_not_mix_their_attention(model):
    options = {"tokenizer": make_tokenizer(), "cache_tokens": 512, "max_sequences": 2}
    engines = [Engine(model, **options) for _ in range(2)]
    found = []

    def ask(engine):
        for _ in range(12):
            found.append(engine.generate("hello there", max_new_tokens=30).tokens)

    threads = [threading.Thread(target=ask, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for engine in engines:
        engine.close()
    ids = torch.tensor([make_tokenizer()("hello there")["input_ids"]])
    alone = model.generate(ids, max_new_tokens=30, do_sample=False)[0, ids.shape[1] :]
    assert len(found) == 24
    assert set(found) == {tuple(t for t in alone.tolist() if t != EOS)}


def test_event_loops_that_have_ended_are_let_go():
    engine, _ = fake_engine()
    before = len(streams._mailboxes)
    for _ in range(5):
        asyncio.run(engine.agenerate([1, 2], max_new_tokens=3))
    gc.collect()
    assert len(streams._mailboxes) == before
    engine.close()


def test_a_runner_that_keeps_states_is_told_when_a_sequence_has_ended():
    runner = FakeRunner(page_tokens=64, num_pages=5, shares_prefixes=False)
    released = []
    runner.release = released.extend
    engine = Engine.over(runner, FakeSampler(runner.table), None)
    engine.generate([[1], [2]], max_new_tokens=3, stop_tokens=())
    stream = engine.open(Request((3,), 40, stop_tokens=frozenset()))
    next(iter(stream))
    stream.cancel()
    wait_until(lambda: engine.num_requests == 0)
    assert len(released) == 3
    assert set(released) <= set(range(1, 5))
    engine.close()


def test_end_tokens_that_the_model_does_not_have_are_left_out():
    runner = FakeRunner()
    stops = frozenset({3, VOCAB, 10**9, -1})
    engine = Engine.over(runner, FakeSampler(runner.table), None, stop_tokens=stops)
    assert engine.stop_tokens == {3}
    with pytest.raises(UsageError):
        engine.check(Request((1,), 3, Sampling(), stop_tokens=stops))
    engine.close()


def test_nothing_is_logged_as_an_error_by_what_is_ordinary(engine, caplog):
    with caplog.at_level(logging.WARNING):
        engine.generate(["a", "b"], max_new_tokens=4, temperature=1.0)
    assert not caplog.records

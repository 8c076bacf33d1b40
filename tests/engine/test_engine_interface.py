"""What users call, over a model on the host: calls, streams, chat, their async forms, mistakes."""

import asyncio
import gc
import shutil
import threading
import time
import weakref
from array import array
from contextlib import aclosing

import numpy as np
import pytest
import torch
from fake_model import POISON, STOP, VOCAB, FakeRunner, FakeSampler, alone
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import halfweight
from halfweight.engine import streams
from halfweight.engine.engine import Engine
from halfweight.engine.loop import EngineStoppedError, NanLogitsError
from halfweight.engine.request import Request, Sampling
from halfweight.errors import UsageError

SECONDS = 10
CHAT = "{% for m in messages %}{{ m['content'] }}~{% endfor %}"
LETTERS = "~abcdefghijklmnopqrstuvwxyzABCDEFGHIJ.! "


def make_tokenizer():
    """A token a letter; id 0 is the stop token."""
    assert len(LETTERS) == VOCAB
    vocab = {letter: i for i, letter in enumerate(LETTERS)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=" "))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken("~", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="~")
    tokenizer.chat_template = CHAT
    return tokenizer


TOKENIZER = make_tokenizer()


def text_of(tokens):
    return "".join(LETTERS[token] for token in tokens)


def ids_of(text):
    return tuple(LETTERS.index(letter) for letter in text)


@pytest.fixture
def make_engine():
    engines = []

    def make(tokenizer=TOKENIZER, sampling=None, **limits):
        runner = FakeRunner(**{"num_pages": 200, "max_context": 500} | limits)
        sampler = FakeSampler(runner.table)
        stops = frozenset({STOP})
        engine = Engine.over(runner, sampler, tokenizer, stop_tokens=stops, sampling=sampling)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


def wanted(prompt, num_tokens, **options):
    """Text and reason that a prompt must get."""
    tokens, reason = alone(Request(ids_of(prompt), num_tokens, **options))
    return text_of(tokens), reason


def test_one_prompt_gets_one_answer_and_several_get_a_list(make_engine):
    engine = make_engine()
    answer = engine.generate("abc", max_new_tokens=9)
    assert (answer.text, answer.finish_reason) == wanted("abc", 9)
    assert answer.tokens == ids_of(answer.text)
    prompts = ["abc", "zz"] + ["hello!"] * 7
    answers = engine.generate(prompts, max_new_tokens=9)
    assert [(a.text, a.finish_reason) for a in answers] == [wanted(p, 9) for p in prompts]
    assert engine.generate([], max_new_tokens=9) == []


@pytest.mark.parametrize(
    "ids",
    [
        *([1, 2, 3], (1, 2, 3), range(1, 4), array("i", [1, 2, 3])),
        *(np.array([1, 2, 3]), torch.tensor([1, 2, 3]), [np.int64(1), torch.tensor(2), 3]),
    ],
    ids=["list", "tuple", "range", "array", "numpy", "torch", "mixed"],
)
def test_a_prompt_may_be_token_ids(make_engine, ids):
    engine = make_engine()
    assert engine.generate(ids, max_new_tokens=9).text == wanted("abc", 9)[0]
    assert engine.generate([ids, "abc"], max_new_tokens=9)[0].text == wanted("abc", 9)[0]
    assert "".join(engine.stream(ids, max_new_tokens=9)) == wanted("abc", 9)[0]
    for rows in (np.array([ids]), torch.tensor([tuple(map(int, ids))])):
        assert [a.text for a in engine.generate(rows, max_new_tokens=9)] == [wanted("abc", 9)[0]]


def test_a_stream_is_the_same_text_in_pieces(make_engine):
    pieces = list(make_engine().stream("abc", max_new_tokens=9))
    assert "".join(pieces) == wanted("abc", 9)[0]
    assert len(pieces) == 9
    assert all(pieces)


def test_leaving_a_stream_cancels_the_request(make_engine):
    engine = make_engine()
    for _ in engine.stream("abc", max_new_tokens=400, stop_tokens=()):
        assert engine.num_requests == 1
        break
    wait_until(lambda: engine.num_requests == 0)


def wait_until(holds):
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_chat_goes_through_the_template_and_reads_only_what_is_new(make_engine):
    engine = make_engine(page_tokens=2)
    messages = [{"role": "user", "content": "hellothere"}]
    answer = engine.chat(messages, max_new_tokens=6)
    assert (answer.text, answer.finish_reason) == wanted("hellothere~", 6)
    messages += [
        {"role": "assistant", "content": answer.text},
        {"role": "user", "content": "and"},
    ]
    second = engine.chat(messages, max_new_tokens=6)
    assert second.text == wanted(f"hellothere~{answer.text}~and~", 6)[0]
    assert second.num_shared_tokens >= 12


def test_text_ends_at_a_stop_string_and_tokens_with_it(make_engine):
    engine = make_engine()
    free = wanted("abc", 30, stop_tokens=frozenset())[0]
    stop = free[10:12]
    end = free.index(stop)
    for include_stop in (False, True):
        answer = engine.generate(
            "abc", max_new_tokens=30, stop_tokens=(), stop=["%", stop], include_stop=include_stop
        )
        assert answer.text == free[: end + 2 * include_stop]
        assert answer.tokens == ids_of(free[: end + 2])
        assert (answer.finish_reason, answer.stop) == ("stop", stop)
    streamed = engine.stream("abc", max_new_tokens=30, stop_tokens=(), stop=stop)
    assert "".join(streamed) == free[:end]
    wait_until(lambda: engine.num_requests == 0)


def test_a_stop_string_ends_one_of_many_at_once(make_engine):
    """Not when its turn comes to be read: what it would have generated is not waited for."""
    engine = make_engine(max_context=5000, num_pages=2600)
    free = wanted("abc", 8, stop_tokens=frozenset())[0]
    options = {"max_new_tokens": 300, "stop_tokens": (), "stop": free[3:5]}
    answers = engine.generate(["b", "abc"], **options)
    assert answers[1].text == free[:3]
    runner = engine._loop._runner
    num_two = sum(len(step) == 2 for step in runner.steps)
    assert num_two < 200


def test_the_stop_token_is_named(make_engine):
    engine = make_engine()
    free = wanted("abc", 30, stop_tokens=frozenset())[0]
    stop = ids_of(free[7])[0]
    answer = engine.generate("abc", max_new_tokens=30, stop_tokens=[stop])
    assert (answer.finish_reason, answer.stop) == ("stop", stop)
    assert answer.text == free[: free.index(LETTERS[stop])]


def test_the_models_own_sampling_holds_unless_a_call_says_otherwise(make_engine):
    own = Sampling(temperature=1.0, seed=5)
    engine = make_engine(sampling=own)
    for options, sampling in [
        ({}, own),
        ({"seed": 6}, Sampling(temperature=1.0, seed=6)),
        ({"temperature": 0.0}, Sampling(seed=5)),
        ({"sampling": Sampling()}, Sampling()),
        ({"sampling": Sampling(), "seed": 6, "temperature": 1.0}, Sampling(1.0, seed=6)),
    ]:
        answer = engine.generate("abc", max_new_tokens=20, **options)
        assert (answer.text, answer.finish_reason) == wanted("abc", 20, sampling=sampling)


def test_logprobs_come_with_tokens_and_prompt(make_engine):
    answer = make_engine().generate("abc", max_new_tokens=5, num_logprobs=0, prompt_logprobs=1)
    assert [entry.token for entry in answer.logprobs] == list(answer.tokens)
    assert [entry and entry.token for entry in answer.prompt_logprobs] == [None, 2, 3]


def test_without_a_number_there_are_as_many_tokens_as_there_is_room_for(make_engine):
    engine = make_engine(max_context=60, page_tokens=10, num_pages=6)
    assert engine.max_context == 50
    answer = engine.generate("abc", stop_tokens=())
    assert (len(answer.tokens), answer.finish_reason) == (47, "length")


def test_async_forms_give_the_same(make_engine):
    engine = make_engine(max_sequences=4)

    async def ask():
        one = await engine.agenerate("abc", max_new_tokens=9)
        assert (one.text, one.finish_reason) == wanted("abc", 9)
        many = await engine.agenerate(["abc", "zz"] * 5, max_new_tokens=9)
        assert [a.text for a in many] == [wanted(p, 9)[0] for p in ["abc", "zz"] * 5]
        pieces = [text async for text in engine.astream("abc", max_new_tokens=9)]
        assert "".join(pieces) == wanted("abc", 9)[0]
        chat = await engine.achat([{"role": "user", "content": "hi"}], max_new_tokens=9)
        assert chat.text == wanted("hi~", 9)[0]

    asyncio.run(ask())


def test_cancelling_a_task_or_leaving_a_stream_cancels_the_request(make_engine):
    engine = make_engine()
    endless = {"max_new_tokens": 450, "stop_tokens": ()}

    async def ask():
        async with aclosing(engine.astream("abc", **endless)) as texts:
            async for _ in texts:
                break
        await asyncio.to_thread(wait_until, lambda: engine.num_requests == 0)
        gate = threading.Event()
        engine._loop._runner.before_step = lambda count: gate.wait(SECONDS)
        task = asyncio.create_task(engine.agenerate(["a", "b"], **endless))
        await asyncio.to_thread(wait_until, lambda: engine.num_requests == 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.set()
        await asyncio.to_thread(wait_until, lambda: engine.num_requests == 0)

    asyncio.run(ask())


def test_an_event_loop_is_woken_once_for_all_that_comes_before_it_looks(monkeypatch):
    async def ask():
        event_loop, got, wakes = asyncio.get_running_loop(), [], []
        wake = event_loop.call_soon_threadsafe
        monkeypatch.setattr(
            event_loop, "call_soon_threadsafe", lambda call: (wakes.append(1), wake(call))
        )
        mailbox = streams._mailbox()
        for numbers in ([1, 2, 3, 4, 5], [6, 7]):
            sender = threading.Thread(
                target=lambda n=numbers: [mailbox.post(got.append, i) for i in n]
            )
            sender.start()
            sender.join()  # this thread cannot look meanwhile
            await asyncio.sleep(0)
        return got, len(wakes)

    assert asyncio.run(ask()) == ([1, 2, 3, 4, 5, 6, 7], 2)


def test_a_nan_is_told_by_its_reason_and_ends_a_stream(make_engine):
    engine = make_engine()
    bad = [1, 2, POISON]
    answers = engine.generate([bad, "abc"], max_new_tokens=9)
    assert answers[0].finish_reason == "nan"
    assert isinstance(answers[0].error, NanLogitsError)
    assert answers[1].text == wanted("abc", 9)[0]
    with pytest.raises(NanLogitsError):
        list(engine.stream(bad))


def test_a_failed_step_reaches_every_form(make_engine):
    engine = make_engine()

    def fail(count):
        raise RuntimeError("out of order")

    engine._loop._runner.before_step = fail
    with pytest.raises(EngineStoppedError, match="out of order"):
        engine.generate(["a", "b"])
    assert isinstance(engine.fault, EngineStoppedError)
    with pytest.raises(EngineStoppedError, match="out of order"):
        list(engine.stream("a"))
    with pytest.raises(EngineStoppedError, match="out of order"):
        asyncio.run(engine.agenerate("a"))


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("abc", {"temprature": 1.0}, "unknown option 'temprature'"),
        ("abc", {"sampling": 20}, "sampling is 20, expected a Sampling"),
        (["abc", "a" * 600], {}, "prompt 1: the prompt has 600 tokens"),
        ([["a"]], {}, "prompt 0: the prompt has token id 'a', expected a whole number"),
        ([1, 1.5], {}, "the prompt has token id 1.5, expected a whole number"),
        ([1.0, 2.0], {}, "the prompt has token id 1.0, expected a whole number"),
        ([[7], ["7"]], {}, "prompt 1: the prompt has token id '7', expected a whole number"),
        ([1, [2]], {}, r"the prompt has token id \[2\], expected a whole number"),
        ([[[1, 2]]], {}, r"prompt 0: the prompt has token id \[1, 2\], expected a whole number"),
        (np.array([1.5]), {}, "the prompt has token id 1.5, expected a whole number"),
        (torch.tensor([1.5]), {}, "the prompt has token id 1.5, expected a whole number"),
        (torch.tensor(1), {}, "a prompt is 1, expected text or a sequence of token ids"),
        (b"ab", {}, "a prompt is b'ab', expected text or a sequence of token ids"),
        (None, {}, "a prompt is None, expected text or a sequence of token ids"),
        (["a", None], {}, "prompt 1: a prompt is None, expected text"),
        ({1, 2}, {}, r"a prompt is \{1, 2\}, expected text"),
        ((i for i in range(3)), {}, "a prompt is <generator"),
        ("abc", {"max_new_tokens": 2.5}, "max_new_tokens is 2.5, expected a whole number"),
        ("abc", {"max_new_tokens": "3"}, "max_new_tokens is '3', expected a whole number"),
        ("abc", {"prompt_logprobs": 1.5}, "prompt_logprobs is 1.5, expected a whole number"),
        ("abc", {"stop_tokens": [1.5]}, "a token id of stop_tokens is 1.5, expected a whole"),
        ("abc", {"stop_tokens": 5}, "stop_tokens is 5, expected token ids"),
        ("abc", {"stop": 5}, "stop is 5, expected a text or several"),
        ("abc", {"stop": ["a", 5]}, r"stop is \['a', 5\], expected a text or several"),
        ("abc", {"stop": [None]}, r"stop is \[None\], expected a text or several"),
        ("abc", {"logit_bias": {1.5: 2.0}}, "logit_bias has token id 1.5, expected a whole"),
        ("abc", {"logit_bias": [5]}, r"logit_bias is \[5\], expected numbers by token id"),
        ("", {}, "no tokens"),
    ],
)
def test_mistakes_are_named(make_engine, prompts, options, message):
    engine = make_engine()
    with pytest.raises(UsageError, match=message):
        engine.generate(prompts, **options)
    assert engine.generate("abc", max_new_tokens=9).text == wanted("abc", 9)[0]


def test_a_prompt_that_its_owner_changes_meanwhile_is_answered_as_it_was(make_engine):
    engine = make_engine(max_sequences=1)
    prompt = [1, 2, 3]
    pieces = engine.open(Request(prompt, 9))
    prompt += [4, 5]
    prompt[0] = 6
    tokens = [token for piece in pieces for token in piece.tokens]
    assert tokens == alone(Request((1, 2, 3), 9))[0]


def test_without_a_tokenizer_prompts_and_answers_are_ids(make_engine):
    engine = make_engine(tokenizer=None)
    answer = engine.generate([1, 2, 3], max_new_tokens=9)
    assert text_of(answer.tokens) == wanted("abc", 9)[0]
    assert answer.text == ""
    for call, what in (
        (lambda: engine.generate("abc"), "text"),
        (lambda: engine.generate([1], stop="x"), "stop strings"),
        (lambda: engine.chat([{"role": "user", "content": "hi"}]), "messages"),
        (lambda: engine.stream([1]), "streams of text"),
    ):
        with pytest.raises(UsageError, match=f"the model: found no tokenizer, needed for {what}"):
            call()


def test_a_model_without_a_tokenizer_is_named(int8_folder, tmp_path):
    folder = tmp_path / "bare-int8"
    shutil.copytree(int8_folder, folder, ignore=shutil.ignore_patterns("*token*"))
    with (
        halfweight.Engine(folder, device="cpu") as engine,
        pytest.raises(UsageError, match="bare-int8: found no tokenizer, needed for text"),
    ):
        engine.generate("w5")


def test_sampling_may_be_the_second_argument(make_engine, monkeypatch):
    """As users of vLLM write it; single fields go on top of it."""
    engine, asked = make_engine(), []
    request = engine.request

    def recorded(*arguments, **options):
        asked.append(request(*arguments, **options))
        return asked[-1]

    monkeypatch.setattr(engine, "request", recorded)
    sampling, options = Sampling(seed=5), {"max_new_tokens": 3}
    messages = [{"role": "user", "content": "hi"}]

    async def pieces():
        return [piece async for piece in engine.astream("abc", sampling, **options)]

    text = engine.generate("abc", sampling, **options).text
    engine.generate(["abc", "b"], sampling, **options)
    engine.chat(messages, sampling, **options)
    asyncio.run(engine.agenerate("abc", sampling, **options))
    asyncio.run(engine.achat(messages, sampling, **options))
    assert "".join(engine.stream("abc", sampling, **options)) == text
    assert "".join(asyncio.run(pieces())) == text
    assert [made.sampling for made in asked] == [sampling] * 8
    assert request("a", sampling, top_k=2).sampling == Sampling(seed=5, top_k=2)


def test_an_unknown_option_is_answered_with_all_that_there_are(make_engine):
    with pytest.raises(UsageError, match="unknown option 'max_tokens'") as caught:
        make_engine().generate("abc", max_tokens=3)
    given = caught.value.hint.removeprefix("options are ").split(", ")
    assert {"max_new_tokens", "stop", "stop_tokens", "temperature", "seed", "sampling"} <= {*given}


@pytest.mark.parametrize("message", [5, "hello", {"content": "hello"}], ids=str)
def test_what_is_no_message_is_a_usage_error(make_engine, message):
    with pytest.raises(UsageError, match=r"message 2 is .*, expected a role and a content"):
        make_engine().chat([{"role": "user", "content": "a"}, message])


def test_a_context_manager_closes_and_so_does_the_last_reference():
    def make():
        runner = FakeRunner()
        closed = threading.Event()
        runner.close = closed.set
        return Engine.over(runner, FakeSampler(runner.table), TOKENIZER), closed

    engine, closed = make()
    with engine:
        assert engine.fault is None
    assert closed.is_set()
    with pytest.raises(EngineStoppedError, match="closed"):
        engine.generate("abc")
    engine.close()

    engine, closed = make()
    engine.generate("abc", max_new_tokens=3)
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None
    assert closed.is_set()


def test_an_event_loop_that_has_fallen_behind_gets_pieces_joined(make_engine):
    engine = make_engine()

    async def ask():
        request = engine.request("abc", max_new_tokens=9, stop_tokens=(), num_logprobs=0)
        stream = engine.aopen(request)
        time.sleep(0.3)  # the loop is busy while the engine makes all of them
        return [piece async for piece in stream]

    (piece,) = asyncio.run(ask())
    text, reason = wanted("abc", 9, stop_tokens=frozenset())
    assert (piece.text, piece.finish_reason) == (text, reason)
    assert piece.tokens == ids_of(text)
    assert [entry.token for entry in piece.logprobs] == list(piece.tokens)


def test_a_stop_string_within_joined_pieces_ends_the_text(make_engine):
    engine = make_engine()
    free = wanted("abc", 9, stop_tokens=frozenset())[0]

    async def ask():
        options = {"max_new_tokens": 400, "stop_tokens": (), "stop": free[4:6]}
        stream = engine.aopen(engine.request("abc", **options))
        time.sleep(0.2)
        return [piece async for piece in stream]

    pieces = asyncio.run(ask())
    assert "".join(piece.text for piece in pieces) == free[:4]
    assert pieces[-1].finish_reason == "stop"
    wait_until(lambda: engine.num_requests == 0)


def test_a_text_that_begins_with_the_bos_is_not_given_a_second_one(make_engine):
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "~"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="~ $A", special_tokens=[("~", 0)]
    )
    engine = make_engine(tokenizer)
    assert engine.encode("ab") == engine.encode("~ab") == (0, *ids_of("ab"))
    assert engine.encode("~~ab") == (0, 0, *ids_of("ab"))
    assert engine.encode("ab", add_special_tokens=False) == ids_of("ab")

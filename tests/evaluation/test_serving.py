"""What clients saw becomes a row; requests come when the load says; a response is read as sent."""

import asyncio
import json
import random
import time
from itertools import accumulate

import pytest

from halfweight.errors import UsageError
from halfweight.evaluation.speed import serving
from halfweight.evaluation.speed.clients import Answer, Ask, Load, drive
from halfweight.evaluation.speed.http_client import events
from halfweight.evaluation.speed.serving import Run, random_asks, summarize, text_asks


def test_a_row_is_what_the_clients_saw():
    first = Answer(prompt_tokens=10, new_tokens=4, asked=100.0, pieces=[100.5, 100.6, 100.7, 100.9])
    second = Answer(prompt_tokens=30, new_tokens=4, asked=100.0, pieces=[101.0, 101.5, 102.0])
    third = Answer(prompt_tokens=20, new_tokens=4, asked=101.0, pieces=[103.0, 104.0])
    row = summarize("it", Load(concurrency=2), [Run([third, second, first], 0.25)])
    assert (row.runner, row.concurrency, row.num_requests) == ("it", 2, 3)
    assert (row.prompt_tokens, row.new_tokens) == (20, 4)
    assert row.tokens_per_second == pytest.approx(12 / 4.0)
    assert row.prefill_tokens_per_second == pytest.approx(40 / 1.0)  # of the two that came first
    assert row.first_token_ms_p50 == pytest.approx(1000)
    assert row.first_token_ms_p99 == pytest.approx(1980)
    assert row.between_tokens_ms_p50 == pytest.approx(350)  # 100 100 200 500 500 1000
    assert row.tokens_per_piece == pytest.approx(12 / 9)
    assert row.client_busy == 0.25


def test_rounds_are_medians_and_percentiles_are_of_all():
    runs = [Run([Answer(8, 1, 0.0, [second])]) for second in (1.0, 2.0, 10.0)]
    row = summarize("it", Load(concurrency=1), runs)
    assert row.tokens_per_second == pytest.approx(0.5)
    assert row.prefill_tokens_per_second == pytest.approx(4)
    assert row.first_token_ms_p95 == pytest.approx(9200)
    assert row.between_tokens_ms_p50 is None


class Clock:
    """Answers after a time; how many waited at once and when each was asked."""

    def __init__(self, seconds=0.0):
        self.seconds, self.open, self.most, self.asked = seconds, 0, 0, []

    async def __call__(self, ask):
        self.asked.append(asyncio.get_running_loop().time())
        self.open += 1
        self.most = max(self.most, self.open)
        await asyncio.sleep(self.seconds)
        self.open -= 1
        return ask.new_tokens


def test_each_client_waits_for_its_answer():
    send = Clock(0.001)
    asks = [Ask([1], n) for n in range(9)]
    found = asyncio.run(drive(send, Load(concurrency=4), asks))
    assert sorted(found) == list(range(9))
    assert send.most == 4


def test_requests_at_a_rate_do_not_wait_for_answers():
    send = Clock(0.2)
    asks = [Ask([1], n) for n in range(40)]
    source = random.Random(5)
    due = list(accumulate(source.expovariate(400.0) for _ in asks[1:]))
    begin = time.monotonic()
    assert len(asyncio.run(drive(send, Load(rate=400.0, seed=5), asks))) == 40
    assert send.most > 10
    asked = [at - begin for at in send.asked[1:]]
    assert all(at > at_least - 1e-3 for at, at_least in zip(asked, due, strict=True))


def test_an_error_of_one_request_ends_the_load():
    async def send(ask):
        if ask.new_tokens == 3:
            raise RuntimeError("no")
        await asyncio.sleep(0)

    with pytest.raises(RuntimeError, match="no"):
        asyncio.run(drive(send, Load(concurrency=2), [Ask([1], n) for n in range(9)]))


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_events_are_read_however_they_are_cut(size):
    bodies = [{"choices": [{"text": "a\u00e9"}]}, {"choices": [], "usage": {}}]
    lines = [b"data: " + json.dumps(body, ensure_ascii=False).encode() for body in bodies]
    text = b"\n\n".join([*lines, b"data: [DONE]", b""])
    parts = [text[:5], text[5:20], text[20:]]
    whole = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    whole += b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    received = [(float(at), whole[at : at + size]) for at in range(0, len(whole), size)]
    found = list(events(received))
    assert [body for _, body in found] == bodies
    last = whole.index(b"[DONE]") + len("[DONE]\n\n") - 1
    assert {at for at, _ in found} == {last // size * size}


@pytest.mark.parametrize(
    "response", [b"", b"HTTP/1.1 429 Too Many\r\n\r\nlater", b"HTTP/1.1 200 OK\r\n\r\n{}"]
)
def test_a_response_that_is_no_stream_is_an_error(response):
    with pytest.raises(RuntimeError):
        list(events([(0.0, response)]))


def test_prompts_differ_but_for_the_same_seed():
    first, again = (random_asks(500, 3, 20, 4, seed=1) for _ in range(2))
    assert first == again
    assert len({tuple(ask.prompt) for ask in first + random_asks(500, 3, 20, 4, seed=2)}) == 6
    assert all(len(ask.prompt) == 20 and ask.new_tokens == 4 for ask in first)


def test_prompts_of_a_text_are_pieces_of_it():
    ids = list(range(100, 150))
    for ask in text_asks(ids, 5, 10, 4, seed=0):
        begin = ask.prompt[0] - 100
        assert ask.prompt == ids[begin : begin + 10]
    with pytest.raises(UsageError, match="too few for 5 prompts of 47"):
        text_asks(ids, 5, 47, 4, seed=0)


def test_a_warm_up_meets_every_number_of_sequences():
    seen = []

    class Target:
        runner = "it"

        def run(self, load, asks):
            seen.append((load, asks))

    serving.warm_up(Target(), random_asks(50, 8, 5, 99, seed=0), 32)
    ((load, asks),) = seen
    assert load.concurrency == len(asks) == 8
    assert len({ask.new_tokens for ask in asks}) == 8

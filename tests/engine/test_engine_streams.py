"""A request as its caller awaits it, fast or slow."""

import asyncio
import time

import pytest
from fake_model import STOP, FakeRunner, FakeSampler, alone

from halfweight.engine.loop import EngineStoppedError, Loop
from halfweight.engine.request import Request, Sampling
from halfweight.engine.streams import AsyncStream, Completion

REQUEST = Request((4, 2), 24, Sampling(num_logprobs=0), frozenset(), prompt_logprobs=0)


@pytest.fixture
def loop():
    runner = FakeRunner()
    loop = Loop(runner, FakeSampler(runner.table), stop_tokens=frozenset({STOP}))
    loop.start()
    yield loop
    loop.stop()


async def read(loop, request, seconds):
    """The pieces, after each of which the reader is away for some time."""
    pieces = []
    async for piece in AsyncStream(loop, request, None):
        pieces.append(piece)
        await asyncio.sleep(seconds)
    return pieces


def test_a_reader_that_lags_gets_what_came_meanwhile_as_one_piece(loop):
    pieces = asyncio.run(read(loop, REQUEST, 0.2))
    assert len(pieces) < 12
    whole = Completion.of(pieces)
    tokens, reason = alone(REQUEST)
    assert (list(whole.tokens), whole.finish_reason) == (tokens, reason)
    assert [entry.token for entry in whole.logprobs] == tokens
    assert [entry and entry.token for entry in whole.prompt_logprobs] == [None, 2]


def test_a_reader_is_told_that_the_engine_has_ended(loop):
    def fail(count):
        if count == 5:
            raise RuntimeError("no memory")

    loop._runner.before_step = fail
    with pytest.raises(EngineStoppedError, match="a step failed: RuntimeError: no memory"):
        asyncio.run(read(loop, REQUEST, 0))


def test_what_came_before_the_engines_end_is_read_first(loop):
    def fail(count):
        if count == 5:
            raise RuntimeError("no memory")

    loop._runner.before_step = fail
    pieces = []

    async def lag():
        stream = AsyncStream(loop, REQUEST, None)
        await asyncio.sleep(0.1)
        time.sleep(0.2)
        async for piece in stream:
            pieces.append(piece)

    with pytest.raises(EngineStoppedError):
        asyncio.run(lag())
    tokens, _ = alone(REQUEST)
    found = [token for piece in pieces for token in piece.tokens]
    assert found
    assert found == tokens[: len(found)]

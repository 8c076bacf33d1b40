"""One request as its caller sees it: pieces of text with their tokens, as a loop or awaited.

Tokens become text here, on the caller's thread, while the engine's thread runs the next step. A
stop string is met here too: the request is cancelled, and what came after it is dropped.
"""

from __future__ import annotations

import asyncio
import queue
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

from halfweight.engine.loop import Loop
from halfweight.engine.request import FinishReason, Output, Request, TokenLogprob
from halfweight.engine.text import Detokenizer, TextStream
from halfweight.errors import HalfweightError


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of a request: tokens, and the text that has become final with them."""

    text: str
    tokens: tuple[int, ...] = ()
    """Without the stop token. Their text may come later, when no other token can change it."""
    finish_reason: FinishReason | None = None
    """Why it has ended; None while it goes on."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of `tokens`, if asked for."""
    stop: int | str | None = None
    """The stop token or stop string that ended it, where one did."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    """Of the prompt's tokens, if asked for; of the first there is none."""
    num_shared_tokens: int = 0
    """Tokens of the prompt that were in the cache already."""
    error: HalfweightError | None = None
    """With the reason "nan": what is wrong."""


@dataclass(frozen=True, slots=True)
class Completion(Piece):
    """All that a request became: the pieces, joined."""

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> Completion:
        """The whole; the last piece has the reason."""
        first, last = pieces[0], pieces[-1]
        return cls(
            text="".join(piece.text for piece in pieces),
            tokens=tuple(token for piece in pieces for token in piece.tokens),
            finish_reason=last.finish_reason,
            logprobs=tuple(entry for piece in pieces for entry in piece.logprobs),
            stop=last.stop,
            prompt_logprobs=first.prompt_logprobs,
            num_shared_tokens=first.num_shared_tokens,
            error=last.error,
        )


class _Reader:
    """Outputs of one request into pieces. Without a tokenizer they have no text."""

    def __init__(self, detokenizer: Detokenizer | None, request: Request) -> None:
        self._text = None
        if detokenizer is not None:
            self._text = TextStream(
                detokenizer, request.stop_strings, include_stop=request.include_stop
            )

    def read(self, output: Output) -> Piece:
        """The piece of an output; the last has a reason. Raises the error of an engine's end."""
        if output.error is not None and output.finish_reason is None:
            raise output.error
        text, count = self._read_text(output)
        piece = Piece(
            text,
            output.tokens[:count],
            output.finish_reason,
            output.logprobs[:count],
            output.stop_token,
            output.prompt_logprobs,
            output.num_shared_tokens,
            output.error,
        )
        if self._text is None or not self._text.stopped:
            return piece
        return replace(piece, finish_reason="stop", stop=self._text.stop_string, error=None)

    def _read_text(self, output: Output) -> tuple[str, int]:
        """Text of an output's tokens, and how many it took to a stop string."""
        if self._text is None:
            return "", len(output.tokens)
        text, count = "", 0
        for token in output.tokens:
            text += self._text.add(token)
            count += 1
            if self._text.stopped:
                break
        return text + self._text.finish() if output.finish_reason else text, count


def complete(
    loop: Loop, requests: Sequence[Request], detokenizer: Detokenizer | None
) -> list[Completion]:
    """Run requests together and wait for all. Raises what `Loop.submit` does."""
    outputs: queue.SimpleQueue[tuple[int, Output]] = queue.SimpleQueue()
    readers = [_Reader(detokenizer, request) for request in requests]
    pieces: list[list[Piece]] = [[] for _ in requests]
    open_numbers: dict[int, int] = {}
    try:
        for i, request in enumerate(requests):
            open_numbers[i] = loop.submit(request, partial(_put, outputs, i))
        while open_numbers:
            i, output = outputs.get()
            if i not in open_numbers:
                continue
            piece = readers[i].read(output)
            pieces[i].append(piece)
            if piece.finish_reason is not None:
                loop.cancel(open_numbers.pop(i))
    finally:
        for number in open_numbers.values():
            loop.cancel(number)
    return [Completion.of(found) for found in pieces]


def _put(outputs: queue.SimpleQueue[tuple[int, Output]], index: int, output: Output) -> None:
    outputs.put((index, output))


class Stream:
    """Pieces of one request, to be read once by a `for` loop; leaving the loop cancels it."""

    def __init__(
        self, loop: Loop, request: Request, detokenizer: Detokenizer | None, owner: object = None
    ) -> None:
        """Submits the request. Raises what `Loop.submit` does.

        `owner` is kept alive: the engine, which ends when nobody has it any more.
        """
        self._loop, self._reader, self._owner = loop, _Reader(detokenizer, request), owner
        self._outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
        self._number = loop.submit(request, self._outputs.put)

    def cancel(self) -> None:
        """End it; nothing happens if it has ended."""
        self._loop.cancel(self._number)

    def __iter__(self) -> Iterator[Piece]:
        """Raises EngineStoppedError when the engine ends before the request."""
        try:
            while True:
                piece = self._reader.read(self._outputs.get())
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            self.cancel()


class AsyncStream:
    """The same for `async for`, made within a running event loop.

    A reader that lags behind gets what has come meanwhile as one piece.
    """

    def __init__(
        self, loop: Loop, request: Request, detokenizer: Detokenizer | None, owner: object = None
    ) -> None:
        """Submits the request. Raises what `Loop.submit` does; `owner` is as for `Stream`."""
        self._loop, self._reader, self._owner = loop, _Reader(detokenizer, request), owner
        self._arrivals = _Arrivals()
        self._number = loop.submit(request, partial(_mailbox().post, self._arrivals.put))

    def cancel(self) -> None:
        """End it; nothing happens if it has ended."""
        self._loop.cancel(self._number)

    def __aiter__(self) -> AsyncGenerator[Piece]:
        return self.pieces()

    async def pieces(self) -> AsyncGenerator[Piece]:
        """What `async for` reads. Raises EngineStoppedError when the engine ends first."""
        try:
            while True:
                piece = self._reader.read(await self._arrivals.take())
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            self.cancel()


class _Arrivals:
    """Outputs on their way to one reader."""

    def __init__(self) -> None:
        self._outputs: list[Output] = []
        self._reader: asyncio.Future[None] | None = None

    def put(self, output: Output) -> None:
        """One has come; on the event loop's thread."""
        self._outputs.append(output)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def take(self) -> Output:
        """All that have come since the last time, as one; waits for the first."""
        if not self._outputs:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        outputs, self._outputs = self._outputs, []
        if len(outputs) > 1 and outputs[-1].finish_reason is None and outputs[-1].error is not None:
            self._outputs = [outputs.pop()]  # what came before the engine's end is not lost
        return Output.joined(outputs)


class _Mailbox:
    """Calls for one event loop from the engine's thread: it is woken once for all of a step."""

    def __init__(self, event_loop: asyncio.AbstractEventLoop) -> None:
        self._event_loop = ref(event_loop)
        self._calls: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._is_woken = False

    def post(self, call: Callable[[Any], None], argument: Any) -> None:
        """`call(argument)` on the event loop's thread, soon."""
        self._calls.append((call, argument))
        event_loop = self._event_loop()
        if not self._is_woken and event_loop is not None and not event_loop.is_closed():
            self._is_woken = True
            event_loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_woken = False
        while self._calls:
            call, argument = self._calls.popleft()
            call(argument)


_mailboxes: WeakKeyDictionary[asyncio.AbstractEventLoop, _Mailbox] = WeakKeyDictionary()


def _mailbox() -> _Mailbox:
    event_loop = asyncio.get_running_loop()
    if event_loop not in _mailboxes:
        _mailboxes[event_loop] = _Mailbox(event_loop)
    return _mailboxes[event_loop]

"""The routes of OpenAI's API over one engine: chat, completions, models, health.

A request is checked whole before it reaches the engine. Its first piece of text is awaited before
the response begins, so that overload and faults found by then have a status code of their own; a
later fault is an `error` event that ends the stream. When a client goes away its requests are
cancelled, which frees their place in the batch.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from halfweight.engine.continuous import Engine, EngineStoppedError, OverloadedError
from halfweight.errors import HalfweightError, UsageError
from halfweight.serve import schema
from halfweight.serve.schema import Answer, ChatRequest, CompletionRequest
from halfweight.serve.text import TextStream

COMPLETION_TOKENS = 16
"""Default of /v1/completions, as OpenAI's."""
CHAT_TOKENS = 1024
"""Default of /v1/chat/completions, where the context has room."""
DISCONNECT_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class _Job:
    """One choice to generate."""

    index: int
    prompt: list[int]
    max_new_tokens: int


@dataclass(frozen=True)
class _Piece:
    """New text of one choice; with a reason it is the last. `num_tokens` counts from the start."""

    index: int
    text: str
    reason: str | None
    num_tokens: int


def build_app(engine: Engine, tokenizer: Any, name: str, *, api_key: str | None = None) -> FastAPI:
    """The application; it starts and stops the engine. `name` is the model's in /v1/models."""
    service = _Service(engine, tokenizer, name)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.stop)

    def authorized(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key is not None and not secrets.compare_digest(given.encode(), api_key.encode()):
            raise HTTPException(401, "the API key is missing or wrong")

    app = FastAPI(title="halfweight", lifespan=lifespan, docs_url=None, redoc_url=None)
    private = [Depends(authorized)]

    @app.get("/health")
    def health() -> JSONResponse:
        if not engine.is_running:
            return _error(503, "the engine has stopped", "server_error")
        running = {"running": engine.num_requests, "most": engine.max_requests}
        return JSONResponse({"status": "ok", "requests": running})

    @app.get("/v1/models", dependencies=private)
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.model_card]}

    @app.get("/v1/models/{model:path}", dependencies=private)
    def model(model: str) -> dict[str, Any]:
        service.check_model(model)
        return service.model_card

    @app.post("/v1/chat/completions", dependencies=private)
    async def chat(body: ChatRequest, http: Request) -> Response:
        prompt = await asyncio.to_thread(service.chat_prompt, body)
        most = body.max_completion_tokens or body.max_tokens
        return await service.respond(body, [prompt], most, Answer("chat.completion", name), http)

    @app.post("/v1/completions", dependencies=private)
    async def completions(body: CompletionRequest, http: Request) -> Response:
        prompts = await asyncio.to_thread(service.prompts, body)
        most = body.max_tokens or COMPLETION_TOKENS
        return await service.respond(body, prompts, most, Answer("text_completion", name), http)

    _handle_errors(app)
    return app


class _Service:
    """What the routes share: one engine, one tokenizer, one model's name."""

    def __init__(self, engine: Engine, tokenizer: Any, name: str) -> None:
        self._engine, self._tokenizer, self._name = engine, tokenizer, name
        self.model_card = {"id": name, "object": "model", "created": 0, "owned_by": "halfweight"}

    def check_model(self, asked: str) -> None:
        """404 for a model that is not this one; no name means this one."""
        if asked not in ("", self._name):
            raise HTTPException(404, f"model {asked!r} is not served; this is {self._name!r}")

    def chat_prompt(self, body: ChatRequest) -> list[int]:
        """Token ids of a conversation, by the model's own template."""
        if self._tokenizer.chat_template is None:
            raise UsageError("this model has no chat template", hint="use /v1/completions")
        try:
            messages = [message.as_text for message in body.messages]
            text = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:
            raise UsageError(f"messages: {error}", hint="see the model's chat template") from error
        return self._encode(text, add_special_tokens=False)

    def prompts(self, body: CompletionRequest) -> list[list[int]]:
        """Token ids of each prompt."""
        return [
            self._encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt
            for prompt in body.prompts
        ]

    async def respond(
        self,
        body: schema.Request,
        prompts: Sequence[list[int]],
        most: int | None,
        answer: Answer,
        http: Request,
    ) -> Response:
        """Check all, then generate `body.n` choices for each prompt."""
        self.check_model(body.model)
        if body.unsupported is not None:
            raise UsageError(f"{body.unsupported!r} is not supported", hint="leave it out")
        jobs = self._jobs(prompts, body.n, most)
        num_prompt_tokens = sum(map(len, prompts))
        pieces = _merged([self._pieces(job, body) for job in jobs])
        if body.stream:
            first = await anext(pieces)
            events = _events(body, answer, first, pieces, num_prompt_tokens)
            return StreamingResponse(events, media_type="text/event-stream")
        collecting = asyncio.create_task(_collect(pieces, answer, num_prompt_tokens))
        return JSONResponse(await _unless_disconnected(collecting, http))

    def _jobs(self, prompts: Sequence[list[int]], n: int, most: int | None) -> list[_Job]:
        if len(prompts) * n > self._engine.max_requests:
            raise UsageError(
                f"{len(prompts)} prompts with n={n} are more than {self._engine.max_requests}",
                hint="send fewer at a time",
            )
        repeated = [prompt for prompt in prompts for _ in range(n)]
        jobs = []
        for index, prompt in enumerate(repeated):
            room = self._engine.room(prompt)
            num_tokens = most or max(1, min(CHAT_TOKENS, room))
            self._engine.check(prompt, num_tokens)
            jobs.append(_Job(index, prompt, num_tokens))
        return jobs

    async def _pieces(self, job: _Job, body: schema.Request) -> AsyncGenerator[_Piece]:
        """One choice, as it comes."""
        text = TextStream(self._tokenizer, body.stops)
        num_tokens, reason = 0, "length"
        tokens = self._engine.tokens(job.prompt, job.max_new_tokens, body.sampling)
        async with aclosing(tokens):
            async for token in tokens:
                num_tokens += 1
                if token in self._engine.stops:
                    reason = "stop"
                    break
                new = text.add(token)
                if text.stopped:
                    yield _Piece(job.index, new, "stop", num_tokens)
                    return
                yield _Piece(job.index, new, None, num_tokens)
        rest = text.finish()
        yield _Piece(job.index, rest, "stop" if text.stopped else reason, num_tokens)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return ids


async def _merged(streams: Sequence[AsyncGenerator[_Piece]]) -> AsyncGenerator[_Piece]:
    """Pieces of all streams as they come; closing it closes them, the first error ends all."""
    queue: asyncio.Queue[_Piece | Exception | None] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[_Piece]) -> None:
        try:
            async with aclosing(stream):
                async for piece in stream:
                    queue.put_nowait(piece)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        num_left = len(tasks)
        while num_left:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _collect(
    pieces: AsyncGenerator[_Piece], answer: Answer, num_prompt_tokens: int
) -> dict[str, Any]:
    texts: dict[int, str] = {}
    last: dict[int, _Piece] = {}
    async with aclosing(pieces):
        async for piece in pieces:
            texts[piece.index] = texts.get(piece.index, "") + piece.text
            last[piece.index] = piece
    choices = [answer.choice(i, texts[i], last[i].reason or "length") for i in sorted(texts)]
    num_tokens = sum(piece.num_tokens for piece in last.values())
    return answer.whole(choices, schema.usage(num_prompt_tokens, num_tokens))


async def _unless_disconnected(task: asyncio.Task[dict[str, Any]], http: Request) -> dict[str, Any]:
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=DISCONNECT_POLL_SECONDS)
            if not task.done() and await http.is_disconnected():
                raise HTTPException(499, "the client went away")
    finally:
        task.cancel()
    return await task


async def _events(
    body: schema.Request,
    answer: Answer,
    first: _Piece,
    rest: AsyncGenerator[_Piece],
    num_prompt_tokens: int,
) -> AsyncIterator[str]:
    """Server-sent events: a delta a piece, then the usage if asked for, then [DONE]."""
    begun: set[int] = set()
    counts: dict[int, int] = {}
    async with aclosing(rest):
        try:
            async for piece in _chain(first, rest):
                counts[piece.index] = piece.num_tokens
                for delta in _deltas(answer, piece, first=piece.index not in begun):
                    yield _event(answer.chunk([delta]))
                begun.add(piece.index)
        except HalfweightError as error:
            yield _event(_error_body(error.message, "server_error"))
            return
    if body.includes_usage:
        total = schema.usage(num_prompt_tokens, sum(counts.values()))
        yield _event(answer.chunk([], total))
    yield "data: [DONE]\n\n"


async def _chain(first: _Piece, rest: AsyncGenerator[_Piece]) -> AsyncIterator[_Piece]:
    yield first
    async for piece in rest:
        yield piece


def _deltas(answer: Answer, piece: _Piece, *, first: bool) -> list[dict[str, Any]]:
    """Text if there is some (or the role is due), then the reason by itself."""
    found = []
    if piece.text or first:
        found.append(answer.delta(piece.index, piece.text, first=first))
    if piece.reason is not None:
        found.append(answer.delta(piece.index, None, piece.reason))
    return found


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(HalfweightError)
    async def known(_: Request, error: HalfweightError) -> JSONResponse:
        if isinstance(error, UsageError):
            return _error(400, f"{error.message} ({error.hint})", "invalid_request_error")
        if isinstance(error, OverloadedError):
            return _error(429, error.message, "rate_limit_error", {"Retry-After": "1"})
        status = 503 if isinstance(error, EngineStoppedError) else 500
        return _error(status, error.message, "server_error")

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return _error(400, f"{where or 'body'}: {first['msg']}", "invalid_request_error")

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> JSONResponse:
        kind = "authentication_error" if error.status_code == 401 else "invalid_request_error"
        return _error(error.status_code, str(error.detail), kind)


def _error(
    status: int, message: str, kind: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    return JSONResponse(_error_body(message, kind), status, headers)


def _error_body(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}

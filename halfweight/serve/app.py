"""The routes of OpenAI's API over one engine: chat, completions, models, health, metrics.

A request becomes jobs, one for each choice; a job is a stream of the engine's pieces. What a client
sees is made of these, as one body or as events. A client that goes away cancels its jobs.
"""

from __future__ import annotations

import asyncio
import gc
import secrets
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from halfweight.engine.engine import Engine
from halfweight.engine.loop import EngineStoppedError
from halfweight.engine.request import Request as EngineRequest
from halfweight.engine.streams import Piece
from halfweight.errors import HalfweightError, UsageError
from halfweight.serve import schema
from halfweight.serve.logprobs import TokenNames
from halfweight.serve.metrics import Metrics
from halfweight.serve.schema import Answer, ChatRequest, CompletionRequest
from halfweight.serve.writer import INTERNAL, Job, Writer, error_body

COMPLETION_TOKENS = 16
"""Default of /v1/completions, as OpenAI's."""
MOST_REQUESTS = 1024
SHORT_BYTES = 8192
"""Of a request, up to which its jobs are made in less time than a thread would take to begin."""
SHORT_IDS_BYTES = 32768
"""The same of one whose prompts are token ids: there is nothing to turn into tokens."""
FEW_PROMPTS = 16
"""Of one request: each takes some 40 µs, however short it is."""
SWITCH_SECONDS = 0.001
"""How long the thread that talks to clients may keep Python from the engine's, which needs it many
times a step. Python's 5 ms are as long as a step of 64 sequences."""
T = TypeVar("T")
R = TypeVar("R", bound=schema.Request)


class OverloadedError(HalfweightError):
    """As many requests as the server takes are running or waiting: try again later."""


def build_app(
    engine: Engine,
    tokenizer: Any,
    name: str,
    *,
    api_key: str | None = None,
    max_requests: int = MOST_REQUESTS,
) -> FastAPI:
    """The application; it closes the engine when it ends. `name` is the model's in /v1/models.

    More than `max_requests` choices at a time, running and waiting, are answered with 429.
    """
    service = _Service(engine, tokenizer, name, max_requests)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        gc.collect()
        gc.freeze()  # a collection of all that is loaded by now would stop every stream for 0.1 s
        switch_seconds = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_SECONDS)
        yield
        await asyncio.to_thread(engine.close)
        sys.setswitchinterval(switch_seconds)
        gc.unfreeze()

    async def authorized(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if api_key is not None and not secrets.compare_digest(given.encode(), api_key.encode()):
            raise HTTPException(401, "the API key is missing or wrong")

    app = FastAPI(title="halfweight", lifespan=lifespan, docs_url=None, redoc_url=None)
    private = [Depends(authorized)]

    @app.get("/health")
    def health() -> JSONResponse:
        if engine.fault is not None:
            return _error(503, engine.fault.message, "server_error")
        running = {"running": engine.num_requests, "most": max_requests}
        return JSONResponse({"status": "ok", "requests": running})

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(*service.metrics.page(engine.num_requests))

    @app.get("/v1/models", dependencies=private)
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.model_card]}

    @app.get("/v1/models/{model:path}", dependencies=private)
    def model(model: str) -> dict[str, Any]:
        service.check_model(model)
        return service.model_card

    @app.post("/v1/chat/completions", dependencies=private)
    async def chat(body: ChatRequest, http: Request) -> Response:
        jobs = await _made(service.chat_jobs, body, http)
        return await service.respond(body, jobs, Answer("chat.completion", name), http)

    @app.post("/v1/completions", dependencies=private)
    async def completions(body: CompletionRequest, http: Request) -> Response:
        jobs = await _made(service.completion_jobs, body, http)
        return await service.respond(body, jobs, Answer("text_completion", name), http)

    _handle_errors(app)
    return app


class _Service:
    """What the routes share: one engine, one tokenizer, one model's name."""

    def __init__(self, engine: Engine, tokenizer: Any, name: str, max_requests: int) -> None:
        self._engine, self._tokenizer, self._name = engine, tokenizer, name
        self._max_requests = max_requests
        self._names = TokenNames(tokenizer)
        self.metrics = Metrics()
        self.model_card = {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "halfweight",
            "max_model_len": engine.max_context,
        }

    def check_model(self, asked: str) -> None:
        """404 for a model that is not this one; no name means this one."""
        if asked not in ("", self._name):
            raise HTTPException(404, f"model {asked!r} is not served; this is {self._name!r}")

    def chat_jobs(self, body: ChatRequest) -> list[Job]:
        """The choices of a chat, its prompt by the model's own template."""
        messages = [message.as_text for message in body.messages]
        prompt = self._engine.chat_prompt(messages, **body.template)
        return self._jobs(body, [prompt], body.max_completion_tokens or body.max_tokens)

    def completion_jobs(self, body: CompletionRequest) -> list[Job]:
        """The choices of each prompt."""
        prompts = [
            self._engine.encode(prompt, add_special_tokens=body.add_special_tokens)
            if isinstance(prompt, str)
            else prompt
            for prompt in body.prompts
        ]
        most = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        return self._jobs(body, prompts, most, body.echo)

    def _jobs(
        self,
        body: schema.Request,
        prompts: Sequence[Sequence[int]],
        most: int | None,
        echo: bool = False,
    ) -> list[Job]:
        self.check_model(body.model)
        if len(prompts) * body.n > self._max_requests:
            raise UsageError(
                f"{len(prompts)} prompts with n={body.n} are more than {self._max_requests}",
                hint="send fewer at a time",
            )
        jobs: list[Job] = []
        for prompt in prompts:
            request = self._request(body, prompt, most, echo)
            for i in range(body.n):
                jobs.append(Job(len(jobs), _with_seed(request, i), echo))
        return jobs

    def _request(
        self, body: schema.Request, prompt: Sequence[int], most: int | None, echo: bool
    ) -> EngineRequest:
        stops = frozenset(body.stop_token_ids)
        if not body.ignore_eos:
            stops |= self._engine.stop_tokens
        if most == 0 and not echo:
            raise UsageError("max_tokens: 0 asks for nothing without echo", hint="give 1 or more")
        request = self._engine.request(
            prompt,
            max_new_tokens=None if most is None else max(1, most),
            stop=body.stop,
            include_stop=body.include_stop_str_in_output,
            stop_tokens=stops,
            prompt_logprobs=body.num_logprobs if echo else None,
            num_logprobs=body.num_logprobs,
            **(default_sampling(self._engine) | body.sampling),
        )
        self._engine.check(request)
        return request if most != 0 else replace(request, max_new_tokens=1)

    async def respond(
        self, body: schema.Request, jobs: Sequence[Job], answer: Answer, http: Request
    ) -> Response:
        """Generate every job's choice, as events or as one body."""
        running = self._engine.num_requests
        if running + len(jobs) > self._max_requests:
            raise OverloadedError(f"{running} requests are running", hint="retry later")
        writer = Writer(body, jobs, answer, self._names, self._tokenizer)
        pieces = _merged([self._pieces(job) for job in jobs])
        if body.stream:
            reading = asyncio.ensure_future(anext(pieces))
            first = await _unless_disconnected(reading, http)
            return StreamingResponse(writer.events(first, pieces), media_type="text/event-stream")
        collecting = asyncio.create_task(writer.collect(pieces))
        return JSONResponse(await _unless_disconnected(collecting, http))

    async def _pieces(self, job: Job) -> AsyncGenerator[tuple[int, Piece]]:
        """One choice, as it comes."""
        stream = self._engine.aopen(job.request)
        watch = self.metrics.watch(len(job.request.prompt))
        try:
            async with aclosing(stream.pieces()) as pieces:
                async for piece in pieces:
                    watch.see(piece)
                    if piece.error is not None:
                        raise piece.error
                    if piece.finish_reason == "cancelled":
                        raise EngineStoppedError("the engine was closed", hint="restart the server")
                    yield job.index, piece
        finally:
            watch.end()


def default_sampling(engine: Engine) -> dict[str, Any]:
    """Of requests that name none: the model's own, and 1 for a model that is not sampled."""
    sampling = engine.sampling
    if sampling.temperature == 0:
        return {"temperature": 1.0, "repetition_penalty": sampling.repetition_penalty}
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {name: getattr(sampling, name) for name in names}


def _with_seed(request: EngineRequest, choice: int) -> EngineRequest:
    """Of several choices with one seed each has its own."""
    seed = request.sampling.seed
    if seed is None or choice == 0:
        return request
    return replace(request, sampling=replace(request.sampling, seed=seed + choice))


async def _made(make: Callable[[R], list[Job]], body: R, http: Request) -> list[Job]:
    """The jobs of a request; a long text, many or a grammar keep no other stream waiting."""
    most_bytes = SHORT_BYTES if body.is_text else SHORT_IDS_BYTES
    num_bytes = int(http.headers.get("content-length", most_bytes + 1))
    is_short = num_bytes <= most_bytes and body.num_prompts <= FEW_PROMPTS
    if is_short and body.grammar is None:
        return make(body)
    return await asyncio.to_thread(make, body)


def _merged(
    streams: Sequence[AsyncGenerator[tuple[int, Piece]]],
) -> AsyncGenerator[tuple[int, Piece]]:
    """Pieces of all streams as they come; closing it closes them, the first error ends all."""
    return streams[0] if len(streams) == 1 else _interleaved(streams)


async def _interleaved(
    streams: Sequence[AsyncGenerator[tuple[int, Piece]]],
) -> AsyncGenerator[tuple[int, Piece]]:
    queue: asyncio.Queue[tuple[int, Piece] | Exception | None] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[tuple[int, Piece]]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    queue.put_nowait(item)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        num_left = len(tasks)
        while num_left:
            found = await queue.get()
            if isinstance(found, Exception):
                raise found
            if found is None:
                num_left -= 1
            else:
                yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _unless_disconnected(task: asyncio.Future[T], http: Request) -> T:
    """The task's result; it is cancelled as soon as the client goes away."""
    leaving = asyncio.ensure_future(http.receive())
    try:
        either: set[asyncio.Future[Any]] = {task, leaving}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(499, "the client went away")
        return task.result()
    finally:
        task.cancel()
        leaving.cancel()


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
        what = first["msg"].removeprefix("Value error, ")
        return _error(400, f"{where}: {what}" if where else what, "invalid_request_error")

    @app.exception_handler(Exception)
    async def unknown(_: Request, error: Exception) -> JSONResponse:
        return _error(500, INTERNAL, "server_error")

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> JSONResponse:
        kind = "authentication_error" if error.status_code == 401 else "invalid_request_error"
        return _error(error.status_code, str(error.detail), kind)


def _error(
    status: int, message: str, kind: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    return JSONResponse(error_body(message, kind), status, headers)

"""What a client sees: the pieces of a request's choices as one body, or as server-sent events."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec

from halfweight.engine.request import Request
from halfweight.engine.streams import Completion, Piece
from halfweight.errors import HalfweightError
from halfweight.serve import schema
from halfweight.serve.logprobs import TokenNames
from halfweight.serve.schema import Answer

INTERNAL = "the server failed; see its log"
log = logging.getLogger("halfweight")


@dataclass(frozen=True)
class Job:
    """One choice to generate: what the engine runs, and what the client asked to see of it."""

    index: int
    request: Request
    echo: bool


class Writer:
    """The answer to one request, from the pieces of its choices."""

    def __init__(
        self,
        body: schema.Request,
        jobs: Sequence[Job],
        answer: Answer,
        names: TokenNames,
        tokenizer: Any,
    ) -> None:
        self._body, self._jobs, self._answer = body, jobs, answer
        self._names, self._tokenizer = names, tokenizer
        self._wants_new = body.max_tokens != 0
        self._begun: set[int] = set()
        self._num_tokens = self._num_cached = 0

    async def collect(self, pieces: AsyncGenerator[tuple[int, Piece]]) -> dict[str, Any]:
        """The body of a response that is not streamed."""
        found: dict[int, list[Piece]] = {job.index: [] for job in self._jobs}
        async with aclosing(pieces):
            async for index, piece in pieces:
                found[index].append(piece)
        wholes = {index: Completion.of(parts) for index, parts in found.items()}
        choices = [self._choice(job, wholes[job.index]) for job in self._jobs]
        counts = sum(self._num_new(whole) for whole in wholes.values())
        cached = sum(whole.num_shared_tokens for whole in wholes.values())
        return self._answer.whole(choices, schema.usage(self._num_prompt_tokens, counts, cached))

    async def events(
        self, first: tuple[int, Piece], rest: AsyncGenerator[tuple[int, Piece]]
    ) -> AsyncIterator[bytes]:
        """Server-sent events: a delta a piece, then the usage if asked for, then [DONE]."""
        async with aclosing(rest):
            try:
                yield self._events(*first)
                async for index, piece in rest:
                    events = self._events(index, piece)
                    if events:
                        yield events
            except HalfweightError as error:
                yield _event(error_body(error.message, "server_error"))
                return
            except Exception:
                log.exception("a stream failed")
                yield _event(error_body(INTERNAL, "server_error"))
                return
        if self._body.stream_options.include_usage:
            total = schema.usage(self._num_prompt_tokens, self._num_tokens, self._num_cached)
            yield _event(self._answer.chunk([], total))
        yield b"data: [DONE]\n\n"

    def _events(self, index: int, piece: Piece) -> bytes:
        """The events of a piece, often one; its tokens are counted."""
        self._num_tokens += self._num_new(piece)
        self._num_cached += piece.num_shared_tokens
        deltas = self._deltas(self._jobs[index], piece, first=index not in self._begun)
        self._begun.add(index)
        return b"".join(_event(self._answer.chunk([delta])) for delta in deltas)

    def _num_new(self, piece: Piece) -> int:
        """New tokens, the stop token included; none of a request that only echoes."""
        return len(piece.tokens) + isinstance(piece.stop, int) if self._wants_new else 0

    @property
    def _num_prompt_tokens(self) -> int:
        return sum(len(job.request.prompt) for job in self._jobs[:: self._body.n])

    def _choice(self, job: Job, whole: Piece) -> dict[str, Any]:
        reason = whole.finish_reason if self._wants_new else "length"
        text = whole.text if self._wants_new else ""
        if job.echo:
            text = self._prompt_text(job) + text
        logprobs = self._logprobs(job, whole, first=True)
        stop = self._stop_reason(whole)
        return self._answer.choice(job.index, text, str(reason), stop, logprobs)

    def _deltas(self, job: Job, piece: Piece, *, first: bool) -> list[dict[str, Any]]:
        """Text if there is some (or the role is due), then the reason by itself."""
        found = []
        text = piece.text if self._wants_new else ""
        if job.echo and first:
            text = self._prompt_text(job) + text
        logprobs = self._logprobs(job, piece, first=first)
        if text or first or logprobs is not None:
            delta = self._answer.delta(job.index, text, None, logprobs, first=first)
            found.append(delta)
        if piece.finish_reason is not None:
            reason = piece.finish_reason if self._wants_new else "length"
            last = self._answer.delta(job.index, None, reason)
            found.append(last | {"stop_reason": self._stop_reason(piece)})
        return found

    def _stop_reason(self, piece: Piece) -> int | str | None:
        """The string or token that ended a text, of those asked for; not the model's own end."""
        asked = isinstance(piece.stop, str) or piece.stop in self._body.stop_token_ids
        return piece.stop if asked else None

    def _logprobs(self, job: Job, piece: Piece, *, first: bool) -> dict[str, Any] | None:
        """Those of a piece's tokens, and before the first those of an echoed prompt."""
        if self._body.num_logprobs is None:
            return None
        entries = list(piece.logprobs) if self._wants_new else []
        if self._answer.is_chat:
            return self._names.chat(entries) if entries else None
        ids = [entry.token for entry in entries]
        if job.echo and first:
            return self._names.text_completion(
                [*piece.prompt_logprobs, *entries], [*job.request.prompt, *ids]
            )
        return self._names.text_completion(entries, ids) if entries else None

    def _prompt_text(self, job: Job) -> str:
        return str(self._tokenizer.decode(job.request.prompt, skip_special_tokens=True))


_encode = msgspec.json.Encoder().encode


def _event(body: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % _encode(body)


def error_body(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}

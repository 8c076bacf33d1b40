"""A model that answers: load it once, then ask from any thread, one prompt or many at a time.

    with Engine("folder-or-hub-id", device="cuda") as engine:
        print(engine.generate("The capital of France is", max_new_tokens=8).text)

        for text in engine.stream("Once upon a time", temperature=0.8, seed=1):
            print(text, end="", flush=True)

        messages = [{"role": "user", "content": "Hello!"}]
        answer = engine.chat(messages)
        messages += [{"role": "assistant", "content": answer.text}]

Prompts are text or token ids, in a list, an array or a tensor. Requests of all callers run
together; texts that begin alike (turns of one chat, questions about one document) are read once.
What a call does not say about sampling is as the model's generation_config.json says.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import (
    AsyncIterator,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing
from dataclasses import fields as fields_of
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload
from weakref import finalize

import torch

from halfweight.engine.loop import EngineStoppedError, Loop, OnOutput
from halfweight.engine.parts import Parts, make_parts
from halfweight.engine.prompts import (
    Message,
    Prompt,
    encode,
    encode_chat,
    is_one,
    stop_ids,
    stop_strings,
)
from halfweight.engine.request import Request, Sampling
from halfweight.engine.runners import describe
from halfweight.engine.sequence import MakeDrafter
from halfweight.engine.step import KvCache, Runner
from halfweight.engine.streams import AsyncStream, Completion, Piece, Stream, complete
from halfweight.engine.text import Detokenizer
from halfweight.errors import HalfweightError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from halfweight.engine.parallel.ranks import Member
    from halfweight.engine.sampler import Sampler

NEW_TOKENS = 1024
"""Most new tokens of a request that names no number, where the context has room."""
SAMPLING_HINT = "halfweight.Sampling(temperature=0.7), or its fields by name"
_OPTIONS = {"max_new_tokens", "stop", "include_stop", "stop_tokens", "prompt_logprobs"}
_SAMPLING_FIELDS = frozenset(field.name for field in fields_of(Sampling))


class Engine:
    """Generates for requests of one model, until `close`.

    Options of every call, besides the fields of `Sampling` by name:

    - `sampling`, also as the second argument: a `Sampling` in place of the model's defaults; single
      fields go on top.
    - `max_new_tokens`: by default 1,024, or what the context has room for.
    - `stop`: a string or several that end the text; it ends before them.
    - `include_stop`: keep the stop string in the text.
    - `stop_tokens`: ids that end it, in place of the model's own; empty for none.
    - `prompt_logprobs`: logprobs of the prompt's tokens, with so many of the likeliest.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel,
        *,
        tokenizer: Any = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        activations: Literal["exact", "int8"] = "exact",
        max_context: int | None = None,
        max_sequences: int | None = None,
        cache_tokens: int | None = None,
        kv_cache: KvCache = "16bit",
        speculates: bool = True,
        tensor_parallel: int = 1,
        devices: Sequence[str] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Load a folder or Hub id, or take a model that is loaded already, and start.

        `device`, `dtype`, `backend` and `activations` are those of `halfweight.load`, the device by
        default the GPU if there is one. `max_context` tokens a sequence, `max_sequences` at once
        and `cache_tokens` in all are chosen by model, device and free memory where not given.
        `tokenizer` is by default the model's own. With `speculates` text that repeats is guessed
        and checked, several tokens a step; that changes no answer. With `tensor_parallel` several
        processes run the model together, each on one of `devices`, by default on as many GPUs, and
        on the CPU where there is none. Without it `devices` hold the layers one after the other, as
        many as there is room for ("cuda:0", "cuda:1", "cpu"; ["auto"] is all GPUs, then the CPU).
        Raises what `halfweight.load` and `make_runner` do, and RankError where one of several ranks
        is lost.
        """
        loading: dict[str, Any] = {
            "device": device,
            "dtype": dtype,
            "backend": backend,
            "activations": activations,
            "progress": progress,
        }
        limits: dict[str, Any] = {
            "max_context": max_context,
            "max_sequences": max_sequences,
            "cache_tokens": cache_tokens,
            "kv_cache": kv_cache,
        }
        parts = make_parts(model, tokenizer, loading, limits, tensor_parallel, devices)
        self._start(parts, speculates=speculates)

    @classmethod
    def over(
        cls,
        runner: Runner,
        sampler: Sampler,
        tokenizer: Any,
        *,
        stop_tokens: frozenset[int] = frozenset(),
        sampling: Sampling | None = None,
        speculates: bool = False,
    ) -> Engine:
        """An engine of parts made elsewhere; it closes the runner."""
        engine = cls.__new__(cls)
        parts = Parts(runner, sampler, tokenizer, stop_tokens, sampling or Sampling())
        engine._start(parts, speculates=speculates)
        return engine

    def _start(self, parts: Parts, *, speculates: bool) -> None:
        runner = parts.runner
        make_drafter: MakeDrafter | None = None
        if speculates and runner.most_drafts:
            from halfweight.engine.speculation import PromptLookup

            make_drafter = PromptLookup
        self.tokenizer, self.sampling = parts.tokenizer, parts.sampling
        self._name = parts.name
        known = (token for token in parts.stop_tokens if 0 <= token < runner.vocab_size)
        self.stop_tokens = frozenset(known)
        """Ids that end a text, of those that the model can generate."""
        self.max_sequences, self.description = runner.max_sequences, describe(runner)
        self.ranks: Sequence[Member] = getattr(runner, "members", ())
        """Of several ranks those beside this process, which is rank 0."""
        self._detokenizer = None if self.tokenizer is None else Detokenizer(self.tokenizer)
        self._loop = Loop(
            runner, parts.sampler, stop_tokens=self.stop_tokens, make_drafter=make_drafter
        )
        self.max_context = self._loop.room(0)
        """Tokens of the longest sequence, by the model's context and by the cache."""
        self._loop.start()
        self._stop = finalize(self, self._loop.stop)

    def close(self) -> None:
        """End the engine: requests that have not ended are cancelled, the cache is freed."""
        self._stop()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def fault(self) -> HalfweightError | None:
        """Why no request can run any more: a step failed, or it was closed. None while they can."""
        return self._loop.fault

    @property
    def num_requests(self) -> int:
        """Requests that have not ended, running or waiting."""
        return self._loop.num_requests

    def submit(self, request: Request, on_output: OnOutput) -> int:
        """Run a request of token ids; its number. `on_output` is called on the engine's thread.

        Raises UsageError for what can never run, EngineStoppedError when nothing can.
        """
        return self._loop.submit(request, on_output)

    def cancel(self, number: int) -> None:
        """End a request within a step; nothing happens if it has ended."""
        self._loop.cancel(number)

    def open(self, request: Request) -> Stream:
        """Pieces of a request: text, tokens, logprobs and the reason at the end."""
        return Stream(self._loop, request, self._detokenizer, self)

    def aopen(self, request: Request) -> AsyncStream:
        """The same, for `async for`."""
        return AsyncStream(self._loop, request, self._detokenizer, self)

    @overload
    def generate(
        self, prompts: Prompt, sampling: Sampling | None = None, **options: Any
    ) -> Completion: ...

    @overload
    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling | None = None, **options: Any
    ) -> list[Completion]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling | None = None,
        **options: Any,
    ) -> Completion | list[Completion]:
        """What follows one prompt, or each of several.

        >>> engine.generate("The capital of France is", max_new_tokens=4).text
        >>> [answer.text for answer in engine.generate(["One", "Two"], temperature=1.0, seed=3)]

        A text whose logits hold a NaN has the finish_reason "nan" and an error; one that `close`
        cut short is "cancelled". Raises UsageError for a prompt that can never run,
        EngineStoppedError when a step fails, and for what is asked later.
        """
        found = complete(self._loop, self._requests(prompts, sampling, options), self._detokenizer)
        return found[0] if is_one(prompts) else found

    def stream(
        self, prompt: Prompt, sampling: Sampling | None = None, **options: Any
    ) -> Iterator[str]:
        """The text that follows a prompt, in pieces as it is made. Leaving the loop cancels it.

        >>> for text in engine.stream("Once upon a time"):
        ...     print(text, end="", flush=True)

        Raises as `generate`; NanLogitsError; and EngineStoppedError where `close` cuts it short.
        """
        self._require_tokenizer("streams of text", hint="`open` streams token ids")
        return _texts(self.open(self.request(prompt, sampling, **options)))

    def chat(
        self, messages: Sequence[Message], sampling: Sampling | None = None, **options: Any
    ) -> Completion:
        """The next turn of a conversation, by the model's chat template.

        >>> engine.chat([{"role": "user", "content": "Hello!"}], temperature=0.7).text

        Only what is new since the last turn is read. Raises as `generate`.
        """
        return self.generate(self.chat_prompt(messages), sampling, **options)

    @overload
    async def agenerate(
        self, prompts: Prompt, sampling: Sampling | None = None, **options: Any
    ) -> Completion: ...

    @overload
    async def agenerate(
        self, prompts: Sequence[Prompt], sampling: Sampling | None = None, **options: Any
    ) -> list[Completion]: ...

    async def agenerate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling | None = None,
        **options: Any,
    ) -> Completion | list[Completion]:
        """As `generate`; cancelling the task cancels what it asked for."""
        streams = [self.aopen(request) for request in self._requests(prompts, sampling, options)]
        found = await asyncio.gather(*map(_joined, streams))
        return found[0] if is_one(prompts) else list(found)

    async def astream(
        self, prompt: Prompt, sampling: Sampling | None = None, **options: Any
    ) -> AsyncIterator[str]:
        """As `stream`.

        >>> async for text in engine.astream("Once upon a time"):
        ...     print(text, end="", flush=True)
        """
        self._require_tokenizer("streams of text", hint="`open` streams token ids")
        async with aclosing(
            self.aopen(self.request(prompt, sampling, **options)).pieces()
        ) as pieces:
            async for piece in pieces:
                text = _text_of(piece)
                if text:
                    yield text

    async def achat(
        self, messages: Sequence[Message], sampling: Sampling | None = None, **options: Any
    ) -> Completion:
        """As `chat`."""
        return await self.agenerate(self.chat_prompt(messages), sampling, **options)

    def request(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        max_new_tokens: int | None = None,
        stop: str | Collection[str] = (),
        include_stop: bool = False,
        stop_tokens: Iterable[int] | None = None,
        prompt_logprobs: int | None = None,
        **fields: Any,
    ) -> Request:
        """The request that a call with these options makes; see the class for what they are."""
        unknown = fields.keys() - _SAMPLING_FIELDS
        if unknown:
            raise UsageError(
                f"unknown option {min(unknown)!r}",
                hint=f"options are {', '.join(sorted({'sampling', *_OPTIONS, *_SAMPLING_FIELDS}))}",
            )
        if not isinstance(sampling, Sampling | None):
            raise UsageError(f"sampling is {sampling!r}, expected a Sampling", hint=SAMPLING_HINT)
        ids = self.encode(prompt)
        stops = stop_strings(stop)
        if stops:
            self._require_tokenizer("stop strings", hint="use stop_tokens")
        if max_new_tokens is None:
            max_new_tokens = max(1, min(NEW_TOKENS, self._loop.room(len(ids))))
        return Request(
            ids,
            max_new_tokens,
            replace(self.sampling if sampling is None else sampling, **fields),
            stop_tokens=None if stop_tokens is None else stop_ids(stop_tokens),
            stop_strings=stops,
            include_stop=include_stop,
            prompt_logprobs=prompt_logprobs,
        )

    def chat_prompt(self, messages: Sequence[Message], /, **template: Any) -> list[int]:
        """Token ids of a conversation that the model is to continue with an answer.

        `template` goes to the chat template: `tools`, `enable_thinking`, ... Raises UsageError
        where the template refuses, CheckpointError where it is no valid one.
        """
        self._require_tokenizer("messages", hint="use generate with token ids, or add its files")
        return encode_chat(self.tokenizer, messages, **template)

    def encode(self, prompt: Prompt, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a prompt. A text that begins with the BOS is not given a second one.

        Raises UsageError for a text where there is no tokenizer.
        """
        if isinstance(prompt, str):
            self._require_tokenizer("text", hint="give token ids, or add the tokenizer's files")
        return encode(self.tokenizer, prompt, add_special_tokens=add_special_tokens)

    def check(self, request: Request) -> None:
        """Raise UsageError for what can never run, before anything does."""
        self._loop.check(request)

    def _require_tokenizer(self, what: str, *, hint: str) -> None:
        if self.tokenizer is None:
            raise UsageError(f"{self._name}: found no tokenizer, needed for {what}", hint=hint)

    def _requests(
        self, prompts: Any, sampling: Sampling | None, options: Mapping[str, Any]
    ) -> list[Request]:
        """Requests of one prompt or of many; then an error says which of them it is about."""
        if is_one(prompts):
            return [self.request(prompts, sampling, **options)]
        requests = []
        for i, prompt in enumerate(prompts):
            try:
                requests.append(self.request(prompt, sampling, **options))
                self._loop.check(requests[-1])
            except UsageError as error:
                raise UsageError(f"prompt {i}: {error.message}", hint=error.hint) from None
        return requests


def _text_of(piece: Piece) -> str:
    if piece.error is not None:
        raise piece.error
    if piece.finish_reason == "cancelled":
        raise EngineStoppedError("the engine was closed", hint="make a new one")
    return piece.text


def _texts(pieces: Iterable[Piece]) -> Iterator[str]:
    return filter(None, map(_text_of, pieces))


async def _joined(pieces: AsyncStream) -> Completion:
    return Completion.of([piece async for piece in pieces])

"""One model, many requests: transformers' continuous batching, as a stream of tokens a request.

Requests join and leave the running batch token by token. What is added here:

- Admission. At most `max_requests` are in the engine; the next is refused at once.
- NaN. A forward hook widens the logits by one column, the NaN token: impossible in a healthy row,
  certain in a row with a NaN, and a stop token of every request. Attention under one mask spreads a
  NaN (0 * NaN) to requests that share the step, so each request that draws it is run once more,
  alone, from where it was; the one that draws it again is at fault and fails. For the same reason
  requests share no cached prefix.
- Greedy. Sampling parameters go with each request: temperature 0 keeps the one likeliest token.
"""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from halfweight.engine.decoder import Sampling, check_prompts, model_stop_tokens
from halfweight.errors import HalfweightError, UsageError
from halfweight.memory.architecture import context_tokens

MOST_TOKENS = 1 << 31
"""Where neither model nor cache sets a limit."""

PAGE_TOKENS = 64
CPU_CACHE_TOKENS = 16384
"""Tokens of KV cache where there is no device memory to measure."""


class OverloadedError(HalfweightError):
    """As many requests as the engine takes are running: try again later."""


class EngineStoppedError(HalfweightError):
    """The engine's thread has ended; no request can run."""


class NanLogitsError(HalfweightError):
    """A request's logits hold NaN; that request ends."""


class Engine:
    """Generates for requests of one model, from `start` to `stop`."""

    def __init__(
        self, model: PreTrainedModel, *, max_requests: int = 64, cache_tokens: int | None = None
    ) -> None:
        """`cache_tokens` of KV cache in all; by default what the device has room for."""
        self.model = model
        self.max_requests = max_requests
        self.num_requests = 0
        self.stops = frozenset(model_stop_tokens(model))
        self._vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
        if cache_tokens is None and model.device.type != "cuda":
            cache_tokens = CPU_CACHE_TOKENS
        self._cache_tokens = cache_tokens
        self._turns = _Turns()
        self._hooks = _mark_nan(model, self._vocabulary)
        self._manager = self._make_manager()

    def start(self) -> None:
        """Start the engine's thread."""
        self._manager.start()

    def stop(self) -> None:
        """End the engine's thread and leave the model as it was."""
        self._manager.stop(block=True)
        for hook in self._hooks:
            hook.remove()

    @property
    def is_running(self) -> bool:
        """Whether requests can run."""
        return bool(self._manager.is_running())

    def room(self, prompt: list[int]) -> int:
        """New tokens that context and cache have room for after a prompt; may be negative."""
        context = context_tokens(self.model.config.get_text_config(decoder=True).to_dict())
        limits = [limit for limit in (context, self._cache_tokens) if limit is not None]
        return min(limits, default=MOST_TOKENS) - len(prompt)

    def check(self, prompt: list[int], max_new_tokens: int) -> None:
        """Raise UsageError for lengths and token ids that cannot run, before anything does."""
        check_prompts(self.model, [prompt], max_new_tokens)
        needed = len(prompt) + max_new_tokens
        if self._cache_tokens is not None and needed > self._cache_tokens:
            raise UsageError(
                f"prompt and new tokens are {needed}, the cache holds {self._cache_tokens}",
                hint="shorten the prompt, ask for fewer tokens or start with more --cache-tokens",
            )

    async def tokens(
        self, prompt: list[int], max_new_tokens: int, sampling: Sampling
    ) -> AsyncGenerator[int]:
        """The new tokens of one request, the stop token included. Closing the iterator frees it.

        Raises OverloadedError, EngineStoppedError or NanLogitsError.
        """
        if not self.is_running:
            raise EngineStoppedError("the engine has stopped", hint="restart the server")
        if self.num_requests >= self.max_requests:
            raise OverloadedError(f"{self.num_requests} requests are running", hint="retry later")
        self.num_requests += 1
        seen: list[int] = []
        try:
            for alone in (False, True):
                async with self._turns.take(alone=alone):
                    left = max_new_tokens - len(seen)
                    attempt = self._attempt(prompt + seen, left, sampling)
                    async with aclosing(attempt):
                        async for token in attempt:
                            if token == self._vocabulary:
                                break
                            seen.append(token)
                            yield token
                        else:
                            return
            raise NanLogitsError(
                f"the model's logits are NaN after {len(prompt) + len(seen)} tokens",
                hint="verify the model's files; float16 overflows where bfloat16 does not",
            )
        finally:
            self.num_requests -= 1

    async def _attempt(
        self, prompt: list[int], max_new_tokens: int, sampling: Sampling
    ) -> AsyncGenerator[int]:
        """Tokens as the manager delivers them; the request is cancelled if not read to the end."""
        name, outputs = uuid.uuid4().hex, asyncio.Queue[Any]()
        self._manager.register_result_handler(name, outputs.put_nowait)
        self._manager.add_request(
            prompt,
            request_id=name,
            max_new_tokens=max_new_tokens,
            streaming=True,
            eos_token_id=[*self.stops, self._vocabulary],
            **self._processing(sampling),
        )
        num_seen = 0
        try:
            while True:
                output = await self._next(outputs)
                if output.error is not None:
                    raise EngineStoppedError(f"the engine failed: {output.error}", hint="see log")
                for token in output.generated_tokens[num_seen:]:
                    yield token
                num_seen = len(output.generated_tokens)
                if output.is_finished():
                    name = ""
                    return
        finally:
            if name:
                self._manager.cancel_request(name)
                self._manager.output_router.result_handlers.pop(name, None)

    async def _next(self, outputs: asyncio.Queue[Any]) -> Any:
        while True:
            try:
                return await asyncio.wait_for(outputs.get(), timeout=1.0)
            except TimeoutError:
                if not self.is_running:
                    raise EngineStoppedError("the engine has stopped", hint="see log") from None

    def _processing(self, sampling: Sampling) -> dict[str, Any]:
        if sampling.temperature == 0:
            return {"temperature": 1.0, "top_k": 1, "top_p": 0.0}
        return {
            "temperature": float(sampling.temperature),
            "top_k": sampling.top_k or self._vocabulary + 1,
            "top_p": float(sampling.top_p),
        }

    def _make_manager(self) -> Any:
        # Values that make transformers build all three processors; every request brings its own.
        defaults = GenerationConfig(do_sample=True, temperature=0.5, top_k=50, top_p=0.5)
        defaults.pad_token_id = 0
        blocks = None if self._cache_tokens is None else -(-self._cache_tokens // PAGE_TOKENS)
        batching = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=blocks,
            max_requests_per_batch=self.max_requests,
            per_request_processors=True,
            allow_block_sharing=False,
        )
        return self.model.init_continuous_batching(
            generation_config=defaults, continuous_batching_config=batching
        )


def _mark_nan(model: PreTrainedModel, vocabulary: int) -> list[Any]:
    """Hooks that add the NaN token to the logits, and keep it from being read as a token."""

    def widen(_: Any, __: Any, out: Any) -> Any:
        bad: Tensor = out.logits.isnan().any(dim=-1, keepdim=True)
        nan_token = torch.where(bad, 0.0, -math.inf).to(out.logits.dtype)
        out.logits = torch.cat([out.logits.masked_fill(bad, -math.inf), nan_token], dim=-1)
        return out

    def narrow(_: Any, arguments: Any, named: dict[str, Any]) -> Any:
        return arguments, named | {"input_ids": named["input_ids"].clamp(max=vocabulary - 1)}

    return [
        model.register_forward_hook(widen),
        model.register_forward_pre_hook(narrow, with_kwargs=True),
    ]


class _Turns:
    """Many at once, or one alone; who wants to be alone goes before who comes later."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._num_inside = 0
        self._num_waiting_alone = 0
        self._is_alone = False

    @asynccontextmanager
    async def take(self, *, alone: bool) -> AsyncIterator[None]:
        async with self._changed:
            self._num_waiting_alone += alone
            try:
                await self._changed.wait_for(lambda: self._is_free(alone))
            finally:
                self._num_waiting_alone -= alone
            self._num_inside += 1
            self._is_alone = alone
        try:
            yield
        finally:
            async with self._changed:
                self._num_inside -= 1
                self._is_alone = False
                self._changed.notify_all()

    def _is_free(self, alone: bool) -> bool:
        if alone:
            return self._num_inside == 0
        return not self._is_alone and self._num_waiting_alone == 0

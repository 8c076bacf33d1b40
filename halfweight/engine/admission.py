"""What can never run is refused when it is asked for, on the thread of who asks.

Whatever gets past here must not be able to fail a step: a step that fails ends the engine for all.
The ranges of `Sampling` are checked as it is made (request.py); here is what depends on the model.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from numbers import Integral
from typing import Any

from halfweight.engine.request import Request
from halfweight.engine.step import Runner
from halfweight.errors import UsageError


def check(request: Request, runner: Runner, most_tokens: int) -> None:
    """Raise UsageError for a request that a runner can never run.

    `most_tokens` is the length of the longest sequence.
    """
    if not request.prompt:
        raise UsageError("the prompt has no tokens", hint="give it at least one")
    _check_prompt(request, runner.vocab_size)
    _check_ids("stop_tokens", request.stop_tokens or (), runner.vocab_size)
    _check_whole("max_new_tokens", request.max_new_tokens)
    _check_prompt_logprobs(request.prompt_logprobs, runner.vocab_size)
    least = 0 if request.prompt_logprobs is not None else 1
    if request.max_new_tokens < least:
        raise UsageError(
            f"max_new_tokens is {request.max_new_tokens}, expected at least {least}",
            hint="ask for more",
        )
    _check_length(request, runner.max_context, most_tokens)


def _check_prompt(request: Request, vocab_size: int) -> None:
    with suppress(OverflowError, TypeError):  # which is told below
        if request.ids.min() >= 0 and request.ids.max() < vocab_size:
            return
    _check_ids("the prompt", request.prompt, vocab_size)


def _check_ids(what: str, ids: Collection[int], vocab_size: int) -> None:
    for token in ids:
        _check_whole(f"a token id of {what}", token)
    if not ids or (min(ids) >= 0 and max(ids) < vocab_size):
        return
    wrong = next(token for token in ids if not 0 <= token < vocab_size)
    has = "has" if what == "the prompt" else "have"
    raise UsageError(
        f"{what} {has} token id {wrong}, expected 0 to {vocab_size - 1}",
        hint="the tokenizer is not this model's",
    )


def _check_whole(what: str, number: Any) -> None:
    if not isinstance(number, Integral):
        raise UsageError(f"{what} is {number!r}, expected a whole number", hint="give an integer")


def _check_prompt_logprobs(number: int | None, vocab_size: int) -> None:
    if number is None:
        return
    _check_whole("prompt_logprobs", number)
    if not 0 <= number <= vocab_size:
        raise UsageError(
            f"prompt_logprobs is {number}, expected 0 to {vocab_size}", hint="ask for less"
        )


def _check_length(request: Request, max_context: int, most_tokens: int) -> None:
    num_prompt, num_new = len(request.prompt), request.max_new_tokens
    if num_prompt + num_new <= most_tokens:
        return
    what = "context" if most_tokens == max_context else "KV cache"
    room = most_tokens - num_prompt
    raise UsageError(
        f"the prompt has {num_prompt} tokens, with {num_new} new ones {num_prompt + num_new}; "
        f"the {what} has room for {most_tokens}",
        hint=f"shorten the prompt, or ask for {room} tokens" if room > 0 else "shorten the prompt",
    )

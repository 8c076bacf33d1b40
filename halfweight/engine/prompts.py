"""What callers give: prompts as text, ids or a conversation, to token ids; what ends a text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Number
from typing import Any

from halfweight.engine.request import token_ids
from halfweight.errors import UsageError
from halfweight.model.tokenizer import chat_text

Prompt = str | Sequence[int]
"""Text, or token ids."""
Message = Mapping[str, Any]
"""A turn of a chat: `role`, `content` and whatever else the model's template knows."""


def is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether it is a text or token ids, also as an array; what is no sequence is one too, for
    `encode` to refuse."""
    if isinstance(prompts, Sequence) and not isinstance(prompts, str | bytes):
        return len(prompts) > 0 and _is_number(prompts[0])
    return getattr(prompts, "ndim", 1) < 2


def _is_number(value: Any) -> bool:
    return isinstance(value, Number) or getattr(value, "ndim", None) == 0


def encode(tokenizer: Any, prompt: Prompt, *, add_special_tokens: bool = True) -> tuple[int, ...]:
    """Token ids of a prompt. A text that begins with the BOS is not given a second one.

    Raises UsageError for a text that the tokenizer cannot read, and for what is neither text nor
    whole numbers.
    """
    if not isinstance(prompt, str):
        return token_ids(prompt)
    ids = _ids(tokenizer, prompt, add_special_tokens)
    bos = getattr(tokenizer, "bos_token_id", None)
    return tuple(ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids)


def encode_chat(tokenizer: Any, messages: Sequence[Message], /, **template: Any) -> list[int]:
    """Token ids of a conversation that the model is to continue.

    `template` goes to the tokenizer's `apply_chat_template`. Raises UsageError where there is no
    template, where it refuses, and where the tokenizer cannot read what it made.
    """
    return _ids(tokenizer, chat_text(tokenizer, messages, **template), add_special_tokens=False)


def _ids(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    except (TypeError, ValueError) as error:  # of half a surrogate pair, say
        message = str(error).partition("\n")[0]
        raise UsageError(
            f"the tokenizer cannot read the prompt: {message}", hint="give text that is Unicode"
        ) from error
    return ids


def stop_strings(stop: Any) -> tuple[str, ...]:
    """A caller's one or several. Raises UsageError for what is no text."""
    given = (stop,) if isinstance(stop, str) or not isinstance(stop, Iterable) else tuple(stop)
    if not all(isinstance(text, str) for text in given):
        raise UsageError(
            f"stop is {stop!r}, expected a text or several", hint="stop_tokens takes token ids"
        )
    return given


def stop_ids(tokens: Any) -> frozenset[int]:
    """A caller's token ids. Raises UsageError for a single one."""
    if not isinstance(tokens, Iterable):
        raise UsageError(f"stop_tokens is {tokens!r}, expected token ids", hint="give a list")
    return frozenset(tokens)

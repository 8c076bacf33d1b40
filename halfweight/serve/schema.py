"""What requests of OpenAI's API may say here, and the shapes of the answers.

Fields that change a result and are not implemented are refused, not ignored: `unsupported` names
them. Fields without effect on the text (user, seed, metadata, ...) are accepted.
"""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from halfweight.engine.decoder import Sampling

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
}
"""Fields that are not implemented, with the values that ask for nothing."""


class StreamOptions(BaseModel):
    """`include_usage`: end a stream with a chunk that holds the usage."""

    include_usage: bool = False


class Request(BaseModel):
    """What both kinds of completion share."""

    model_config = ConfigDict(extra="allow")

    model: str = ""
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    n: int = Field(1, ge=1, le=128)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def sampling(self) -> Sampling:
        """As the engine takes it."""
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def unsupported(self) -> str | None:
        """The first field given that asks for what is not implemented."""
        given = self.model_extra or {}
        return next((k for k, v in given.items() if v not in UNSUPPORTED.get(k, (v,))), None)


class Message(BaseModel):
    """One turn of a chat; `content` is text or a list of text parts."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[dict[str, Any]] | None = None

    @property
    def as_text(self) -> dict[str, Any]:
        """With its parts joined; ValueError for a part that is not text."""
        content = self.content
        if isinstance(content, list):
            if any(part.get("type") != "text" for part in content):
                raise ValueError("only parts of type 'text' are supported")
            content = "".join(str(part.get("text", "")) for part in content)
        return {**(self.model_extra or {}), "role": self.role, "content": content or ""}


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


class CompletionRequest(Request):
    """POST /v1/completions: one prompt or several, as text or as token ids."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(min_length=1)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class Answer:
    """The fields that all parts of one response share, and the shapes of those parts."""

    def __init__(self, kind: Literal["chat.completion", "text_completion"], model: str) -> None:
        self.is_chat = kind == "chat.completion"
        self._kind, self._model = kind, model
        self._id = ("chatcmpl-" if self.is_chat else "cmpl-") + uuid.uuid4().hex
        self._created = int(time.time())

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        """The body of a response that is not streamed."""
        return self._body(self._kind, choices) | {"usage": usage}

    def chunk(
        self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None
    ) -> dict[str, Any]:
        """One event of a stream."""
        kind = "chat.completion.chunk" if self.is_chat else self._kind
        body = self._body(kind, choices)
        return body if usage is None else body | {"usage": usage}

    def choice(self, index: int, text: str, reason: str) -> dict[str, Any]:
        """One finished choice."""
        shared = {"index": index, "finish_reason": reason, "logprobs": None}
        if self.is_chat:
            return shared | {"message": {"role": "assistant", "content": text}}
        return shared | {"text": text}

    def delta(
        self, index: int, text: str | None, reason: str | None = None, *, first: bool = False
    ) -> dict[str, Any]:
        """What is new of one choice; None for no text."""
        shared = {"index": index, "finish_reason": reason, "logprobs": None}
        if not self.is_chat:
            return shared | {"text": text or ""}
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        return shared | {"delta": delta if text is None else delta | {"content": text}}

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        shared = {"id": self._id, "object": kind, "created": self._created, "model": self._model}
        return shared | {"choices": choices}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Tokens counted."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }

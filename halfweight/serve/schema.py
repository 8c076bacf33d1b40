"""What requests of OpenAI's API may say here, and the shapes of the answers.

Every field is known or refused by name: one that changes the answer of another server and is passed
over here would be a wrong answer that says nothing. A field that is null is as one that is not
there. Beside OpenAI's own fields there are those by which vLLM's clients ask for more.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterable
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
    field_validator,
    model_validator,
)

from halfweight.engine.grammar import Grammar
from halfweight.errors import UsageError

WITHOUT_EFFECT = frozenset(
    ("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user")
)
"""Fields that change no text."""
ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
"""Fields that are not implemented, with the values that ask for nothing."""
NOT_OF_A_TEMPLATE = frozenset(
    (
        *("chat_template", "conversation", "max_length", "messages", "padding", "return_dict"),
        *("return_assistant_tokens_mask", "return_tensors", "self", "tokenize"),
        *("tokenizer_kwargs", "truncation"),
    )
)
"""Names that `chat_template_kwargs` may not have: arguments of transformers' call that no template
reads, and `chat_template` itself, which is a program that the client would have the server run."""
SAMPLING_FIELDS = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "logit_bias", "seed"),
)
"""Fields whose names are also those of the engine's Sampling."""


class Strict(BaseModel):
    """An object all of whose fields are known."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _only_known(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        asked = {name: value for name, value in given.items() if value is not None}
        for name in asked.keys() - cls.model_fields.keys():
            if name in WITHOUT_EFFECT or asked[name] in ASKS_NOTHING.get(name, ()):
                del asked[name]
            else:
                raise ValueError(f"{name!r} is not supported")
        return asked


class StreamOptions(Strict):
    """`include_usage`: end a stream with a chunk that holds the usage."""

    include_usage: bool = False


class JsonSchema(Strict):
    """The schema of a `response_format`, and what describes it."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    name: str = ""
    description: str = ""
    strict: bool = True
    schema_: dict[str, Any] = Field(alias="schema")

    @model_validator(mode="before")
    @classmethod
    def _only_known(cls, given: Any) -> Any:
        return given


class ResponseFormat(Strict):
    """`text`, `json_object` or `json_schema`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @property
    def grammar(self) -> Grammar | None:
        """What the answer must match. ValueError for a json_schema without one."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return Grammar.json_object()
        if self.json_schema is None:
            raise UsageError("response_format has no json_schema", hint="give it one")
        return Grammar.json_schema(self.json_schema.schema_)


class StructuredOutputs(Strict):
    """vLLM's way to ask for a form: one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_known(cls, given: Any) -> Any:
        return given

    @property
    def grammars(self) -> Iterable[Grammar]:
        """Each that is asked for."""
        if self.json_ is not None:
            yield Grammar.json_schema(_parsed(self.json_))
        if self.regex is not None:
            yield Grammar.regex(self.regex)
        if self.choice is not None:
            if not self.choice:
                raise UsageError("a choice of nothing", hint="give one text or more")
            yield Grammar.regex("|".join(map(re.escape, self.choice)))
        if self.grammar is not None:
            yield Grammar.ebnf(self.grammar)
        if self.json_object:
            yield Grammar.json_object()


def _parsed(schema: dict[str, Any] | str) -> dict[str, Any]:
    if not isinstance(schema, str):
        return schema
    try:
        found: dict[str, Any] = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the schema is not JSON: {error}", hint="send it as an object") from error
    return found


class Request(Strict):
    """What both kinds of completion share. Sampling that is not given is as the model says."""

    model: str = ""
    max_tokens: int | None = Field(None, ge=0)
    min_tokens: int = Field(0, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    n: int = Field(1, ge=1, le=128)
    stop: str | list[str] = Field(default_factory=list)
    stop_token_ids: list[StrictInt] = Field(default_factory=list)
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @property
    def is_text(self) -> bool:
        """Whether its prompts are text, to be turned into tokens."""
        return True

    @property
    def num_prompts(self) -> int:
        """How many are to be continued."""
        return 1

    @property
    def sampling(self) -> dict[str, Any]:
        """The fields of the engine's Sampling that are given; -1 of top_k stands for all."""
        given = {name: getattr(self, name) for name in SAMPLING_FIELDS}
        found = {name: value for name, value in given.items() if value is not None}
        if found.get("top_k") == -1:
            found["top_k"] = 0
        return found | {"min_new_tokens": self.min_tokens, "grammar": self.grammar}

    @property
    def num_logprobs(self) -> int | None:
        """As the engine's Sampling says it; each kind of request has its own words for it."""
        raise NotImplementedError

    @property
    def grammar(self) -> Grammar | None:
        """What the text must match. UsageError where several are asked for."""
        guided = StructuredOutputs(
            json=self.guided_json,
            regex=self.guided_regex,
            choice=self.guided_choice,
            grammar=self.guided_grammar,
        )
        found = [*guided.grammars]
        if self.structured_outputs is not None:
            found += self.structured_outputs.grammars
        if self.response_format is not None and self.response_format.grammar is not None:
            found.append(self.response_format.grammar)
        if len(found) > 1:
            raise UsageError("two forms are asked for", hint="give one: a schema, a regex, ...")
        return found[0] if found else None


class Message(BaseModel):
    """One turn of a chat; `content` is text or a list of text parts. The rest is the template's."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[dict[str, Any]] | None = None

    @property
    def as_text(self) -> dict[str, Any]:
        """With its parts joined; UsageError for a part that is not text."""
        content = self.content
        if isinstance(content, list):
            if any(part.get("type") != "text" for part in content):
                raise UsageError(
                    "only parts of type 'text' are supported", hint="leave the others out"
                )
            content = "".join(str(part.get("text", "")) for part in content)
        return {**(self.model_extra or {}), "role": self.role, "content": content or ""}


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @field_validator("chat_template_kwargs")
    @classmethod
    def _of_a_template(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name in given.keys() & NOT_OF_A_TEMPLATE:
            raise ValueError(f"{name!r} is not supported")
        return given

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("'top_logprobs' needs 'logprobs': true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """As the engine's Sampling says it."""
        return self.top_logprobs if self.logprobs else None

    @property
    def template(self) -> dict[str, Any]:
        """Options of the chat template."""
        ends = {"add_generation_prompt": self.add_generation_prompt}
        if self.continue_final_message:
            ends = {"add_generation_prompt": False, "continue_final_message": True}
        return ends | self.chat_template_kwargs


class CompletionRequest(Request):
    """POST /v1/completions: one prompt or several, as text or as token ids."""

    prompt: str | list[StrictInt] | list[list[StrictInt]] | list[str]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    add_special_tokens: bool = True

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _one_of_its_forms(cls, given: Any, validated: Any) -> Any:
        """In place of what each of the forms says that it is not."""
        try:
            return validated(given)
        except ValidationError:
            raise ValueError("expected a text, token ids, or a list of these") from None

    @property
    def num_logprobs(self) -> int | None:
        """As the engine's Sampling says it."""
        return self.logprobs

    @property
    def is_text(self) -> bool:
        """Whether its prompts are text."""
        return isinstance(self.prompts[0], str)

    @property
    def num_prompts(self) -> int:
        """How many are to be continued."""
        return len(self.prompts)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself."""
        given: Any = self.prompt
        is_one = isinstance(given, str) or not given or isinstance(given[0], int)
        return [given] if is_one else list(given)


class Answer:
    """The fields that all parts of one response share, and the shapes of those parts."""

    def __init__(self, kind: Literal["chat.completion", "text_completion"], model: str) -> None:
        self.is_chat = kind == "chat.completion"
        self._kind, self._model = kind, model
        self._id = ("chatcmpl-" if self.is_chat else "cmpl-") + uuid.uuid4().hex
        self._created = int(time.time())

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """The body of a response that is not streamed."""
        return self._body(self._kind, choices) | {"usage": usage}

    def chunk(
        self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """One event of a stream."""
        kind = "chat.completion.chunk" if self.is_chat else self._kind
        body = self._body(kind, choices)
        return body if usage is None else body | {"usage": usage}

    def choice(
        self, index: int, text: str, reason: str, stop: int | str | None, logprobs: Any
    ) -> dict[str, Any]:
        """One finished choice; `stop` is what ended it of what was asked for, as vLLM says."""
        shared = {"index": index, "finish_reason": reason, "logprobs": logprobs}
        shared |= {"stop_reason": stop}
        if self.is_chat:
            return shared | {"message": {"role": "assistant", "content": text}}
        return shared | {"text": text}

    def delta(
        self,
        index: int,
        text: str | None,
        reason: str | None = None,
        logprobs: Any = None,
        *,
        first: bool = False,
    ) -> dict[str, Any]:
        """What is new of one choice; None for no text."""
        shared = {"index": index, "finish_reason": reason, "logprobs": logprobs}
        if not self.is_chat:
            return shared | {"text": text or ""}
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        return shared | {"delta": delta if text is None else delta | {"content": text}}

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        shared = {"id": self._id, "object": kind, "created": self._created, "model": self._model}
        return shared | {"choices": choices}


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> dict[str, Any]:
    """Tokens counted; `cached_tokens` of the prompt were not read again."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }

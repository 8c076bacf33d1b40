"""What is asked of the engine and what it answers: plain frozen values, made on any thread."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral, Real
from operator import index
from reprlib import repr as shortened
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from halfweight.errors import HalfweightError, UsageError

if TYPE_CHECKING:
    from halfweight.engine.grammar import Grammar

FinishReason = Literal["stop", "length", "nan", "cancelled"]

_MOST, _LEAST = 2.0**127, 2.0**-126
"""Far beyond any use, and finite and not 0 in float32, in which scores are."""
_RANGES: dict[str, tuple[type[Any], float, float, str]] = {
    "temperature": (Real, 0, _MOST, "a number of at least 0"),
    "top_k": (Integral, 0, _MOST, "a whole number of at least 0"),
    "top_p": (Real, 0, 1, "a number from 0 to 1"),
    "min_p": (Real, 0, 1, "a number from 0 to 1"),
    "repetition_penalty": (Real, _LEAST, _MOST, "a number above 0"),
    "presence_penalty": (Real, -_MOST, _MOST, "a finite number"),
    "frequency_penalty": (Real, -_MOST, _MOST, "a finite number"),
    "seed": (Integral, -float("inf"), float("inf"), "a whole number, or None"),
    "num_logprobs": (Integral, 0, _MOST, "a whole number of at least 0, or None"),
    "min_new_tokens": (Integral, 0, _MOST, "a whole number of at least 0"),
}
"""Of each field of Sampling its kind, least and most."""
_MAY_BE_NONE = ("seed", "num_logprobs")


@dataclass(frozen=True)
class Sampling:
    """How each next token is chosen. The names are the usual; the defaults change nothing.

    Raises UsageError for a value outside its range.
    """

    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    """The same seed gives the same answer, whatever runs beside it; None draws one."""
    num_logprobs: int | None = None
    """None: no logprobs; 0: those of the chosen tokens; n: of the n likeliest too."""
    min_new_tokens: int = 0
    """Stop tokens are masked until there are so many."""
    grammar: Grammar | None = None
    """What the text must match."""

    def __post_init__(self) -> None:
        for name, (kind, least, most, expected) in _RANGES.items():
            value: Any = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            if not (isinstance(value, kind) and least <= value <= most):
                raise UsageError(f"{name} is {value!r}, expected {expected}", hint="see Sampling")
        if not isinstance(self.logit_bias, Mapping):
            raise UsageError(
                f"logit_bias is {self.logit_bias!r}, expected numbers by token id",
                hint="give a dictionary",
            )
        for token, bias in self.logit_bias.items():
            if not isinstance(token, Integral):
                raise UsageError(
                    f"logit_bias has token id {token!r}, expected a whole number",
                    hint="use ids of this model's tokenizer",
                )
            if not (isinstance(bias, Real) and bias <= _MOST):
                raise UsageError(
                    f"logit_bias of token {token} is {bias!r}, expected a number, or -inf",
                    hint="-inf bars a token, a large number makes it certain",
                )


def token_ids(prompt: Any) -> tuple[int, ...]:
    """Ids of a sequence, an array or a tensor, as Python's integers.

    Raises UsageError for anything else, and for an id that is no whole number: 1.7 is not rounded
    and "7" is not read.
    """
    given = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise UsageError(
            f"a prompt is {shortened(given)}, expected text or a sequence of token ids",
            hint="decode bytes, and make a list of what is none",
        )
    try:
        return tuple(map(index, given))
    except TypeError:
        wrong = next(token for token in given if not isinstance(token, Integral))
        raise UsageError(
            f"the prompt has token id {shortened(wrong)}, expected a whole number",
            hint="a prompt is one text, or the ids of one text",
        ) from None


@dataclass(frozen=True)
class Request:
    """One prompt to continue."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    stop_tokens: frozenset[int] | None = None
    """None: the model's own."""
    stop_strings: tuple[str, ...] = ()
    include_stop: bool = False
    """Whether the text has the stop string that ended it."""
    prompt_logprobs: int | None = None
    """As `Sampling.num_logprobs`, for the prompt's own tokens; such a prompt is read in full."""

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, tuple):  # but a list, say, that its owner may change
            object.__setattr__(self, "prompt", token_ids(self.prompt))

    @cached_property
    def ids(self) -> NDArray[np.int32]:
        """The prompt as an array. Raises OverflowError for a number that is too large for it."""
        return np.frombuffer(array("i", self.prompt), np.int32)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log of the chance that `token` had, and (id, logprob) of the likeliest at its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Output:
    """What is new of a request; with a reason or an error it is the last."""

    tokens: tuple[int, ...] = ()
    """Without the stop token."""
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of `tokens`, if asked for."""
    stop_token: int | None = None
    """The token that ended it, where one did."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    """With the first tokens, if asked for: one a token of the prompt, None for its first."""
    num_shared_tokens: int = 0
    """With the first tokens: how many of the prompt were in the cache already."""
    error: HalfweightError | None = None

    @classmethod
    def joined(cls, outputs: Sequence[Output]) -> Output:
        """Outputs of one request that follow each other, as one."""
        if len(outputs) == 1:
            return outputs[0]
        first, last = outputs[0], outputs[-1]
        return cls(
            tokens=tuple(token for output in outputs for token in output.tokens),
            finish_reason=last.finish_reason,
            logprobs=tuple(entry for output in outputs for entry in output.logprobs),
            stop_token=last.stop_token,
            prompt_logprobs=first.prompt_logprobs,
            num_shared_tokens=first.num_shared_tokens,
            error=last.error,
        )

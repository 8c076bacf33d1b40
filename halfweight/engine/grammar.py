"""Structured output: text that must match a JSON schema, a regular expression or a grammar.

A `Grammar` is a plain value. A `GrammarCompiler` makes it into a state machine over one tokenizer's
ids, once, and gives each sequence a `GrammarState` that says which ids may come next. When a
grammar is complete and nothing can follow, only the ids that end a text may.

The state machines are llguidance's: no dependency, one wheel for every Python, and what it cannot
enforce in a schema it refuses. (xgrammar is as fast, but needs torch and five packages more, a
wheel for each Python, and passes over keywords of a schema that it does not know.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from halfweight.errors import UsageError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_WHITESPACE = r"[\x20\x0A\x0D\x09]{0,40}"
"""Between the parts of JSON: room for indentation, but a model cannot go on with it forever."""
_HINTS = {
    "json_schema": "see the JSON schema keywords that llguidance supports",
    "regex": "use the syntax of Rust's regex crate: no look-around, no back-references",
    "ebnf": "write a Lark grammar with a rule `start`, or GBNF with a rule `root`",
}


@dataclass(frozen=True)
class Grammar:
    """What a text must match, as a whole. Make it by one of the class methods."""

    kind: Literal["json_schema", "regex", "ebnf"]
    text: str

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> Grammar:
        """JSON that the schema allows, its properties in the schema's order."""
        return cls("json_schema", json.dumps(schema))

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that the pattern matches from beginning to end."""
        return cls("regex", pattern)

    @classmethod
    def ebnf(cls, text: str) -> Grammar:
        """Text of a context-free grammar in llguidance's Lark, or in llama.cpp's GBNF."""
        return cls("ebnf", text)


class GrammarState:
    """Where one sequence is in its grammar."""

    def __init__(self, matcher: LLMatcher, num_ids: int) -> None:
        """`num_ids` is the number of ids that the compiled tokenizer knows."""
        self._matcher = matcher
        self._words = np.empty(-(-num_ids // 32), np.int32)

    @property
    def is_complete(self) -> bool:
        """Whether the text matches as it is."""
        return bool(self._matcher.is_accepting())

    def advance(self, tokens: Sequence[int]) -> None:
        """Take tokens that the sequence gained; a NaN's is none. After one not allowed none is."""
        self._matcher.consume_tokens([token for token in tokens if token >= 0])

    def fill(self, bits: NDArray[np.int32], drafts: Sequence[int] = ()) -> None:
        """Write which ids may come next, after each draft: bits [1 + drafts, words of 32 ids].

        The state stays where it is. Behind a draft that is not allowed all bits are set. Where the
        grammar gave up (its limits, a token that it did not allow) none is: that text cannot end.
        """
        bits.fill(-1)
        taken = 0
        for row, draft in zip(bits, [*drafts, None], strict=True):
            self._fill_row(row)
            if draft is None or not self._matcher.try_consume_tokens([draft]):
                break
            taken += 1
        if taken:
            self._matcher.rollback(taken)

    def _fill_row(self, row: NDArray[np.int32]) -> None:
        words = self._words
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        row[:] = 0
        if not self._matcher.is_error():
            row[: len(words)] = words[: len(row)]


class GrammarCompiler:
    """Compiles grammars for one tokenizer; those used last are kept. Any thread may use it."""

    def __init__(self, tokenizer: Any, vocab_size: int, stop_tokens: Sequence[int]) -> None:
        """`tokenizer` is transformers'; `stop_tokens` are the ids that end a text.

        Nothing is done, and llguidance not needed, before the first grammar.
        """
        self._tokenizer, self._stop_tokens = tokenizer, sorted(stop_tokens)
        self._num_ids = max(vocab_size, len(tokenizer))
        self._compiled = lru_cache(maxsize=64)(self._compile)

    def start(self, grammar: Grammar) -> GrammarState:
        """A new sequence's state. UsageError for a grammar that cannot be compiled."""
        return GrammarState(self._compiled(grammar).deep_copy(), self._num_ids)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise UsageError(
                "structured output needs llguidance, which is not installed",
                hint="pip install 'halfweight[serve]'",
            ) from None
        try:
            matcher = LLMatcher(self._ids, _source(grammar), log_level=0)
        except ValueError as error:
            raise _refused(grammar, str(error)) from error
        if matcher.is_error():
            raise _refused(grammar, matcher.get_error())
        first = matcher.deep_copy()
        first.compute_bitmask()
        if first.is_error():
            raise _refused(grammar, "no text matches it")
        return matcher

    @cached_property
    def _ids(self) -> LLTokenizer:
        from llguidance.hf import from_tokenizer

        if not getattr(self._tokenizer, "is_fast", False):
            raise UsageError(
                "structured output needs a fast tokenizer, this model's is "
                f"{type(self._tokenizer).__name__}",
                hint="add the model's tokenizer.json to its folder",
            )
        eos = self._stop_tokens or None
        return from_tokenizer(self._tokenizer, n_vocab=self._num_ids, eos_token=eos)


def _source(grammar: Grammar) -> str:
    """llguidance's form; a ValueError for what is not even JSON or GBNF."""
    from llguidance import LLMatcher, grammar_from

    if grammar.kind == "json_schema":
        options = {"whitespace_pattern": _WHITESPACE}
        source: str = LLMatcher.grammar_from_json_schema(grammar.text, overrides=options)
    else:
        source = grammar_from(grammar.kind, grammar.text)
    return source


def _refused(grammar: Grammar, message: str) -> UsageError:
    """One line of llguidance's several: the first, and what a regex parser calls the error."""
    first, *rest = message.strip().splitlines()
    details = [line.removeprefix("error: ") for line in rest if line.startswith("error: ")]
    return UsageError(f"{grammar.kind}: {' '.join([first, *details])}", hint=_HINTS[grammar.kind])

"""A request under way: its tokens, its pages, and how far the steps launched so far have come."""

from __future__ import annotations

from array import array
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from halfweight.engine.pages import ROOT_KEY, page_key
from halfweight.engine.request import Output, Request, TokenLogprob


class Drafter(Protocol):
    """Guesses what follows in one sequence."""

    def extend(self, tokens: abc.Sequence[int]) -> None:
        """The sequence gained these."""
        ...

    def draft(self, limit: int) -> list[int]:
        """At most `limit` tokens that are worth a check; often none."""
        ...


MakeDrafter = Callable[[abc.Sequence[int]], Drafter]
"""A drafter for a sequence that begins with these tokens."""


@dataclass(eq=False, slots=True)
class Sequence:
    """Changed by the loop's thread alone, after it was made on the thread that submits."""

    request: Request
    on_output: Callable[[Output], None]
    stops: frozenset[int]
    tokens: array[int]
    """Int32: prompt and new tokens that the host has seen, without the stop token."""
    limit: int
    """Tokens at which it ends for its length."""
    id: int = 0
    """Higher than those of sequences that came before."""
    keys: list[bytes] = field(default_factory=list)
    """Of its full pages, as far as they are known; empty where pages are not shared."""

    slot: int = -1
    pages: list[int] = field(default_factory=list)
    num_read: int = 0
    """Tokens in the cache once every step launched so far has run, drafts included."""
    num_tokens: int = 0
    """`tokens` and those that steps under way will add, not counting drafts."""
    num_published: int = 0
    """Pages that others can find, or that turned out to be there already."""
    num_shared: int | None = None
    """Tokens that were in the cache when it was first admitted; None before."""
    drafter: Drafter | None = None
    drafts: list[int] = field(default_factory=list)
    """Guesses of the tokens after `tokens`."""
    is_finished: bool = False
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """What is known of them so far, where they are wanted and not delivered yet."""

    @property
    def num_new(self) -> int:
        """New tokens that the host has seen."""
        return len(self.tokens) - len(self.request.prompt)

    def extend_keys(self, num_pages: int, page_tokens: int) -> None:
        """Find the keys of its first `num_pages` pages, all full of known tokens."""
        for i in range(len(self.keys), num_pages):
            previous = self.keys[-1] if self.keys else ROOT_KEY
            page = self.tokens[i * page_tokens : (i + 1) * page_tokens]
            self.keys.append(page_key(previous, page))

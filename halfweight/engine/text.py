"""Tokens to text as they come: the pieces of a stream, joined, are the decode of all its tokens.

A piece is what no later token can change. What can change depends on the tokenizer:

- A token may end within a character. Text that ends with a replacement character waits for the
  next token, unless the tokens end there.
- Tokenizers with byte fallback (Llama 2's, Gemma's) decode a run of byte tokens as one: if it is
  not valid UTF-8 as a whole, each of its bytes is a replacement character. The run waits for its
  end.
- How a token reads depends on whether it is the first (a leading space is dropped, `##` is kept),
  so tokens are decoded with some before them, whose text is then cut off.
- Tokenizers that clean up spaces take some away before punctuation, one token late. Text is decoded
  without that and cleaned here, up to the last place that no pattern of the clean-up reaches over.
- The end of a text may begin a stop string: it waits too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

REPLACEMENT = "\ufffd"
MOST_WINDOW_TOKENS = 16
"""Tokens decoded anew for each token, at most, where all of them are settled."""
REACH = 3
"""Characters that a pattern of the clean-up may have after its first, a space."""
PROBE = "a . b"


class Detokenizer:
    """What streams of text need to know of a tokenizer; one for all of them."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is any of transformers'."""
        self._tokenizer = tokenizer

    def whole(self, ids: Sequence[int]) -> str:
        """The text of all tokens, special ones left out."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def raw(self, ids: Sequence[int]) -> str:
        """The same with the spaces that the clean-up would take."""
        return self._raw(ids, skip_special_tokens=True)

    @cached_property
    def _raw(self) -> Callable[..., str]:
        """The fast tokenizer's own decode where transformers' adds nothing: a third of its time."""
        from transformers import PreTrainedTokenizerFast as Fast

        kind = type(self._tokenizer)
        names = ("decode", "_decode")
        if all(getattr(kind, name, None) is getattr(Fast, name) for name in names):
            decode: Callable[..., str] = self._tokenizer.backend_tokenizer.decode
            return decode
        return partial(self._tokenizer.decode, clean_up_tokenization_spaces=False)

    def cleaned(self, text: str) -> str:
        """Raw text cleaned up as this tokenizer does."""
        return str(self._tokenizer.clean_up_tokenization(text))

    @cached_property
    def cleans(self) -> bool:
        """Whether its decode cleans up spaces; it may be told to and not do it."""
        if not getattr(self._tokenizer, "clean_up_tokenization_spaces", False):
            return False
        ids = self._tokenizer.encode(PROBE, add_special_tokens=False)
        return " ." not in self.raw(ids) or self.whole(ids) != self.raw(ids)

    @cached_property
    def byte_tokens(self) -> frozenset[int]:
        """Ids of the tokens that stand for single bytes."""
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        ids = self._tokenizer.convert_tokens_to_ids(names)
        return frozenset(ids) - {None, self._tokenizer.unk_token_id}

    @cached_property
    def special_tokens(self) -> frozenset[int]:
        """Ids that have no text."""
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        special = {i for i, token in added.items() if token.special}
        special |= set(self._tokenizer.all_special_ids)
        return frozenset(i for i in special if self.raw([i]) == "")


class TextStream:
    """The text of one request. `stopped` tells that a stop string was met; the text ends there."""

    def __init__(
        self, detokenizer: Detokenizer, stops: Sequence[str] = (), *, include_stop: bool = False
    ) -> None:
        """Text from the stop string on is left out; with `include_stop`, from its end on."""
        self._detokenizer = detokenizer
        self._stops = [stop for stop in stops if stop]
        self._includes_stop = include_stop
        self._tokens: list[int] = []
        self._window: list[int] = []
        """The last tokens, at least one of them with text, from a place where text is final."""
        self._num_read = 0
        """Tokens of the window whose text, `_read`, is final."""
        self._read = ""
        self._unclean = ""
        self._before_unclean = "^" * REACH
        self._num_final = 0
        """Characters of the text that went to `_release`."""
        self._held = ""
        self.stopped = False
        self.stop_string: str | None = None

    def add(self, token: int) -> str:
        """The text that is final after one more token."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        if token in self._detokenizer.special_tokens:
            return ""
        self._window.append(token)
        if token in self._detokenizer.byte_tokens:
            return ""
        text = self._detokenizer.raw(self._window)
        if text.endswith(REPLACEMENT) or not text.startswith(self._read):
            return ""
        return self._release(self._cleaned(self._advance(text)))

    def finish(self) -> str:
        """What was held back, at the end of the tokens."""
        if self.stopped:
            return ""
        text = self._release(self._detokenizer.whole(self._tokens)[self._num_final :])
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _advance(self, text: str) -> str:
        """`text` of the window is final; what of it is new. A window that grew long begins anew."""
        new = text[len(self._read) :]
        if not new:
            return ""
        if len(self._window) > MOST_WINDOW_TOKENS:
            self._window = self._window[self._num_read :]
            text = self._detokenizer.raw(self._window)
        self._num_read, self._read = len(self._window), text
        return new

    def _cleaned(self, new: str) -> str:
        """Of the text that is not cleaned up yet and the new, cleaned, what is final."""
        if not self._detokenizer.cleans:
            return new
        text = self._unclean + new
        cut = _last_safe_cut(self._before_unclean, text)
        self._before_unclean = (self._before_unclean + text[:cut])[-REACH:]
        self._unclean = text[cut:]
        return self._detokenizer.cleaned(text[:cut])

    def _release(self, text: str) -> str:
        """What of the held and the new text is before a stop string and cannot begin one.

        Of several, the stop string that is complete first ends the text, however tokens part it.
        """
        self._num_final += len(text)
        if not self._stops:
            return text
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            end, begin, self.stop_string = min(found)
            self.stopped = True
            return text[: end if self._includes_stop else begin]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _last_safe_cut(before: str, text: str) -> int:
    """The last place where text can be parted and cleaned up in parts; `before` is left of it.

    The patterns are a space with at most REACH characters after it, none of them a space but in
    " ' ". So none reaches over a place right after REACH others; nor over one right before a space,
    unless that is after a quote, a space, or an n, which a quote could move up to.
    """
    both = before + text
    for cut in range(len(both), len(before), -1):
        if " " not in both[cut - REACH : cut]:
            return cut - len(before)
        if cut < len(both) and both[cut] == " " and both[cut - 1] not in " 'n":
            return cut - len(before)
    return 0


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)

"""Text out of tokens as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "�"


class TextStream:
    """Turns tokens into pieces of text that can be sent at once.

    A piece waits while its last character is incomplete (a token can end within one) or while its
    end could be the beginning of a stop string. `stopped` tells that a stop string was met.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._num_settled = 0
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that can be sent after one more token."""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._num_settled])
        now = self._decode(self._ids[self._start :])
        if now.endswith(REPLACEMENT):
            return ""
        self._num_settled = len(self._ids)
        return self._release(now[len(before) :])

    def finish(self) -> str:
        """What was held back, at the end of the tokens."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._start : self._num_settled])
        rest = self._decode(self._ids[self._start :])[len(before) :]
        text = self._release(rest) + ("" if self.stopped else self._held)
        self._held = ""
        return text

    @property
    def _start(self) -> int:
        """Decoding begins a few settled tokens back: how a token reads depends on those before."""
        return max(0, self._num_settled - 8)

    def _release(self, text: str) -> str:
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        ready = self._held[: len(self._held) - keep]
        self._held = self._held[len(ready) :]
        return ready

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)

"""Logprobs as OpenAI's two kinds of completion show them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from halfweight.engine.request import TokenLogprob

LEAST_LOGPROB = -9999.0
"""Stands for that of a token that cannot come, as vLLM's: JSON has no -inf."""


class TokenNames:
    """The text of single tokens, as far as a token has one by itself."""

    def __init__(self, tokenizer: Any) -> None:
        self.text = lru_cache(maxsize=1 << 16)(
            lambda token: str(tokenizer.decode([token], skip_special_tokens=False))
        )

    def chat(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """`choices[].logprobs` of a chat completion."""
        content = [
            self._entry(entry.token, entry.logprob)
            | {"top_logprobs": [self._entry(*pair) for pair in entry.top]}
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def text_completion(
        self, entries: Sequence[TokenLogprob | None], ids: Sequence[int], offset: int = 0
    ) -> dict[str, Any]:
        """`choices[].logprobs` of a text completion whose tokens `ids` begin at a character."""
        texts = [self.text(token) for token in ids]
        offsets = [offset]
        for text in texts:
            offsets.append(offsets[-1] + len(text))
        return {
            "tokens": texts,
            "token_logprobs": [None if e is None else _finite(e.logprob) for e in entries],
            "top_logprobs": [
                None if e is None else {self.text(token): _finite(value) for token, value in e.top}
                for e in entries
            ],
            "text_offset": offsets[:-1],
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.text(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)

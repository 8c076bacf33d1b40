"""What a model's files say about its own use: where texts end, how to sample, how long they may be.

Files of one model often disagree. Where a text ends is therefore the union of what generation
config, config and tokenizer say, and of the token that ends a turn in the chat template: a model
that was trained to end its turns with a token says so there, if nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from halfweight.engine.request import Sampling
from halfweight.memory import architecture

MARK = "halfweight-answer"
"""Stands for an answer in the chat template, to find what comes after it."""


def end_of_text_tokens(generation_config: Any, config: Any, tokenizer: Any) -> frozenset[int]:
    """Every id that ends a text. Any argument may be None."""
    text_config = None if config is None else config.get_text_config(decoder=True)
    found: set[int] = set()
    for source in (generation_config, config, text_config, tokenizer):
        found.update(_ids(getattr(source, "eos_token_id", None)))
    end_of_turn = None if tokenizer is None else end_of_turn_token(tokenizer)
    return frozenset(found if end_of_turn is None else found | {end_of_turn})


def end_of_turn_token(tokenizer: Any) -> int | None:
    """The special token right after an answer in the chat template, if there is one."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": MARK}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # a template may refuse or need anything; then it says nothing here
        return None
    after = text.rpartition(MARK)[2].lstrip()
    special = [(i, t.content) for i, t in tokenizer.added_tokens_decoder.items() if t.special]
    ends = [(len(content), i) for i, content in special if content and after.startswith(content)]
    return max(ends)[1] if ends else None


def default_sampling(generation_config: Any) -> Sampling:
    """How the model's makers say that it should be sampled; greedy where they say nothing."""
    if not getattr(generation_config, "do_sample", None):
        return Sampling(**_given(generation_config, ["repetition_penalty"]))
    names = ["temperature", "top_k", "top_p", "min_p", "repetition_penalty"]
    return Sampling(**({"temperature": 1.0} | _given(generation_config, names)))


def context_tokens(config: Any) -> int | None:
    """The tokens that a model has positions for, as plans say it; None for no limit."""
    return architecture.context_tokens(config.get_text_config(decoder=True).to_dict())


def _ids(value: Any) -> Iterable[int]:
    if value is None:
        return []
    return value if isinstance(value, list | tuple) else [value]


def _given(generation_config: Any, names: Iterable[str]) -> dict[str, Any]:
    values = {name: getattr(generation_config, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}

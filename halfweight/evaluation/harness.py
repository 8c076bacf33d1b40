"""A quantized model under lm-evaluation-harness: its questions are requests of the engine.

    lm_eval.simple_evaluate(model=HalfweightLM("OUT"), tasks=["arc_easy"])

or `halfweight evaluate OUT --tasks arc_easy` (tasks.py). So a score is of what a user gets: the
same kernels, cache and sampling as `generate` and `serve`. Importing this module registers the
name "halfweight" with the harness; its 0.4.13 looks for no entry points, later versions do.

Texts are made into tokens as the harness's own transformers model does, so that scores compare.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from halfweight.engine.engine import Engine
from halfweight.engine.request import Request, Sampling
from halfweight.engine.streams import Completion, Stream
from halfweight.errors import CheckpointError
from halfweight.model.transformers_quantizer import Activations

NEW_TOKENS = 256
"""Of an answer whose task names no number, as for the harness's own models."""
BESIDE_SAMPLING = ("until", "max_gen_toks", "do_sample")
Question = tuple[Any, list[int], list[int]]
"""A key for the harness's cache, the tokens of the context, and those to be scored."""


@register_model("halfweight")
class HalfweightLM(TemplateLM):  # type: ignore[misc]
    """A folder or Hub id, or an `Engine` that is made already, as the harness asks models.

    `dtype` names a torch dtype, other options are the engine's. `batch_size` is ignored: the engine
    fills its steps by the memory there is. `max_gen_toks` bounds answers of tasks without a bound.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | Engine,
        *,
        device: str | None = None,
        dtype: str | None = None,
        backend: str | None = None,
        activations: Activations = "exact",
        max_gen_toks: int = NEW_TOKENS,
        batch_size: object = None,
        max_batch_size: object = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not isinstance(pretrained, Engine):
            pretrained = Engine(
                pretrained,
                device=device,
                dtype=getattr(torch, dtype) if dtype else None,
                backend=backend,
                activations=activations,
                **options,
            )
        self.engine, self.max_gen_toks = pretrained, max_gen_toks
        self.tokenizer = _required(pretrained.tokenizer)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: the BOS where there is one."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Under which the harness keeps requests that a chat template has made."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids, with the tokenizer's special tokens unless told not to; never two BOS."""
        special = add_special_tokens is not False
        return list(self.engine.encode(string, add_special_tokens=special))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def _loglikelihood_tokens(
        self, requests: Sequence[Question], disable_tqdm: bool = False, **__: Any
    ) -> list[tuple[float, bool]]:
        """Log of the chance of each continuation, and whether each of its tokens is the likeliest.

        A context too long for the model loses its beginning.
        """
        scores = []
        longest = self.engine.max_context
        asked = (
            Request(tuple(context + continuation)[-longest:], 0, prompt_logprobs=1)
            for _, context, continuation in requests
        )
        for completion, (key, _, continuation) in zip(
            self._completions(asked, len(requests), disable_tqdm), requests, strict=True
        ):
            scores.append(_score(completion, len(continuation)))
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, scores[-1])
        return scores

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log of the chance of each whole text, in windows of the model's context."""
        windows: list[tuple[int, Question]] = []
        for index, request in enumerate(requests):
            windows += [(index, (None, *window)) for window in self._windows(request.args[0])]
        questions = [question for _, question in windows]
        scores = self._loglikelihood_tokens(questions, disable_tqdm)
        totals = [0.0] * len(requests)
        for (index, _), (score, _) in zip(windows, scores, strict=True):
            totals[index] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        """Context and continuation of each window, together as long as the model can read."""
        pairs = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.engine.max_context - 1,
            context_len=1,
        )
        return map(make_disjoint_window, pairs)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each prompt, up to its stop strings.

        Raises UsageError for an option of generation that the engine does not have.
        """
        asked = (self._generation(*request.args) for request in requests)
        answers = []
        for completion, request in zip(
            self._completions(asked, len(requests), disable_tqdm), requests, strict=True
        ):
            answers.append(completion.text)
            self.cache_hook.add_partial("generate_until", request.args, completion.text)
        return answers

    def _generation(self, prompt: str, options: dict[str, Any]) -> Request:
        known = normalize_gen_kwargs(options, default_max_gen_toks=self.max_gen_toks)
        stops = [stop for stop in known["until"] if stop]
        num_new = min(known["max_gen_toks"], self.engine.max_context - 1)
        room = self.engine.max_context - num_new
        fields = {key: value for key, value in known.items() if key not in BESIDE_SAMPLING}
        return self.engine.request(
            self.tok_encode(prompt)[-room:],
            sampling=Sampling(),
            max_new_tokens=num_new,
            stop=stops,
            **fields,
        )

    def _completions(
        self, requests: Iterable[Request], total: int, is_quiet: bool
    ) -> Iterator[Completion]:
        """What each became, in order: some run, some wait, and what is done is let go."""
        most = 4 * self.engine.max_sequences
        running: deque[Stream] = deque()

        def results() -> Iterator[Completion]:
            for request in requests:
                running.append(self.engine.open(request))
                if len(running) == most:
                    yield _completed(running.popleft())
            yield from map(_completed, running)

        return iter(tqdm(results(), "asking", total=total, disable=is_quiet))


def _required(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise CheckpointError(
            "the folder has no tokenizer, which the harness's texts need",
            hint="copy tokenizer.json and tokenizer_config.json of the source into it",
        )
    return tokenizer


def _completed(stream: Stream) -> Completion:
    """Waits for the end. Raises the request's error: a NaN, or the engine's."""
    completion = Completion.of(list(stream))
    if completion.error is not None:
        raise completion.error
    return completion


def _score(completion: Completion, num_scored: int) -> tuple[float, bool]:
    """Of the last `num_scored` tokens of a prompt; a text's first token has no chance to score."""
    found = completion.prompt_logprobs
    scored = [entry for entry in found[len(found) - num_scored :] if entry is not None]
    likeliest = all(entry.top[0][0] == entry.token for entry in scored)
    return sum(entry.logprob for entry in scored), likeliest

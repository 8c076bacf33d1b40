"""From a plan to tokens: all that touches the device, in two halves around the wait for it.

`launch` puts new prompts and drafts into the token table, runs the step and samples; on CUDA
nothing in it waits for the device. `read` waits, and tells what each sequence gained. Between the
two the next plan can be launched: it needs no token of this one on the host.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from halfweight.engine.request import TokenLogprob
from halfweight.engine.scheduler import Plan
from halfweight.engine.sequence import Sequence
from halfweight.engine.step import Chunk, Runner
from halfweight.engine.transfer import Staging

if TYPE_CHECKING:
    from halfweight.engine.sampler import Gained, Sampled, Sampler

_cuda: Any = torch.cuda
"""torch.cuda, whose stubs leave events untyped."""
_Text = tuple[int, int, abc.Sequence[int]]
"""Slot, position of the first token, and tokens."""


@dataclass(frozen=True, slots=True)
class Launched:
    """A step under way."""

    sampling: list[tuple[Sequence, Chunk]]
    """Whose tokens `sampled` holds, and the chunk that they follow."""
    sampled: Sampled | None
    prompts: list[_PromptChances]
    prompts_copied: Any
    """The event after the copies of `prompts`; None where there are none, or on a CPU."""


@dataclass(frozen=True, slots=True)
class _PromptChances:
    """Logprobs of a prompt's own tokens from place `start` on, on their way to the host."""

    sequence: Sequence
    start: int
    tokens: list[int]
    logprobs: Tensor
    top_tokens: Tensor
    top_logprobs: Tensor


class Launcher:
    """Runs plans by one runner and one sampler, in order."""

    def __init__(self, runner: Runner, sampler: Sampler) -> None:
        self._runner, self._sampler = runner, sampler
        self._is_cuda = runner.device.type == "cuda"
        self._staging = Staging(runner.device, torch.int32)

    def launch(self, plan: Plan) -> Launched:
        """Start a step."""
        texts: list[_Text] = [(s.slot, 0, s.tokens) for s in plan.admitted]
        texts += [(chunk.slot, chunk.start + 1, tokens) for chunk, tokens in plan.drafts]
        if texts:
            self._write(texts)
        logits = self._runner.run(plan.step)
        for sequence in plan.admitted:  # while the device works
            self._set_slot(sequence)
        reading = [s for s in plan.sequences if s.prompt_logprobs is not None]
        if reading:
            return self._sample_beside_prompts(plan, logits)
        pairs = zip(plan.sequences, plan.step, strict=True)
        return self._sample([pair for pair in pairs if pair[1].num_logits], logits, plan)

    def read(self, launched: Launched) -> abc.Iterable[tuple[Sequence, Chunk, Gained]]:
        """Wait for a step; what sequences gained. Logprobs of prompts go to their sequences."""
        gained = launched.sampled.wait() if launched.sampled is not None else []
        if launched.prompts_copied is not None:
            launched.prompts_copied.synchronize()
        for chances in launched.prompts:
            _note(chances)
        pairs = zip(launched.sampling, gained, strict=True)
        return ((sequence, chunk, found) for (sequence, chunk), found in pairs)

    def _set_slot(self, sequence: Sequence) -> None:
        """A sequence has got a slot: its wishes go to the sampler."""
        request = sequence.request
        self._sampler.set(
            sequence.slot,
            request.sampling,
            request.prompt,
            generated=sequence.tokens[len(request.prompt) :],
            stop_tokens=sequence.stops,
        )

    def _write(self, texts: list[_Text]) -> None:
        """Put tokens into the table."""
        table = self._runner.table
        places = [table[slot, start : start + len(tokens)] for slot, start, tokens in texts]
        flat = np.concatenate([np.asarray(tokens, np.int32) for _, _, tokens in texts])
        self._staging.scatter(flat, places)

    def _sample(
        self, sampling: list[tuple[Sequence, Chunk]], logits: Tensor, plan: Plan
    ) -> Launched:
        if not sampling:
            return Launched([], None, [], None)
        drafts = {chunk.slot: tokens for chunk, tokens in plan.drafts}
        sampled = self._sampler.sample(logits, [chunk for _, chunk in sampling], drafts)
        return Launched(sampling, sampled, [], None)

    def _sample_beside_prompts(self, plan: Plan, logits: Tensor) -> Launched:
        """As `_sample`, where some rows of logits are wanted for what they say of a prompt."""
        sampling, prompts = [], []
        rows: list[int] = []
        at = 0
        for chunk, sequence in zip(plan.step, plan.sequences, strict=True):
            begin, at = at, at + chunk.num_logits
            if chunk.num_logits and _is_of_prompt(chunk, sequence):
                prompts.append(self._chances(chunk, sequence, logits[begin:at]))
                if chunk.start + chunk.num_tokens < len(sequence.tokens):
                    continue
                chunk, begin = replace(chunk, num_logits=1), at - 1
            if chunk.num_logits:
                sampling.append((sequence, chunk))
                rows.extend(range(begin, at))
        wanted = self._to_device(np.array(rows, dtype=np.int64))
        launched = self._sample(sampling, logits[wanted], plan)
        event = _cuda.Event() if self._is_cuda else None
        if event is not None:
            event.record()
        return replace(launched, prompts=prompts, prompts_copied=event)

    def _chances(self, chunk: Chunk, sequence: Sequence, logits: Tensor) -> _PromptChances:
        """Logprobs of the tokens after those of a chunk, as far as they are the prompt's."""
        first = chunk.start + 1
        tokens = list(sequence.request.prompt[first : first + chunk.num_tokens])
        logprobs = logits[: len(tokens)].float().log_softmax(dim=-1)
        places = self._to_device(np.array(tokens, dtype=np.int64))[:, None]
        likeliest = logprobs.topk(int(sequence.request.prompt_logprobs or 0), dim=-1)
        wanted = (logprobs.gather(1, places)[:, 0], likeliest.indices, likeliest.values)
        on_host = (x.to("cpu", non_blocking=True) for x in wanted)
        return _PromptChances(sequence, first, tokens, *on_host)

    def _to_device(self, array: np.ndarray[Any, Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        if not self._is_cuda:
            return tensor
        return tensor.pin_memory().to(self._runner.device, non_blocking=True)


def _is_of_prompt(chunk: Chunk, sequence: Sequence) -> bool:
    """Whether a chunk's logits are wanted for the prompt's own tokens."""
    num_prompt = len(sequence.request.prompt)
    return sequence.prompt_logprobs is not None and chunk.start + 1 < num_prompt


def _note(chances: _PromptChances) -> None:
    found = chances.sequence.prompt_logprobs
    if found is None:
        return
    logprobs = chances.logprobs.tolist()
    tops = zip(chances.top_tokens.tolist(), chances.top_logprobs.tolist(), strict=True)
    for i, (ids, values) in enumerate(tops):
        top = tuple(zip(ids, values, strict=True))
        found[chances.start + i] = TokenLogprob(chances.tokens[i], logprobs[i], top)

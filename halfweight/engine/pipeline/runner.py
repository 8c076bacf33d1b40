"""A runner whose steps go through stages, each on its device, one after the other.

All stages have the same slots, positions and pages, so the scheduler sees one runner. Token ids are
in the first stage's table; that of a later one says which row of the states that entered is whose,
so that its runner looks states up as it would embeddings, also in a step that is recorded.

A page is the largest of the stages': where a stage's own is k times smaller, page p is its pages
k p to k p + k - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfweight.engine.step import Chunk, Runner, Step
from halfweight.engine.transfer import Staging, on_device
from halfweight.model.stage import enters


class StagedRunner:
    """Runner (engine/step.py) over the runners of all stages, in their order."""

    def __init__(
        self, models: Sequence[PreTrainedModel], runners: Sequence[Runner], step_tokens: int
    ) -> None:
        """Of `step_tokens` states have room to enter a stage."""
        first, last = runners[0], runners[-1]
        self.device, self.table, self.vocab_size = first.device, first.table, last.vocab_size
        self.page_tokens = max(runner.page_tokens for runner in runners)
        self.max_sequences = min(runner.max_sequences for runner in runners)
        self.max_context = min(runner.max_context for runner in runners)
        self.max_step_tokens = min(step_tokens, *(runner.max_step_tokens for runner in runners))
        self.most_drafts = min(runner.most_drafts for runner in runners)
        self.shares_prefixes = all(runner.shares_prefixes for runner in runners)
        self.cache_bytes = sum(runner.cache_bytes for runner in runners)
        pairs = zip(models, runners, strict=True)
        self.stages = [Station(model, runner, self.page_tokens) for model, runner in pairs]
        self.num_pages = min(stage.num_pages for stage in self.stages)

    @property
    def description(self) -> str:
        """What describe(runner) adds."""
        return "stages on " + ", ".join(str(stage.runner.device) for stage in self.stages)

    def run(self, step: Step) -> Tensor:
        """Logits [sum of num_logits, V] on the first stage's device; see Runner."""
        states: Tensor | None = None
        for stage in self.stages:
            states = stage.run(step, states)
        assert states is not None
        return states.to(self.device)

    def close(self) -> None:
        """Free all stages' pages."""
        for stage in self.stages:
            stage.runner.close()


class Station:
    """A stage as steps meet it."""

    def __init__(self, model: PreTrainedModel, runner: Runner, page_tokens: int) -> None:
        self.model, self.runner = model, runner
        self._entering = enters(model)
        self._pages_each = page_tokens // runner.page_tokens
        self.num_pages = runner.num_pages // self._pages_each
        self._staging = Staging(runner.device, torch.int64)

    def run(self, step: Step, states: Tensor | None) -> Tensor:
        """What the stage makes of the `states` [T, H] of a step's tokens: those, or logits.

        On the stage's device, valid until the next step.
        """
        with on_device(self.runner.device):
            if self._entering is not None:
                assert states is not None
                to_gpu = self.runner.device.type == "cuda"  # on a CPU who reads must wait
                self._entering.table[: len(states)].copy_(states, non_blocking=to_gpu)
                self._number(step)
            return self.runner.run([self._own(chunk) for chunk in step])

    def _number(self, step: Step) -> None:
        """Write the row of each token's states into the runner's table."""
        table = self.runner.table
        begins = [chunk.slot * table.shape[1] + chunk.start for chunk in step]
        spans = zip(begins, (chunk.num_tokens for chunk in step), strict=True)
        places = np.concatenate([np.arange(begin, begin + count) for begin, count in spans])
        sent = self._staging.send(np.stack([places, np.arange(len(places))]))
        table.view(-1)[sent[0]] = sent[1].int()

    def _own(self, chunk: Chunk) -> Chunk:
        """The chunk in the stage's own pages."""
        if self._pages_each == 1:
            return chunk
        each = range(self._pages_each)
        pages = [page * self._pages_each + i for page in chunk.pages for i in each]
        return replace(chunk, pages=pages)

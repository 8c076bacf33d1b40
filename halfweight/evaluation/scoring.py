"""How far a model's predictions are from the text and from another model's: the arithmetic.

A text is cut into windows of `context` tokens, each of which begins with what the tokenizer puts
before a text (a BOS, where it has one): Gemma without it is lost. Every token but the first is
scored once, in the window that shows the most text before it. Of a scored token are kept: its
negative log-likelihood under the model and under the reference, the Kullback-Leibler divergence of
the model's whole distribution from the reference's, and whether both put the same token on top. All
else, perplexity and its error, the paired change, percentiles, follows from these and is computed
in float64.

The divergence is taken as E_p[a - b] - (log sum exp a - log sum exp b) with a, b the logits of
reference and model: differences of nearly equal logits are exact, where the textbook form loses
them in the rounding of two log-probabilities.

Standard errors treat tokens as independent, as other tools' do. The change of perplexity is paired:
both models score the same tokens, so its error is far below that of either perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfweight.errors import UsageError

CHUNK_TOKENS = 256
"""Tokens whose logits are in memory at a time."""

TokenScores = np.dtype([("nll", "f8"), ("reference_nll", "f8"), ("kl", "f8"), ("same_top", "?")])
"""What is kept of one scored token; all but `nll` is NaN or False without a reference."""

Head = Callable[[Tensor], Tensor]
"""States [T, H] -> logits [T, V]."""


@dataclass(frozen=True)
class Window:
    """The model sees the start and ids[begin:end]; the tokens ids[first_scored:end] are scored."""

    begin: int
    end: int
    first_scored: int

    @property
    def num_scored(self) -> int:
        """Tokens scored in this window."""
        return self.end - self.first_scored


def cut(num_tokens: int, context: int, stride: int) -> list[Window]:
    """Windows of `context` tokens, `stride` apart, that score tokens 1 .. num_tokens - 1 once each.

    Where windows do not overlap (stride == context) the first token of each is not scored: no
    text is before it. Raises UsageError if a size is out of range.
    """
    if not 1 <= stride <= context or context < 2:
        raise UsageError(
            f"stride {stride} with context {context} leaves tokens unscored",
            hint="use a context of 2 or more and a stride from 1 to the context",
        )
    if num_tokens < 2:
        raise UsageError(
            f"the text has {num_tokens} tokens; a score needs 2", hint="give a longer text"
        )
    windows, scored = [], 0
    for begin in range(0, num_tokens, stride):
        end = min(begin + context, num_tokens)
        first = max(scored, begin + 1)
        if first < end:
            windows.append(Window(begin, end, first))
        scored = end
        if end == num_tokens:
            break
    return windows


@dataclass(frozen=True)
class Text:
    """Token ids [T] of a text, and those [S] that the tokenizer puts before any text, often one."""

    ids: Tensor
    start: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def windows(self, context: int, count: int) -> Tensor:
        """Up to `count` whole windows [B, context], one after the other, each with the start."""
        shown = context - len(self.start)
        count = min(count, len(self.ids) // shown)
        text = self.ids[: count * shown].reshape(count, shown)
        return torch.cat([self.start.expand(count, -1), text], dim=1)


@dataclass(frozen=True)
class Sample:
    """Token ids [T] of a text, the windows that cover them, and how many windows run at once.

    `start` [S] is what every window begins with; it is never scored.
    """

    ids: Tensor
    windows: tuple[Window, ...]
    batch_size: int
    start: Tensor

    @property
    def num_scored(self) -> int:
        """Tokens scored in all windows."""
        return sum(window.num_scored for window in self.windows)

    def batches(self) -> Iterator[tuple[Window, ...]]:
        """Windows in order, up to `batch_size` of one shape at a time."""
        for _, same in groupby(self.windows, key=lambda w: (w.end - w.begin, w.num_scored)):
            windows = tuple(same)
            for start in range(0, len(windows), self.batch_size):
                yield windows[start : start + self.batch_size]

    def inputs(self, batch: tuple[Window, ...]) -> Tensor:
        """Token ids [B, C] of a batch."""
        return torch.stack([torch.cat([self.start, self.ids[w.begin : w.end]]) for w in batch])

    def scored_states(self, body: Callable[[Tensor], Tensor], batch: tuple[Window, ...]) -> Tensor:
        """States [T, H] that predict the scored tokens of a batch, window after window."""
        states = body(self.inputs(batch))
        first = len(self.start) + batch[0].first_scored - batch[0].begin
        return states[:, first - 1 : -1].reshape(-1, states.shape[-1])

    def targets(self, batch: tuple[Window, ...]) -> Tensor:
        """The scored tokens [T] of a batch, window after window."""
        return torch.cat([self.ids[w.first_scored : w.end] for w in batch])


def sample(
    text: Text,
    *,
    context: int = 1024,
    stride: int | None = None,
    tokens: int | None = None,
    batch_size: int = 1,
) -> Sample:
    """Cut a text, or its first `tokens` tokens, into windows of `context`, start included.

    Windows that do not overlap stay so: the largest stride is what a window shows of the text.
    """
    if batch_size < 1:
        raise UsageError(f"batch size {batch_size} is not positive", hint="use 1 or more")
    ids, shown = text.ids[:tokens], context - len(text.start)
    stride = context if stride is None else stride
    if stride <= context:
        stride = min(stride, shown)
    return Sample(ids, tuple(cut(len(ids), shown, stride)), batch_size, text.start)


def score(
    states: Tensor,
    head: Head,
    targets: Tensor,
    reference: tuple[Tensor, Head] | None = None,
) -> NDArray[Any]:
    """TokenScores [T] of `targets` [T], from the states [T, H] that predict them.

    `reference` is the other model's states [T, H'] and head, over the same vocabulary. Raises
    UsageError if vocabularies differ in size.
    """
    parts = []
    for start in range(0, len(targets), CHUNK_TOKENS):
        chunk = slice(start, start + CHUNK_TOKENS)
        other = None if reference is None else reference[1](reference[0][chunk])
        parts.append(_score_logits(head(states[chunk]), targets[chunk], other))
    return np.concatenate(parts)


def _score_logits(logits: Tensor, targets: Tensor, reference: Tensor | None) -> NDArray[Any]:
    logits = logits.float()
    scores = np.full(len(targets), np.nan, TokenScores)
    log_sum = logits.logsumexp(dim=-1)
    scores["nll"] = _at(log_sum, logits, targets)
    scores["same_top"] = False
    if reference is None:
        return scores
    if reference.shape != logits.shape:
        raise UsageError(
            f"the model has {logits.shape[-1]} tokens, the reference {reference.shape[-1]}",
            hint="compare models that share a vocabulary",
        )
    reference = reference.float()
    reference_log_sum = reference.logsumexp(dim=-1)
    scores["reference_nll"] = _at(reference_log_sum, reference, targets)
    scores["same_top"] = (logits.argmax(dim=-1) == reference.argmax(dim=-1)).cpu().numpy()
    probabilities = (reference - reference_log_sum.unsqueeze(-1)).exp_()
    expected = probabilities.mul_(reference.sub(logits)).sum(dim=-1, dtype=torch.float64)
    scores["kl"] = (expected - (reference_log_sum.double() - log_sum.double())).cpu().numpy()
    return scores


def _at(log_sum: Tensor, logits: Tensor, targets: Tensor) -> NDArray[np.float64]:
    """Negative log-likelihood of each target."""
    chosen = logits.gather(-1, targets.to(logits.device).unsqueeze(-1)).squeeze(-1)
    result: NDArray[np.float64] = (log_sum.double() - chosen.double()).cpu().numpy()
    return result


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens, or a function of one, and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, samples: NDArray[Any]) -> Estimate:
        """Mean and standard error of samples (0 of a single one)."""
        count = len(samples)
        error = float(samples.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
        return cls(float(samples.mean()), error)

    def exp(self) -> Estimate:
        """e to this, its error by the slope."""
        value = math.exp(self.value)
        return Estimate(value, value * self.error)


@dataclass(frozen=True)
class Comparison:
    """A model against a reference on the same tokens.

    `perplexity_change` is relative (0.001 is +0.1 %) and paired. `kl_*` are of the divergence of
    the model from the reference in nats, `top_agreement` a share of tokens, `probability_rms` the
    root mean square change of the right token's probability.
    """

    reference_perplexity: Estimate
    perplexity_change: Estimate
    kl_mean: Estimate
    kl_median: float
    kl_99: float
    kl_999: float
    kl_max: float
    top_agreement: Estimate
    probability_rms: float


@dataclass(frozen=True)
class Evaluation:
    """A model on a text: its perplexity, and its distance from a reference if there was one."""

    num_tokens: int
    perplexity: Estimate
    comparison: Comparison | None


def summarize(scores: NDArray[Any]) -> Evaluation:
    """The figures that TokenScores [T] come to."""
    perplexity = Estimate.of(scores["nll"]).exp()
    compared = not np.isnan(scores["kl"]).any()
    return Evaluation(len(scores), perplexity, _compare(scores) if compared else None)


def _compare(scores: NDArray[Any]) -> Comparison:
    ratio = Estimate.of(scores["nll"] - scores["reference_nll"]).exp()
    median, kl_99, kl_999 = np.quantile(scores["kl"], (0.5, 0.99, 0.999)).tolist()
    change = np.exp(-scores["nll"]) - np.exp(-scores["reference_nll"])
    return Comparison(
        reference_perplexity=Estimate.of(scores["reference_nll"]).exp(),
        perplexity_change=Estimate(ratio.value - 1, ratio.error),
        kl_mean=Estimate.of(scores["kl"]),
        kl_median=median,
        kl_99=kl_99,
        kl_999=kl_999,
        kl_max=float(scores["kl"].max()),
        top_agreement=Estimate.of(scores["same_top"].astype(float)),
        probability_rms=math.sqrt(float((change * change).mean())),
    )

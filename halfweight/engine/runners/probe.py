"""Does a runner give a model's own logits? A few tokens tell, before any request does.

Two texts of different lengths go through the runner as requests would: the first in two chunks, the
second beside its second chunk, then both decode together. Each logit is held against the plain
forward of that text alone, without a cache, with transformers' eager attention, the one that every
model defines itself. What mixes the tokens of a row, drops a state between chunks, takes positions
from elsewhere or attends by other rules comes out wrong by as much as the logits themselves.

In 16 bits equal computations differ, and with experts a token near a tie may go to another one. So
of each group of rows the median decides, and it may be some hundredths of the logits' own spread.
The median of a few rows is itself a matter of luck: rows that rounding moves by 0.06 in the middle
are moved by 0.3 here and there. So what is not within the bound is tried on more texts, and the
median of all rows decides.
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfweight.engine.runners.attention_interface import EAGER, configs_of, using
from halfweight.engine.step import Chunk, Runner, Step

TEXT_LENGTHS = (16, 14)
_STEPS = (
    ((0, 0, 6),),
    ((0, 6, 6), (1, 0, 10)),
    *(((0, 12 + i, 1), (1, 10 + i, 1)) for i in range(4)),
)
"""(text, start, tokens) of the chunks of each step."""
_LIMITS = {torch.float32: 1e-3, torch.float64: 1e-3}
_LIMIT_16BIT = 0.1
_ROUNDS_16BIT = 4
"""Texts that are tried until the median of all is within the bound."""
_PLACES = 251
"""Parts of the vocabulary that ids are taken from."""


def texts(model: PreTrainedModel, round_: int = 0) -> list[Tensor]:
    """Two texts of ids spread over the vocabulary, none of them special to the configuration."""
    config = model.config.get_text_config(decoder=True)
    special = {v for n, v in vars(config).items() if n.endswith("token_id") and isinstance(v, int)}
    step = max(1, config.vocab_size // _PLACES)
    first, second = TEXT_LENGTHS
    begin = round_ * (first + second)
    spread = (i * step % config.vocab_size for i in range(3, 3 + 2 * _PLACES))
    ids = [i for i in spread if i not in special][begin : begin + first + second]
    where = {"dtype": torch.long, "device": model.device}
    return [torch.tensor(ids[:first], **where), torch.tensor(ids[first:], **where)]


@torch.inference_mode()
def plain_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits [T, V] in float32 of one text [T] by the model alone, without a cache."""
    with using(configs_of(model), EAGER):
        logits: Tensor = model(input_ids=ids[None], use_cache=False).logits
    return logits[0].float()


def deviation(runner: Runner, model: PreTrainedModel, bound: float) -> float:
    """The largest median of the rows' errors among chunks, as a part of the logits' spread.

    Of one round of texts if that is within `bound`, else in 16 bits of several rounds together.
    Takes slots 0 and 1 and pages 1 and 2 of a runner that has no sequences; infinite for NaN.
    Ranks see the same logits, so all of them go on or none.
    """
    rounds: list[list[Tensor]] = []
    found = 0.0
    for round_ in range(_ROUNDS_16BIT if bound >= _LIMIT_16BIT else 1):
        rounds.append(_groups(runner, model, texts(model, round_)))
        found = max(float(torch.cat(group).median()) for group in zip(*rounds, strict=True))
        if found <= bound:
            break
    return found


def limit(dtype: torch.dtype, kv_cache: str) -> float:
    """The deviation up to which a runner computes what the model does."""
    return _LIMIT_16BIT if kv_cache == "int8" else _LIMITS.get(dtype, _LIMIT_16BIT)


def _groups(runner: Runner, model: PreTrainedModel, both: list[Tensor]) -> list[Tensor]:
    """Errors of the rows of each chunk of two texts, and of all that decode."""
    for slot, ids in enumerate(both):
        runner.table[slot, : len(ids)] = ids
    expected = [plain_logits(model, ids) for ids in both]
    found = [
        _errors(
            runner,
            [Chunk(text, start, num, num, [text + 1]) for text, start, num in step],
            expected,
        )
        for step in _STEPS
    ]
    errors = list(chain.from_iterable(found))
    decoding = [rows for rows in errors if len(rows) == 1]
    return [*(rows for rows in errors if len(rows) > 1), torch.cat(decoding)]


def _errors(runner: Runner, chunks: Step, expected: list[Tensor]) -> list[Tensor]:
    """One tensor of rows' errors for each chunk of a step."""
    got = torch.split(runner.run(chunks).float(), [chunk.num_logits for chunk in chunks])
    found = []
    for rows, chunk in zip(got, chunks, strict=True):
        right = expected[chunk.slot][chunk.start : chunk.start + chunk.num_tokens]
        spread = (right - right.mean(dim=-1, keepdim=True)).norm(dim=-1)
        error = (rows - right).norm(dim=-1) / spread
        error = error.nan_to_num(nan=torch.inf).masked_fill(right.isnan().any(dim=-1), 0.0)
        found.append(error)
    return found

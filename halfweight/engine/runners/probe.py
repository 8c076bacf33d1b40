"""Does a runner give a model's own logits? A few tokens tell, before any request does.

Two texts of different lengths go through the runner as requests would: the first in two chunks, the
second beside its second chunk, then both decode together. Each logit is held against the plain
forward of that text alone, without a cache, with transformers' eager attention, the one that every
model defines itself. What mixes the tokens of a row, drops a state between chunks, takes positions
from elsewhere or attends by other rules comes out wrong by as much as the logits themselves.

In 16 bits equal computations differ, and with experts a token near a tie may go to another one. So
of each group of rows the median decides, and it may be some hundredths of the logits' own spread.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfweight.engine.runners.attention_interface import EAGER, configs_of, using
from halfweight.engine.step import Chunk, Runner, Step

TEXT_LENGTHS = (11, 7)
_STEPS = (((0, 0, 5),), ((0, 5, 4), (1, 0, 5)), ((0, 9, 1), (1, 5, 1)), ((0, 10, 1), (1, 6, 1)))
"""(text, start, tokens) of the chunks of each step."""
_LIMITS = {torch.float32: 1e-3, torch.float64: 1e-3}
_LIMIT_16BIT = 0.1


def texts(model: PreTrainedModel) -> list[Tensor]:
    """Two texts of ids spread over the vocabulary, none of them special to the configuration."""
    config = model.config.get_text_config(decoder=True)
    special = {v for n, v in vars(config).items() if n.endswith("token_id") and isinstance(v, int)}
    step = max(1, config.vocab_size // 61)
    ids = [i * step % config.vocab_size for i in range(3, 3 + 2 * sum(TEXT_LENGTHS))]
    ids = [i for i in ids if i not in special]
    first, second = TEXT_LENGTHS
    where = {"dtype": torch.long, "device": model.device}
    return [torch.tensor(ids[:first], **where), torch.tensor(ids[first : first + second], **where)]


@torch.inference_mode()
def plain_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits [T, V] in float32 of one text [T] by the model alone, without a cache."""
    with using(configs_of(model), EAGER):
        logits: Tensor = model(input_ids=ids[None], use_cache=False).logits
    return logits[0].float()


def deviation(runner: Runner, model: PreTrainedModel) -> float:
    """The largest median of the rows' errors among chunks, as a part of the logits' spread.

    Takes slots 0 and 1 and pages 1 and 2 of a runner that has no sequences; infinite for NaN.
    """
    both = texts(model)
    for slot, ids in enumerate(both):
        runner.table[slot, : len(ids)] = ids
    expected = [plain_logits(model, ids) for ids in both]
    groups: list[Tensor] = []
    decoding: list[Tensor] = []
    for step in _STEPS:
        chunks = [Chunk(text, start, num, num, [text + 1]) for text, start, num in step]
        errors = _errors(runner, chunks, expected)
        (decoding if len(errors[0]) == 1 else groups).extend(errors)
    groups.append(torch.cat(decoding))
    return max(float(group.median()) for group in groups)


def limit(dtype: torch.dtype, kv_cache: str) -> float:
    """The deviation up to which a runner computes what the model does."""
    return _LIMIT_16BIT if kv_cache == "int8" else _LIMITS.get(dtype, _LIMIT_16BIT)


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

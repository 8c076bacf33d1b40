"""A run of a model's layers on one device, as a model of its own: one stage of several.

A stage loads a smaller checkpoint (`stage_part`): the same files, of which it reads its own layers,
renumbered from 0. What transformers builds of it is a tied model with fewer layers. Its embedding
is the model's own in the first stage and the head's matrix in the last; one between them reads a
single row. `as_stage` then takes out what lies elsewhere:

    embedding   of all but the first: a table of states, whose "token ids" are its rows (`Entering`)
    head        of all but the last: gives out states as they are (`Leaving`), without the last norm

So runners, pages and attention see a model like any other, whose logits are states. Refused: hooks
that move a model's hidden states between devices, which no recorded step and no compiled call has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from halfweight.checkpoint.headers import Checkpoint
from halfweight.checkpoint.shard import StoredTensor
from halfweight.memory.pipeline import Stage
from halfweight.model.loading import load_checkpoint

EMBEDDING, HEAD = "model.embed_tokens.", "lm_head."


class Entering(nn.Module):
    """The embedding of a stage that is given states: row r of `table` [rows, H] for "token" r."""

    def __init__(self, rows: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
        """In float32 on a CPU, whose compiled step has states so. Filled with some numbers, since
        runners try a model before they take it.
        """
        super().__init__()
        kept = torch.float32 if device.type == "cpu" else dtype
        chosen = torch.Generator().manual_seed(0)
        some = torch.randn(min(rows, 64), hidden, generator=chosen).to(device, kept)
        self.table = some.repeat(-(-rows // len(some)), 1)[:rows].contiguous()
        self.dtype = dtype

    def forward(self, rows: Tensor) -> Tensor:
        """rows [...] -> states [..., H] in the model's dtype."""
        return self.table[rows.long()].to(self.dtype)


class Leaving(nn.Module):
    """The head of a stage whose states go on to another."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.out_features = hidden

    def forward(self, states: Tensor) -> Tensor:
        """The states [..., H]."""
        return states


class Unnormed(nn.Module):
    """In place of the last norm, whose weight stays for who asks for its dtype."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, states: Tensor) -> Tensor:
        """The states as they are."""
        return states


def enters(model: PreTrainedModel) -> Entering | None:
    """Where a stage takes its states from; None for a model that reads token ids."""
    found = model.get_input_embeddings()
    return found if isinstance(found, Entering) else None


def leaves(model: PreTrainedModel) -> bool:
    """Whether a stage gives states, not logits."""
    return isinstance(model.get_output_embeddings(), Leaving)


def logits_width(model: PreTrainedModel) -> int:
    """Numbers of a row of what a model gives: its vocabulary, or of states."""
    if leaves(model) or enters(model) is not None:
        return int(model.get_output_embeddings().out_features)
    return int(model.config.vocab_size)


def stage_part(checkpoint: Checkpoint, stage: Stage) -> Checkpoint:
    """The checkpoint as a stage reads it, its layers renumbered from 0."""
    is_tied = not any(tensor.name.startswith(HEAD) for tensor in checkpoint.tensors)
    shards = tuple(
        replace(shard, tensors=tuple(_held(shard.tensors, stage, is_tied)))
        for shard in checkpoint.shards
    )
    shards = tuple(shard for shard in shards if shard.tensors)
    rows = next(
        tensor.info.shape[0]
        for shard in shards
        for tensor in shard.tensors
        if tensor.name in (f"{EMBEDDING}weight", f"{EMBEDDING}weight_packed")
    )
    return Checkpoint(checkpoint.root, shards, _config(checkpoint.config, stage, rows))


def _held(tensors: tuple[StoredTensor, ...], stage: Stage, is_tied: bool) -> Iterator[StoredTensor]:
    """A stage's tensors by the names that they have there."""
    head_is_embedding = stage.is_last and not stage.is_first
    for tensor in tensors:
        name, role = tensor.name, stage.role_of(tensor.name)
        if role == "layer":
            before, _, after = name.partition("layers.")
            number, _, rest = after.partition(".")
            yield _named(tensor, f"{before}layers.{int(number) - stage.begin}.{rest}")
        elif role == "embedding":
            if stage.is_first or (stage.is_last and is_tied):
                yield tensor
            elif not stage.is_last:
                yield tensor if name.endswith("weight_shape") else tensor.rows(0, 1)
        elif role == "head" and head_is_embedding:
            yield _named(tensor, EMBEDDING + name.removeprefix(HEAD))
        elif role is not None:
            yield tensor


def _named(tensor: StoredTensor, name: str) -> StoredTensor:
    return replace(tensor, info=replace(tensor.info, name=name))


def _config(content: dict[str, Any], stage: Stage, rows: int) -> dict[str, Any]:
    """The config.json of a stage: tied, with as many layers and rows of embedding as it has."""
    tied = {"tie_word_embeddings": True, "pad_token_id": None}
    own = {"num_hidden_layers": stage.end - stage.begin, "vocab_size": rows}
    special = {} if stage.is_first else {"bos_token_id": None, "eos_token_id": None}
    return {**content, **tied, **own, **special, **_by_number(content, stage)}


def _by_number(content: dict[str, Any], stage: Stage) -> dict[str, Any]:
    """What a config says of layers by their numbers, by those that they have in the stage."""
    found: dict[str, Any] = {}
    numbers = range(stage.begin, stage.end)
    if kinds := content.get("layer_types"):
        found["layer_types"] = [kinds[i] for i in numbers]
    if "max_window_layers" in content:
        found["max_window_layers"] = max(0, content["max_window_layers"] - stage.begin)
    if "decoder_sparse_step" in content:
        step, named = content["decoder_sparse_step"], content.get("mlp_only_layers") or []
        dense = [i - stage.begin for i in numbers if i in named or (i + 1) % step]
        found |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    return found


def load_stage(part: Checkpoint, stage: Stage, step_tokens: int, **options: Any) -> PreTrainedModel:
    """A stage of a model, of its `stage_part`; up to `step_tokens` states enter it at once.

    `options` are those of `load_checkpoint`, whose errors it raises.
    """
    model = load_checkpoint(part, device=stage.device, **options)
    as_stage(model, stage, step_tokens)
    return model


def as_stage(model: PreTrainedModel, stage: Stage, step_tokens: int) -> None:
    """Make a model, as it was loaded of `stage_part`, a stage of the whole one."""
    body: Any = model.model
    hidden = int(model.config.hidden_size)
    if not stage.is_last:
        model.lm_head = Leaving(hidden)
        body.norm = Unnormed(body.norm)
    if not stage.is_first:
        body.embed_tokens = Entering(step_tokens, hidden, model.dtype, model.device)
        model.config.vocab_size = step_tokens

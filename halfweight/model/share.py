"""One rank's part of a model that several run together: less of each file, and sums between ranks.

A rank loads a smaller checkpoint: the same files, of which it reads some rows or columns of each
weight (`own_part`), with a config of its own sizes. What transformers builds of it is a model with
fewer heads, narrower MLPs and a shorter vocabulary. `join` makes the ranks' models one:

    embedding   token ids are those of rank 0; a rank looks up its own rows, the sum is every row
    o, down     a rank's product is part of a sum
    experts     the sum of what each rank's columns of its experts give
    head        each rank's logits are gathered

So everything above (runners, probe, sampler) sees a model like any other, whose forward all ranks
must call together. Refused: DTensor, which is Python around every operation, and transformers' own
plan, which leaves embedding and head whole on every rank.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from halfweight.checkpoint.headers import Checkpoint
from halfweight.checkpoint.shard import StoredTensor
from halfweight.errors import UsageError
from halfweight.memory.device_memory import available_bytes
from halfweight.memory.devices import processor_device
from halfweight.memory.named_model import planned_model
from halfweight.memory.plan import Model, check_ranks
from halfweight.memory.tensor_parallel import KINDS, Share, split_of
from halfweight.model.experts import QuantizedExperts, is_fused
from halfweight.model.loading import load_checkpoint
from halfweight.model.modules import QuantizedEmbedding, QuantizedLinear
from halfweight.quantization.scheme import Recipe

_SHARED_BY = "_halfweight_shared_by"


class Link(Protocol):
    """What goes between ranks inside a forward. All ranks call the same, in the same order."""

    can_be_recorded: bool
    """Whether a CUDA graph can hold it."""

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the ranks' tensors, the same bits on all; may be in place."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """[..., N] of each rank as [..., ranks * N]."""
        ...

    def from_first(self, x: Tensor) -> Tensor:
        """Rank 0's tensor; may be in place."""
        ...

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        ...


@dataclass(frozen=True)
class Shared:
    """That a model is one rank's part, and how it reaches the others."""

    share: Share
    link: Link


def shared(model: nn.Module) -> Shared | None:
    """How a model is shared among ranks; None for a whole one."""
    found: Shared | None = getattr(model, _SHARED_BY, None)
    return found


def free_on_all(model: PreTrainedModel) -> int | None:
    """Bytes that are free on the model's device; of several ranks' devices the fewest.

    None for CPUs, which swap.
    """
    free, by = available_bytes(model.device), shared(model)
    return free if free is None or by is None else by.link.least(free)


def free_in_memory(model: PreTrainedModel) -> int:
    """Bytes of this machine's memory that are free for a model on a CPU.

    Several ranks are taken to share one machine, and agree on the fewest.
    """
    free, by = processor_device().free_bytes, shared(model)
    return free if by is None else by.link.least(free // by.share.ranks)


def can_be_recorded(model: PreTrainedModel) -> bool:
    """Whether a CUDA graph can hold the model's forward, by how its ranks reach each other."""
    by = shared(model)
    return by is None or by.link.can_be_recorded


def described(root: str | os.PathLike[str]) -> Model:
    """What the planner knows of a folder as it is: one without INT8 weights stays in 16 bits."""
    return planned_model(os.fspath(root), Recipe(keep=("*",)))


def check_shareable(model: Model, ranks: int) -> None:
    """Raise UsageError for a model that so many ranks cannot run together; reads no weights."""
    if model.architecture.kind not in KINDS:
        raise UsageError(
            f"{model.architecture.name} is a {model.architecture.kind}, which runs on one device",
            hint=f"several run {', '.join(KINDS)}",
        )
    check_ranks(model, ranks)


def own_part(checkpoint: Checkpoint, model: Model, rank: int, ranks: int) -> Checkpoint:
    """The checkpoint as a rank reads it; `model` is what the planner knows of it."""
    share = share_of(model, rank, ranks)
    shards = tuple(
        replace(shard, tensors=tuple(_own(tensor, share) for tensor in shard.tensors))
        for shard in checkpoint.shards
    )
    return Checkpoint(checkpoint.root, shards, share.config(checkpoint.config, model.architecture))


def share_of(model: Model, rank: int, ranks: int) -> Share:
    """What a rank holds of a model; raises UsageError as `check_shareable`."""
    check_shareable(model, ranks)
    return Share(rank, ranks, model.architecture.kv_heads)


def _own(tensor: StoredTensor, share: Share) -> StoredTensor:
    module, _, part = tensor.name.rpartition(".")
    split, shape = split_of(module), tensor.info.shape
    if split is None or part == "weight_shape":
        return tensor
    if split != "columns":
        return tensor.rows(*share.span(shape[0], split))
    if len(shape) == 1 or shape[1] == 1:  # a bias, or one scale for each whole row
        return tensor
    return tensor.columns(*share.span(shape[1], split))


def load_part(
    checkpoint: Checkpoint, rank: int, ranks: int, link: Link, **options: Any
) -> PreTrainedModel:
    """A rank's part of the model of a checkpoint, joined to the others by `link`.

    `options` are those of `load_checkpoint`; raises what it does and `check_shareable`.
    """
    model = described(checkpoint.root)
    part = own_part(checkpoint, model, rank, ranks)
    loaded = load_checkpoint(part, **options)
    join(loaded, Shared(share_of(model, rank, ranks), link), checkpoint.config)
    return loaded


def join(model: PreTrainedModel, by: Shared, whole: dict[str, Any]) -> None:
    """Make a rank's model, as it was loaded, a part of the whole one, whose config.json is `whole`.

    Modules take the classes below, with the tensors that they have.
    """
    for name, module in list(model.named_modules()):
        leaf = name.rpartition(".")[2]
        if isinstance(module, QuantizedExperts):
            module.after = by.link.sum
        elif is_fused(module):
            module.register_forward_hook(_then(by.link.sum))
        elif leaf == "embed_tokens":
            _join_embedding(module, by)
        elif leaf == "lm_head":
            _put_after(module, by.link.gather)
        elif split_of(leaf) == "columns":
            if by.share.rank and getattr(module, "bias", None) is not None:
                module.bias = None  # it is in the sum once
            _put_after(module, by.link.sum)
    model.config.vocab_size = whole["vocab_size"]
    model.config.pad_token_id = whole.get("pad_token_id")
    setattr(model, _SHARED_BY, by)


def _put_after(module: nn.Module, after: Callable[[Tensor], Tensor]) -> None:
    if isinstance(module, QuantizedLinear):
        module.__class__ = JoinedLinear
        cast(JoinedLinear, module).after = after
    else:
        module.register_forward_hook(_then(after))


def _then(after: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda module, x, y: after(y)


def _join_embedding(module: nn.Module, by: Shared) -> None:
    assert isinstance(module, QuantizedEmbedding | nn.Embedding)
    rows = OwnRows(module.num_embeddings, by)
    if isinstance(module, QuantizedEmbedding):
        module.__class__ = JoinedEmbedding
    else:
        module.__class__ = Joined16BitEmbedding
        module.padding_idx = None
    module.rows = rows  # type: ignore[assignment]  # of its new class


class OwnRows:
    """The rows of the vocabulary that a rank holds."""

    def __init__(self, count: int, by: Shared) -> None:
        self._begin, self._count, self._link = by.share.rank * count, count, by.link

    def look_up(self, ids: Tensor, table: Callable[[Tensor], Tensor]) -> Tensor:
        """Rows [..., K] of rank 0's ids, of which this rank's `table` has some."""
        places = self._link.from_first(ids) - self._begin
        is_elsewhere = (places < 0) | (places >= self._count)
        found = table(places.clamp(0, self._count - 1))
        return self._link.sum(found.masked_fill_(is_elsewhere[..., None], 0))


class JoinedEmbedding(QuantizedEmbedding):
    """An embedding in INT8 whose rows lie on several ranks."""

    rows: OwnRows

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...], which are rank 0's -> rows [..., K]."""
        return self.rows.look_up(ids, super().forward)

    def direct(self) -> Callable[[Tensor], Tensor]:
        """See QuantizedEmbedding."""
        table, rows = super().direct(), self.rows
        return lambda ids: rows.look_up(ids, table)


class Joined16BitEmbedding(nn.Embedding):
    """The same in 16 bits."""

    rows: OwnRows

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...], which are rank 0's -> rows [..., K]."""
        return self.rows.look_up(ids, super().forward)


class JoinedLinear(QuantizedLinear):
    """A linear whose product goes through `after`: a sum over ranks, or their rows gathered."""

    after: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """See QuantizedLinear."""
        return self.after(super().forward(x))

    def direct(self) -> Callable[[Tensor], Tensor]:
        """See QuantizedLinear."""
        product, after = super().direct(), self.after
        return lambda x: after(product(x))

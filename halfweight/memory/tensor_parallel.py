"""What each of several ranks holds of a model that they run together. No torch here.

A rank has some of the heads, of the MLP's columns and of the vocabulary: of linears that read what
all ranks hold (q, k, v, gate, up), and of embedding and head, some rows; of those that read what
only this rank holds (o, down), some columns, in whole groups, and their products are summed over
the ranks. Norms and routers are whole everywhere. Where ranks outnumber the heads of keys and
values, several have the same one.

The loader cuts by this page and the planner counts by it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from halfweight.memory.architecture import Architecture
from halfweight.quantization.scheme import DIVIDED_BY_COLUMNS, FALLBACK_GROUP_SIZES, Decision

Split = Literal["rows", "kv rows", "columns"]

KINDS = ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
"""model_type of the models that several ranks can run."""
SPLITS: dict[str, Split] = {
    **dict.fromkeys(("q_proj", "gate_proj", "up_proj", "w1", "w3"), "rows"),
    **dict.fromkeys(("k_proj", "v_proj"), "kv rows"),
    **dict.fromkeys(DIVIDED_BY_COLUMNS, "columns"),
    **dict.fromkeys(("embed_tokens", "lm_head"), "rows"),
}
"""By the last part of a module's name; what is not named is whole on every rank."""
DIVIDED_SIZES = (
    *("num_attention_heads", "vocab_size", "intermediate_size"),
    *("moe_intermediate_size", "shared_expert_intermediate_size"),
)
"""Keys of config.json that are divided by the number of ranks."""


@dataclass(frozen=True)
class Share:
    """Rank `rank` of `ranks`, and how many heads of keys and values the whole model has."""

    rank: int
    ranks: int
    kv_heads: int

    @property
    def own_kv_heads(self) -> int:
        """Heads of keys and values that the rank holds."""
        return max(1, self.kv_heads // self.ranks)

    def span(self, size: int, split: Split) -> tuple[int, int]:
        """Which of `size` rows or columns the rank holds: begin and end."""
        if split == "kv rows" and self.ranks > self.kv_heads:
            each = size // self.kv_heads
            begin = self.rank * self.kv_heads // self.ranks * each
        else:
            each = size // self.ranks
            begin = self.rank * each
        return begin, begin + each

    def config(self, content: dict[str, Any], a: Architecture) -> dict[str, Any]:
        """The config.json of a model with the rank's sizes."""
        divided = {k: content[k] // self.ranks for k in DIVIDED_SIZES if content.get(k)}
        own = {"num_key_value_heads": self.own_kv_heads, "head_dim": a.head_dim}
        return {**content, **divided, **own, "pad_token_id": None}


def split_of(module: str) -> Split | None:
    """How the weight of a module is divided; None if it is whole on every rank."""
    return SPLITS.get(module.rpartition(".")[2])


def own_sizes(a: Architecture, ranks: int) -> Architecture:
    """The architecture that a rank runs, but for its vocabulary: all have all logits."""
    return replace(
        a,
        heads=a.heads // ranks,
        kv_heads=max(1, a.kv_heads // ranks),
        intermediate=a.intermediate // ranks,
    )


def is_divided(tensor: str) -> bool:
    """Whether ranks hold parts of a tensor; a bias that goes into a sum is rank 0's."""
    module, _, part = tensor.rpartition(".")
    split = split_of(module)
    return split is not None and not (split == "columns" and part == "bias")


def is_of_kv_heads(tensor: str) -> bool:
    """Whether a tensor goes with heads of keys and values, of which several ranks may have one."""
    return split_of(tensor.rpartition(".")[0]) == "kv rows"


def bytes_a_part(decision: Decision) -> int:
    """Of an INT8 weight whose columns ranks divide: scales that go with each part, one a row."""
    if decision.scheme is None or not _is_by_columns(decision):
        return 0
    return decision.tensor.shape[0] * decision.scheme.format.row_bytes


def why_not(a: Architecture, decisions: Iterable[Decision], ranks: int) -> str | None:
    """What `ranks` does not divide, after "so many GPUs"; None where it divides all."""
    if ranks == 1:
        return None
    for what, count in (
        ("heads", a.heads),
        ("MLP columns", a.intermediate),
        ("tokens of vocabulary", a.vocabulary),
    ):
        if count % ranks:
            return f"do not divide {count} {what}"
    if a.kv_heads % ranks and ranks % a.kv_heads:
        return f"do not divide {a.kv_heads} key-value heads, nor they them"
    for decision in decisions:
        group = decision.scheme.group_size if decision.scheme else None
        if not isinstance(group, int) or not _is_by_columns(decision):
            continue
        if decision.tensor.shape[1] % (ranks * group):
            return f"cut {decision.tensor.name} inside a group of {group}"
    return None


def without_groups(alone: Iterable[Decision], made: Iterable[Decision], ranks: int) -> str | None:
    """The first weight in INT8 on one GPU that has no groups for `ranks`, as `why_not` says it."""
    for one, other in zip(alone, made, strict=True):
        if one.scheme is not None and other.scheme is None:
            name, columns = one.tensor.name, one.tensor.shape[1]
            return f"leave {name} {columns / ranks:g} columns each, which no group size divides"
    return None


def regrouping(a: Architecture, decisions: Iterable[Decision], ranks: int) -> str:
    """What to add to a hint where nothing but the size of groups keeps `ranks` from sharing it."""
    least = ranks * FALLBACK_GROUP_SIZES[-1]
    columns = [d.tensor.shape[1] for d in decisions if d.scheme and _is_by_columns(d)]
    if why_not(a, (), ranks) or any(count % least for count in columns):
        return ""
    command = f"`halfweight quantize --tensor-parallel {ranks} --group-size 128`"
    return f"; {command} of the source makes groups that allow it"


def _is_by_columns(decision: Decision) -> bool:
    return split_of(decision.tensor.name.removesuffix(".weight")) == "columns"

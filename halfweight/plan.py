"""What a model needs of each GPU before anything is loaded, and what fits. No torch here.

The arithmetic follows how `halfweight.generate` runs: weights, a static cache of exactly the
tokens asked for, prompts read CHUNK_TOKENS at a time (all sequences together), logits of the last
token only, SDPA with a mask, one recorded decode step. Weights and cache are exact. What prefill
holds at its worst moment follows from the shapes, op by op: either inside attention (mask in two
forms, keys and values repeated for grouped heads) or inside the MLP (three of its widths). The
driver's context, libraries' workspaces and the allocator's rounding are not computable: they are a
range, ASSUMED_OVERHEAD, until `--overhead` gives what was measured.

`low` takes the least overhead, `high` the most: a plan fits if `high` does, is tight if only
`likely` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from halfweight.architecture import Architecture
from halfweight.errors import DoesNotFitError, UsageError
from halfweight.scheme import GROUP_SIZES, Decision, Recipe, Scheme

GIB = 1 << 30
MIB = 1 << 20
CHUNK_TOKENS = 2048
"""As in generate.py; a test keeps them equal."""
KERNEL_WORKSPACE_BYTES = 32 * MIB
"""Of either weights: torch's cuBLAS workspace on Hopper, or our blocks of 16-bit weights."""
ASSUMED_OVERHEAD = (MIB * 400, MIB * 700, MIB * 1400)
"""Driver context, loaded kernels, allocator's rounding: low, likely, high. An assumption."""

Weights = Literal["16bit", "int8"]
Runtime = Literal["halfweight", "transformers-tp", "vllm"]
KvDtype = Literal["16bit", "int8"]
Verdict = Literal["fits", "tight", "does not fit"]
Quantity = Literal["batch", "context", "gpus", "group-size"]


@dataclass(frozen=True)
class Range:
    """Bytes: at least, probably, at most."""

    low: int
    likely: int
    high: int


@dataclass(frozen=True)
class Workload:
    """What is to run: `batch` sequences of `context` tokens, prompt and answer together."""

    context: int = 4096
    batch: int = 1
    kv_dtype: KvDtype = "16bit"
    ranks: int = 1
    runtime: Runtime = "halfweight"
    overhead: tuple[int, int, int] = ASSUMED_OVERHEAD

    def __post_init__(self) -> None:
        for name in ("context", "batch", "ranks"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}", hint="give 1 or more")


@dataclass(frozen=True)
class Footprint:
    """Bytes on one GPU. `data` to `rest` are weights; `sharded` is the part of them that
    tensor parallelism divides, the remainder lies on every rank.
    """

    weights: Weights
    data: int
    scales: int
    rest: int
    sharded: int
    kv_cache: int
    logits: int
    activations: int
    workspace: int
    graph: int
    overhead: Range

    @property
    def weight_bytes(self) -> int:
        """INT8 data, scales, and what stays in 16 bits."""
        return self.data + self.scales + self.rest

    @property
    def allocated(self) -> int:
        """The most that torch's allocator hands out at once."""
        parts = (self.kv_cache, self.logits, self.activations, self.workspace)
        return self.weight_bytes + sum(parts)

    @property
    def total(self) -> Range:
        """All that the process takes of the GPU."""
        base, o = self.allocated + self.graph, self.overhead
        return Range(base + o.low, base + o.likely, base + o.high)


@dataclass(frozen=True)
class Model:
    """An architecture and what is done with each of its tensors."""

    architecture: Architecture
    decisions: tuple[Decision, ...]

    @classmethod
    def from_recipe(cls, found: Architecture, recipe: Recipe | None = None) -> Model:
        """The model as `halfweight quantize` would write it."""
        return cls(found, tuple((recipe or Recipe()).decide_all(found.tensors)))

    @cached_property
    def disk_bytes(self) -> int:
        """Bytes of tensor data in the INT8 checkpoint."""
        return sum(decision.disk_bytes for decision in self.decisions)

    @cached_property
    def resident_bytes(self) -> int:
        """Bytes of all parameters once the INT8 checkpoint is loaded."""
        return sum(decision.resident_bytes for decision in self.decisions)

    @cached_property
    def sixteen_bit_bytes(self) -> int:
        """Bytes of all parameters in 16 bits."""
        return 2 * self.architecture.num_parameters


@dataclass(frozen=True)
class Plan:
    """One workload on GPUs of `budget` bytes each: both footprints and the INT8 verdict."""

    model: Model
    workload: Workload
    budget: int
    sixteen_bit: Footprint
    int8: Footprint

    @property
    def verdict(self) -> Verdict:
        """Whether the INT8 model fits."""
        return judge(self.int8, self.budget)

    @property
    def sixteen_bit_verdict(self) -> Verdict:
        """Whether the 16-bit model fits."""
        return judge(self.sixteen_bit, self.budget)


def judge(footprint: Footprint, budget: int) -> Verdict:
    """fits: even the high estimate; tight: only the likely one."""
    total = footprint.total
    if total.high <= budget:
        return "fits"
    return "tight" if total.likely <= budget else "does not fit"


def plan(model: Model, workload: Workload, budget: int) -> Plan:
    """Footprints of both weights on one rank of `workload.ranks`, against `budget` bytes a GPU."""
    check_ranks(model, workload.ranks)
    both = (footprint(model, workload, weights) for weights in ("16bit", "int8"))
    return Plan(model, workload, budget, *both)


def footprint(model: Model, workload: Workload, weights: Weights) -> Footprint:
    """Bytes on one rank, at the worst moment of generation."""
    data = scales = rest = sharded = 0
    for decision in model.decisions:
        parts = _weight_parts(decision, weights)
        divided = _is_sharded(decision.tensor.name, model, workload)
        share = tuple(-(-part // workload.ranks) for part in parts) if divided else parts
        data, scales, rest = data + share[0], scales + share[1], rest + share[2]
        sharded += sum(share) if divided else 0
    prefill = prefill_moments(model.architecture, workload).peak
    decode = _forward_moments(model.architecture, 1, workload).peak
    return Footprint(
        weights=weights,
        data=data,
        scales=scales,
        rest=rest,
        sharded=sharded,
        kv_cache=kv_bytes(model.architecture, workload),
        logits=4 * workload.batch * model.architecture.vocabulary,
        activations=max(prefill, decode),
        workspace=KERNEL_WORKSPACE_BYTES,
        graph=decode,
        overhead=Range(*workload.overhead),
    )


def kv_bytes(a: Architecture, workload: Workload) -> int:
    """Bytes of the cache on one rank; int8 keeps a 16-bit scale a head and token.

    Sliding layers stay in 16 bits; a layer with fewer heads than ranks is held by several.
    """
    total = 0
    for layer in a.cache_layers:
        heads = -(-layer.heads // workload.ranks)
        numbers = layer.numbers // layer.heads * heads
        each = 2 * numbers
        if workload.kv_dtype == "int8" and layer.window is None:
            each = numbers + 2 * (numbers // a.head_dim)
        total += each * layer.tokens(workload.context)
    return total * workload.batch


@dataclass(frozen=True)
class Moments:
    """Bytes alive at the three moments of a forward pass that may be its worst, beside weights and
    cache. `mask` lives throughout and is in all of them; `inside_attention` is the part of
    `attention` that the attention kernel makes for itself: the mask once more, in 16 bits.
    """

    mask: int
    mlp: int
    norm: int
    attention: int
    inside_attention: int

    @property
    def peak(self) -> int:
        """The worst of the three."""
        return max(self.mlp, self.norm, self.attention)


def prefill_moments(a: Architecture, workload: Workload) -> Moments:
    """Inside the prefill of one chunk of prompts."""
    chunk = max(1, CHUNK_TOKENS // workload.batch)
    return _forward_moments(a, min(workload.context, chunk), workload)


def _forward_moments(a: Architecture, length: int, workload: Workload) -> Moments:
    """Of a forward pass over `length` new tokens of each sequence.

    Counted in transformers' forward pass: four hidden states and three MLP widths inside the MLP;
    three hidden states, and as many in 32 bits, in a norm; three hidden states, queries, output,
    new keys and values, and keys and values repeated to all heads inside attention.
    """
    ranks, batch, context = workload.ranks, workload.batch, workload.context
    heads, kv_heads = -(-a.heads // ranks), -(-a.kv_heads // ranks)
    tokens, width = batch * length, -(-a.intermediate // ranks)
    mask = tokens * context
    layer = 4 * batch * context * a.head_dim
    attention = 2 * tokens * (3 * a.hidden + 2 * (heads + kv_heads) * a.head_dim)
    attention += layer * heads if heads > kv_heads else 0
    attention += layer * kv_heads if workload.kv_dtype == "int8" else 0
    return Moments(
        mask=mask,
        mlp=mask + 2 * tokens * (4 * a.hidden + 3 * width),
        norm=mask + tokens * (3 * 2 + 3 * 4) * a.hidden,
        attention=mask + attention + 2 * mask,
        inside_attention=2 * mask,
    )


def _weight_parts(decision: Decision, weights: Weights) -> tuple[int, int, int]:
    """Data, scales, 16-bit rest of one tensor."""
    tensor = decision.tensor
    if weights == "16bit":
        return 0, 0, 2 * tensor.num_elements
    if decision.scheme is None:
        return 0, 0, tensor.num_bytes
    found = decision.scheme.resident_bytes((tensor.shape[0], tensor.shape[1]))
    return found.data, found.scales, 0


def _is_sharded(name: str, model: Model, workload: Workload) -> bool:
    """Linears are divided over ranks; norms never; the embedding only by vLLM."""
    if workload.ranks == 1:
        return False
    if "embed_tokens" in name:
        return workload.runtime == "vllm"
    return name.endswith((".weight", ".bias")) and "norm" not in name and "gate.weight" not in name


def legal_ranks(model: Model, most: int = 64) -> list[int]:
    """Tensor-parallel sizes that divide heads, MLP, vocabulary, and rows into whole groups."""
    return [ranks for ranks in range(1, most + 1) if _why_illegal(model, ranks) is None]


def check_ranks(model: Model, ranks: int) -> None:
    """Raise UsageError naming what `ranks` does not divide."""
    if why := _why_illegal(model, ranks):
        legal = ", ".join(map(str, legal_ranks(model)))
        raise UsageError(f"{ranks} GPUs {why}", hint=f"legal tensor-parallel sizes: {legal}")


def _why_illegal(model: Model, ranks: int) -> str | None:
    a = model.architecture
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
    for decision in model.decisions:
        group = decision.scheme.group_size if decision.scheme else None
        rowwise = decision.tensor.name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight"))
        if isinstance(group, int) and rowwise and decision.tensor.shape[1] % (ranks * group):
            return f"cut {decision.tensor.name} inside a group of {group}"
    return None


def solve(model: Model, workload: Workload, budget: int, quantity: Quantity) -> int | None:
    """The largest batch, context or group size, or the fewest GPUs, whose high estimate fits.

    None if none does. A larger group is smaller in memory; the answer is then the finest group
    that fits.
    """

    def fits(changed: Model, work: Workload) -> bool:
        return judge(footprint(changed, work, "int8"), budget) == "fits"

    if quantity == "gpus":
        return next(
            (n for n in legal_ranks(model) if fits(model, replace(workload, ranks=n))), None
        )
    if quantity == "group-size":
        regrouped = ((g, _with_group_size(model, g)) for g in GROUP_SIZES)
        return next((g for g, changed in regrouped if fits(changed, workload)), None)
    if quantity == "batch":
        return _largest(lambda n: fits(model, replace(workload, batch=n)), 1 << 20)
    most = model.architecture.max_context or 1 << 24
    return _largest(lambda n: fits(model, replace(workload, context=n)), most)


def _with_group_size(model: Model, group_size: int) -> Model:
    scheme = next((d.scheme for d in model.decisions if d.scheme), Scheme())
    keep = tuple(d.tensor.name for d in model.decisions if d.scheme is None)
    return Model.from_recipe(
        model.architecture, Recipe(replace(scheme, group_size=group_size), keep)
    )


def _largest(fits: Callable[[int], bool], most: int) -> int | None:
    """The largest n in 1..most with fits(n), which holds up to some n and not beyond."""
    if not fits(1):
        return None
    good, bad = 1, most + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def grid(
    model: Model, workload: Workload, batches: list[int], contexts: list[int]
) -> Iterator[tuple[int, int, int]]:
    """(batch, context, likely bytes a GPU) of the INT8 model, row by row."""
    for batch in batches:
        for context in contexts:
            work = replace(workload, batch=batch, context=context)
            yield batch, context, footprint(model, work, "int8").total.likely


def advice(found: Plan) -> list[str]:
    """What would make the INT8 model fit, each by how much; empty if it fits."""
    if found.verdict == "fits":
        return []
    over = found.int8.total.high - found.budget
    lines = [f"{over / GIB:.2f} GiB too much a GPU"]
    model, work, budget = found.model, found.workload, found.budget
    for quantity, word, now in (
        ("batch", "batch", work.batch),
        ("context", "context", work.context),
        ("gpus", "GPUs", work.ranks),
    ):
        value = solve(model, work, budget, quantity)  # type: ignore[arg-type]
        if value is not None and value != now:
            lines.append(f"{word} {value} instead of {now} fits")
    if work.kv_dtype == "16bit":
        saved = found.int8.kv_cache - kv_bytes(model.architecture, replace(work, kv_dtype="int8"))
        lines.append(f"an int8 KV cache saves {saved / GIB:.2f} GiB")
    return lines


def require_fit(
    model: Model, workload: Workload, free_bytes: int, *, weights: Weights = "int8"
) -> None:
    """Raise DoesNotFitError if even the low estimate of `weights` exceeds `free_bytes` of a GPU.

    `free_bytes` is what the process can still allocate, so the overhead is not counted.
    """
    needed = footprint(model, workload, weights).allocated
    if needed > free_bytes:
        work = replace(workload, overhead=(0, 0, 0))
        batch = solve(model, work, free_bytes, "batch")
        fits = f"batch {batch} fits" if batch else "no batch fits at this context"
        raise DoesNotFitError(
            f"batch {workload.batch} of {workload.context} tokens needs {needed / GIB:.2f} GiB, "
            f"{free_bytes / GIB:.2f} GiB are free",
            hint=f"{fits}; `halfweight plan` shows the parts, --force tries all the same",
        )

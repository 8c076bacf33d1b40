"""What a model needs of each device before anything is loaded. No torch here.

The arithmetic follows how `halfweight.generate` runs: weights, a static cache of exactly the
tokens asked for, prompts read CHUNK_TOKENS at a time (all sequences together), logits of the last
token only, SDPA with a mask, one recorded decode step. Weights and cache are exact. What prefill
holds at its worst moment follows from the shapes, op by op: either inside attention (mask in two
forms, keys and values repeated for grouped heads) or inside the MLP (three of its widths). The
driver's context, libraries' workspaces and the allocator's rounding are not computable: they are a
range, ASSUMED_OVERHEAD, until `halfweight measure` has replaced it by what it saw.

`low` takes the least overhead, `high` the most: a plan fits if `high` does, is tight if only
`likely` does.

halfweight runs on one device. Several GPUs run the same checkpoint through another engine, which
holds scales as the file does: vLLM divides embedding and head as well and needs no mask;
transformers' tensor parallelism leaves both on every rank.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from halfweight.architecture import Architecture, CacheLayer
from halfweight.errors import UsageError
from halfweight.scheme import Decision, Recipe

GIB = 1 << 30
MIB = 1 << 20
CHUNK_TOKENS = 2048
"""As in generate.py; a test keeps them equal. Also what vLLM schedules at once by default."""
KERNEL_WORKSPACE_BYTES = 32 * MIB
"""Of either weights: torch's cuBLAS workspace on Hopper, or our blocks of 16-bit weights."""

Weights = Literal["16bit", "int8"]
Runtime = Literal["halfweight", "transformers-tp", "vllm"]
KvDtype = Literal["16bit", "int8"]
DeviceKind = Literal["cuda", "cpu"]
Verdict = Literal["fits", "tight", "does not fit"]


@dataclass(frozen=True)
class Range:
    """Bytes: at least, probably, at most."""

    low: int
    likely: int
    high: int


ASSUMED_OVERHEAD: dict[DeviceKind, Range] = {
    "cuda": Range(MIB * 400, MIB * 700, MIB * 1400),
    "cpu": Range(MIB * 500, MIB * 700, MIB * 1200),
}
"""Driver's context (of a CPU: the process and its libraries), loaded kernels, allocator's rounding.
An assumption, wide on purpose."""
ENGINE_OVERHEAD = Range(MIB * 700, MIB * 1700, MIB * 2700)
"""Of another engine: its own graphs and the buffers by which GPUs talk as well. An assumption."""


@dataclass(frozen=True)
class Workload:
    """What is to run: `batch` sequences of `context` tokens, prompt and answer together."""

    context: int = 4096
    batch: int = 1
    kv_dtype: KvDtype = "16bit"
    ranks: int = 1
    runtime: Runtime = "halfweight"
    device: DeviceKind = "cuda"
    overhead: Range | None = None

    def __post_init__(self) -> None:
        for name in ("context", "batch", "ranks"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}", hint="give 1 or more")

    def on_ranks(self, ranks: int) -> Workload:
        """The same on so many GPUs, by vLLM where halfweight alone cannot."""
        if self.runtime == "halfweight" and ranks > 1:
            return replace(self, ranks=ranks, runtime="vllm", overhead=None)
        return replace(self, ranks=ranks)

    @property
    def expected_overhead(self) -> Range:
        """What was measured, else what is assumed of the runtime on the device."""
        if self.overhead is not None:
            return self.overhead
        return ASSUMED_OVERHEAD[self.device] if self.runtime == "halfweight" else ENGINE_OVERHEAD


@dataclass(frozen=True)
class Part:
    """Bytes of one component on one rank: its share of what is divided, and what all ranks hold."""

    name: str
    sharded: int
    replicated: int

    @property
    def num_bytes(self) -> int:
        """All of it on one rank."""
        return self.sharded + self.replicated


WEIGHT_PARTS = ("int8 data", "scales", "16-bit weights")


@dataclass(frozen=True)
class Footprint:
    """Bytes on one rank, component by component, at the worst moment of generation."""

    weights: Weights
    parts: tuple[Part, ...]
    overhead: Range

    def bytes_of(self, *names: str) -> int:
        """Bytes of the parts whose names start with one of `names`."""
        return sum(part.num_bytes for part in self.parts if part.name.startswith(names))

    @property
    def weight_bytes(self) -> int:
        """INT8 data, scales, and what stays in 16 bits."""
        return self.bytes_of(*WEIGHT_PARTS)

    @property
    def kv_bytes(self) -> int:
        """The cache, of all kinds of layers."""
        return self.bytes_of("KV cache")

    @property
    def allocated(self) -> int:
        """The most that torch's allocator holds."""
        return sum(part.num_bytes for part in self.parts)

    @property
    def total(self) -> Range:
        """All that the process takes of the device."""
        base, o = self.allocated, self.overhead
        return Range(base + o.low, base + o.likely, base + o.high)

    def judge(self, budget: int) -> Verdict:
        """fits: even the high estimate; tight: only the likely one."""
        if self.total.high <= budget:
            return "fits"
        return "tight" if self.total.likely <= budget else "does not fit"


@dataclass(frozen=True)
class Model:
    """An architecture and what is done with each of its tensors; the recipe where one is chosen."""

    architecture: Architecture
    decisions: tuple[Decision, ...]
    recipe: Recipe | None = None

    @classmethod
    def from_recipe(cls, found: Architecture, recipe: Recipe | None = None) -> Model:
        """The model as `halfweight quantize` would write it."""
        recipe = recipe or Recipe()
        return cls(found, tuple(recipe.decide_all(found.tensors)), recipe)

    @cached_property
    def disk_bytes(self) -> int:
        """Bytes of tensor data in the INT8 checkpoint."""
        return sum(decision.disk_bytes for decision in self.decisions)

    @cached_property
    def resident_bytes(self) -> int:
        """Bytes of all parameters once halfweight has loaded the INT8 checkpoint."""
        return sum(decision.resident_bytes for decision in self.decisions)

    @cached_property
    def sixteen_bit_bytes(self) -> int:
        """Bytes of all parameters in 16 bits."""
        return 2 * self.architecture.num_parameters

    @cached_property
    def _sums(self) -> dict[tuple[Weights, Runtime], WeightSums]:
        return {}

    def weight_sums(self, weights: Weights, runtime: Runtime) -> WeightSums:
        """Bytes of all tensors by part: those that ranks divide and those that each holds."""
        key = (weights, runtime)
        if key not in self._sums:
            sharded, replicated = [0, 0, 0], [0, 0, 0]
            for decision in self.decisions:
                column = sharded if _is_sharded(decision.tensor.name, runtime) else replicated
                for i, part in enumerate(_weight_parts(decision, weights, runtime)):
                    column[i] += part
            self._sums[key] = (sharded, replicated)
        return self._sums[key]


WeightSums = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Plan:
    """One workload on devices of `budget` bytes each (None: not known), with both footprints."""

    model: Model
    workload: Workload
    budget: int | None
    sixteen_bit: Footprint
    int8: Footprint

    @property
    def verdict(self) -> Verdict | None:
        """Whether the INT8 model fits; None without a budget."""
        return None if self.budget is None else self.int8.judge(self.budget)

    @property
    def sixteen_bit_verdict(self) -> Verdict | None:
        """Whether the 16-bit model fits; None without a budget."""
        return None if self.budget is None else self.sixteen_bit.judge(self.budget)


def plan(model: Model, workload: Workload, budget: int | None = None) -> Plan:
    """Footprints of both weights on one rank of `workload.ranks`, against `budget` bytes a GPU.

    Raises UsageError for a number of ranks that the model cannot be divided by.
    """
    check_ranks(model, workload.ranks)
    if workload.ranks > 1 and workload.runtime == "halfweight":
        raise UsageError(
            f"halfweight runs on one GPU, found {workload.ranks}",
            hint="--runtime vllm runs the same checkpoint on several",
        )
    both = (footprint(model, workload, weights) for weights in ("16bit", "int8"))
    return Plan(model, workload, budget, *both)


def footprint(model: Model, workload: Workload, weights: Weights) -> Footprint:
    """Bytes on one rank, at the worst moment of generation."""
    sharded, replicated = model.weight_sums(weights, workload.runtime)
    parts = [
        _part(name, whole, held, workload.ranks)
        for name, whole, held in zip(WEIGHT_PARTS, sharded, replicated, strict=True)
    ]
    a = model.architecture
    logits = 6 * workload.batch * a.vocabulary
    prefill = prefill_moments(a, workload).peak
    decode = forward_moments(a, 1, workload).peak
    on_gpu = workload.device == "cuda"
    parts += kv_parts(a, workload)
    parts.append(Part("logits", 0, logits))
    parts.append(Part("prefill activations", 0, prefill))
    parts.append(Part("kernel workspace", 0, KERNEL_WORKSPACE_BYTES if on_gpu else 0))
    parts.append(Part("CUDA graph", 0, decode + logits if on_gpu else 0))
    return Footprint(
        weights,
        tuple(part for part in parts if part.num_bytes),
        workload.expected_overhead,
    )


def _part(name: str, divided: int, held: int, ranks: int) -> Part:
    return Part(name, *((-(-divided // ranks), held) if ranks > 1 else (0, divided + held)))


def kv_parts(a: Architecture, workload: Workload) -> list[Part]:
    """The cache on one rank, by kind of layer; int8 keeps a 16-bit scale a head and token,
    vLLM's 8-bit cache none.

    Sliding layers stay in 16 bits. A layer with fewer heads than ranks is held by several.
    """
    found = {"KV cache": Part("KV cache", 0, 0)}
    for layer, count in Counter(a.cache_layers).items():
        heads = -(-layer.heads // workload.ranks)
        each = workload.batch * count * _layer_bytes(a, layer, heads, workload)
        name = "KV cache" + kind_of_layer(a, layer)
        before = found.get(name, Part(name, 0, 0))
        divided = workload.ranks > 1 and layer.heads > 1
        found[name] = Part(
            name,
            before.sharded + (each if divided else 0),
            before.replicated + (0 if divided else each),
        )
    return list(found.values())


def _layer_bytes(a: Architecture, layer: CacheLayer, heads: int, workload: Workload) -> int:
    numbers = layer.numbers // layer.heads * heads
    each = 2 * numbers
    if workload.kv_dtype == "int8" and layer.window is None:
        each = numbers if workload.runtime == "vllm" else numbers + 2 * 2 * heads
    return each * layer.tokens(workload.context)


def kind_of_layer(a: Architecture, layer: CacheLayer) -> str:
    """What follows "KV cache" in the name of a layer's part."""
    if layer.numbers and layer.numbers != 2 * layer.heads * a.head_dim:
        return ", compressed"
    return "" if layer.window is None else ", sliding window"


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
    return forward_moments(a, min(workload.context, chunk), workload)


def forward_moments(a: Architecture, length: int, workload: Workload) -> Moments:
    """Of a forward pass over `length` new tokens of each sequence.

    Counted in transformers' forward pass. In the MLP: four hidden states and three widths (four
    where one product makes gate and up, and those and a hidden state for each expert of a token).
    In a norm: three hidden states, and as many in 32 bits. In attention: three hidden states,
    queries, output, new keys and values (twice where one product makes them), and for more than
    one token a sequence keys and values repeated to all heads. One mask for each kind of layer;
    vLLM's attention reads its cache as it lies and has none.
    """
    ranks, batch = workload.ranks, workload.batch
    heads, kv_heads = -(-a.heads // ranks), -(-a.kv_heads // ranks)
    tokens, width = batch * length, -(-a.intermediate // ranks)
    numbers = 3 * a.hidden + 2 * (heads + kv_heads) * a.head_dim
    numbers += (heads + 2 * kv_heads) * a.head_dim if a.fused_attention else 0
    attention, masks = 2 * tokens * numbers, [0]
    if workload.runtime != "vllm":
        reaches = _reaches(a, length, workload.context)
        masks = [tokens * reach for reach in reaches]
        layer = 4 * batch * max(reaches) * a.head_dim
        attention += layer * heads if heads > kv_heads and length > 1 else 0
        attention += layer * kv_heads if workload.kv_dtype == "int8" else 0
    mask = sum(masks)
    return Moments(
        mask=mask,
        mlp=mask + 2 * tokens * _mlp_numbers(a, width),
        norm=mask + tokens * (3 * 2 + 3 * 4) * a.hidden,
        attention=mask + attention + 2 * max(masks),
        inside_attention=2 * max(masks),
    )


def _reaches(a: Architecture, length: int, context: int) -> list[int]:
    """Tokens that attention sees, for each kind of layer: a window and the new tokens, or all."""
    windows = {layer.window for layer in a.cache_layers if layer.numbers}
    return [context if w is None else min(context, w + length) for w in windows]


def _mlp_numbers(a: Architecture, width: int) -> int:
    if a.experts_per_token:
        return 4 * a.hidden + a.experts_per_token * (4 * width + a.hidden)
    return 4 * a.hidden + (4 if a.fused_mlp else 3) * width


def _weight_parts(decision: Decision, weights: Weights, runtime: Runtime) -> tuple[int, int, int]:
    """Data, scales, 16-bit rest of one tensor. Other engines hold scales as the file does."""
    tensor = decision.tensor
    if weights == "16bit":
        return 0, 0, 2 * tensor.num_elements
    if decision.scheme is None:
        return 0, 0, tensor.num_bytes
    shape = (tensor.shape[0], tensor.shape[1])
    scheme = decision.scheme
    found = (scheme.resident_bytes if runtime == "halfweight" else scheme.disk_bytes)(shape)
    return found.data, found.scales, 0


def _is_sharded(name: str, runtime: Runtime) -> bool:
    """Linears are divided over ranks, norms and routers never, embedding and head by vLLM only."""
    if any(word in name for word in ("embed_tokens", "lm_head")):
        return runtime == "vllm"
    return name.endswith((".weight", ".bias")) and "norm" not in name and ".gate.weight" not in name


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
